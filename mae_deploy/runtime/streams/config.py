"""How a stream decides."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from mae_deploy.config import Settings, setting
from mae_deploy.errors import ConfigError, MaeDeployError
from mae_deploy.runtime.selection import Motion, Selection


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamOptions(Settings, resume="fixed"):
    """Stream."""

    refresh: float = setting(0.25, at_least=0, at_most=1, basic=True)
    """Beside what is selected, up to this share of all patches at every frame: those of which the largest error is
    expected, and as a quarter of them those that were not computed for longest; 0: none."""
    target_snr: float = setting(13.0)
    """Compute less where the tokens' signal-to-noise ratio is expected to be above this, in dB: of the refresh, down to
    a tenth, then of what is selected, by thresholds up to four times as high; 99: never."""
    bypass: float | None = setting(None, at_least=0, at_most=1, basic=True)
    """Compute the whole frame where more than this share is to be computed; default: the share from which on a whole
    frame is no slower on this machine, measured when the first stream of the backbone begins."""
    shift: bool = True
    """Move tokens and values of patches that are not computed by the mean change of those that were computed in
    turn without having changed themselves: what a large object does to the context of all."""
    audit: float = setting(0.02, at_least=0, at_most=1)
    """Share of the computation that goes into audits: a whole frame is computed beside, compared, and taken over;
    0: none."""
    min_snr: float = setting(6.0, basic=True)
    """Least signal-to-noise ratio of the tokens, in dB, that an audit lets pass."""
    on_drift: Literal["refresh", "error"] = setting("refresh", basic=True)
    """What an audit below it does: refresh more for a while, or fail."""
    cut: float = setting(0.7, at_least=0, at_most=1)
    """Share of the patches that change by more than --cut-difference when the scene is another one."""
    cut_difference: float = 30.0
    """Mean absolute grey difference, from 0 to 255."""

    def faults(self) -> Iterator[MaeDeployError]:
        if self.on_drift not in ("refresh", "error"):
            yield ConfigError(f"on_drift must be refresh or error, not '{self.on_drift}'")


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamConfig(StreamOptions):
    """How a stream decides what to compute."""

    select: Selection = field(default_factory=Motion)
    """Which patches are worth computing."""
