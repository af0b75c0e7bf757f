"""Settings of `mae-deploy report`. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mae_deploy.config import Settings, section, setting
from mae_deploy.errors import ConfigError, MaeDeployError, errors_of
from mae_deploy.export.int8_config import Int8Config
from mae_deploy.models.mask_config import check_shares
from mae_deploy.training.config import Device


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportConfig(Settings):
    """Settings of `mae-deploy report`."""

    runs: tuple[Path, ...] = setting(argument=True, flag="RUN", resume="free", metavar="CKPT")
    """Classifiers: runs or checkpoints of `distill` and `finetune`; a row for each, or several (see --keep-ratio)."""
    data: Path = setting(resume="free")
    """Labelled images: accuracy is that of DATA/val/<class>/…; DATA/train, where it has enough images, calibrates."""
    out: Path = setting(resume="free")
    """Folder to write: report.json, report.md, and the bundles in students/. The same command goes on where it was cut
    off."""
    engine: Literal["onnx", "openvino"] = setting("onnx", resume="fixed", basic=True)
    """Engine that the bundles are made for, evaluated and timed on: ONNX Runtime or OpenVINO."""
    keep_ratio: tuple[float, ...] | None = setting(None, resume="fixed", basic=True, above=0, at_most=1)
    """Shares of the patches to evaluate and time, separated by commas, a row for each; default: those that a run was
    trained on with --keep-ratio, else 1."""
    repeats: int = setting(50, resume="free", basic=True, at_least=1)
    """Timed rounds of one image; FP32 and INT8 of all rows take turns."""
    warmup: int = setting(5, resume="free", at_least=0)
    """Rounds before them that are not timed."""
    threads: int | None = setting(None, resume="free", basic=True, at_least=1, at_most=4096)
    """CPU threads of the engine; default: one for each granted core, or for each of --affinity."""
    affinity: tuple[int, ...] | None = setting(None, resume="free")
    """CPU cores that the engine is bound to while it is evaluated and timed, e.g. 0,1 (Linux); default: any."""
    int8: Int8Config = section(Int8Config, max_drop=0.5)
    max_pixels: int | None = setting(None, resume="free", at_least=1)
    """Pixels of the largest image that is read, such as 300000000 for photos of 300 megapixels; default: 178956970."""
    seed: int = setting(0, resume="fixed")
    """Seed of the patches that are seen where not all are."""
    device: Device = setting("cpu", resume="free", basic=True)
    """Where PyTorch computes what the graphs are compared with, and the engine its answers: auto, cpu or cuda."""

    def faults(self) -> Iterator[MaeDeployError]:
        yield from errors_of(lambda: check_shares(self.keep_ratio))
        if self.int8.max_drop is None:
            yield ConfigError("int8.max_drop None must be a number: report rejects INT8 by it", hint="0.5 by default")
