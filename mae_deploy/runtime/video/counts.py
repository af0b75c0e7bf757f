"""What happened to a source until now."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Counts:
    """What is told of a source at its end."""

    dropped: int = 0
    """Frames that were lost because the queue was full."""
    corrupt: int = 0
    """Packets and images that could not be decoded."""
    resized: int = 0
    """How often the frames' size changed."""
    lost: int = 0
    """How often a live source was lost."""
