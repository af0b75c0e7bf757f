"""Settings of `mae-deploy quickstart`. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mae_deploy.config import Settings
from mae_deploy.errors import ConfigError, MaeDeployError
from mae_deploy.training.config import Device


@dataclass(frozen=True, kw_only=True, slots=True)
class QuickstartConfig(Settings, resume="never"):
    """Settings of `mae-deploy quickstart`."""

    out: Path = Path("quickstart")
    """Folder for data, runs, bundles and the report."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the few-label experiments; every accuracy is their mean, with the range over several (0,1,2)."""
    seed: int = 0
    """Seed of pretraining and of the feature distillation."""
    device: Device = "auto"
    """Where to compute; auto takes the GPU where there is one."""

    def faults(self) -> Iterator[MaeDeployError]:
        if not self.seeds:
            yield ConfigError("--seeds '' must be at least one seed, such as 0,1,2")
