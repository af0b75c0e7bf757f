"""How a stream decides."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mae_deploy.errors import ConfigError
from mae_deploy.runtime.selection import Motion, Selection


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamConfig:
    """How a stream decides what to compute."""

    select: Selection = field(default_factory=Motion)
    """Which patches are worth computing."""
    refresh: float = 0.1
    """Beside them, the share of all patches that was not computed for longest, at every frame; 0: none."""
    bypass: float | None = None
    """Compute the whole frame where more than this share is to be computed; None: the share from which on a whole frame
    is no slower on this machine, measured when the first stream of the backbone begins."""
    shift: bool = True
    """Move the tokens of patches that are not computed by the mean change of those that were computed in turn without
    having changed themselves: what a large object does to the context of all."""
    audit: float = 0.02
    """Share of the computation that goes into audits: a whole frame is computed beside, compared, and taken over;
    0: none."""
    min_snr: float = 6.0
    """Least signal-to-noise ratio of the tokens, in dB, that an audit lets pass."""
    on_drift: Literal["refresh", "error"] = "refresh"
    """What an audit below it does: refresh more for a while, or fail with `DriftError`."""
    cut: float = 0.7
    """Share of the patches that change by more than `cut_difference` when the scene is another one."""
    cut_difference: float = 30.0
    """Mean absolute grey difference, from 0 to 255."""

    def __post_init__(self) -> None:
        for name, least in (("refresh", 0), ("audit", 0), ("cut", 0)):
            if not least <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be from 0 to 1, not {getattr(self, name)}")
        if self.bypass is not None and not 0 <= self.bypass <= 1:
            raise ConfigError(f"bypass must be from 0 to 1, not {self.bypass}")
        if self.on_drift not in ("refresh", "error"):
            raise ConfigError(f"on_drift must be refresh or error, not '{self.on_drift}'")
