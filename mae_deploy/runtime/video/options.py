"""How the frames of a source are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mae_deploy.config import Settings, setting

OnFull = Literal["wait", "drop-oldest"]
"""What is done with a new frame while the one before is still being computed: wait for it, or drop the oldest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoOptions(Settings, resume="never"):
    """Frames."""

    every: int = setting(1, at_least=1, basic=True)
    """Take every so many-th frame."""
    max_frames: int | None = setting(None, at_least=1, basic=True)
    """End after so many frames; default: at the source's end."""
    on_full: OnFull | None = setting(None, basic=True)
    """When frames come faster than they are computed: wait, and compute each; drop-oldest, and stay up to date;
    default: drop-oldest for a camera or a live stream, wait for a file."""
    queue: int = setting(4, at_least=1)
    """Decoded frames of a live source that may wait."""
    reconnect: int = setting(10, at_least=0)
    """How often in a row a lost live source is tried again, after 1, 2, 4 seconds and so on up to 30; 0: it ends
    there."""
    timeout: float = setting(10.0, above=0)
    """Seconds without a frame after which a live source counts as lost."""
