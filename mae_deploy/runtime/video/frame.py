"""One frame of a source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mae_deploy.errors import ConfigError
from mae_deploy.images.read import Array, is_image
from mae_deploy.images.video_image import VideoImage


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """A frame, and what happened since the one before."""

    index: int
    """Its number in the source from 0, counting those that were left out too."""
    time: float | None
    """Seconds from the first frame: by the file's clock, of a live source by this machine's; None for images."""
    image: Any
    """What backbones and streams take, an image of any size: a `VideoImage` in the decoder's own pixel format, or what
    was read of an image file."""
    dropped: int = 0
    """Frames between the one before and this one that were lost because the queue was full."""
    events: tuple[str, ...] = ()
    """What else happened since the one before, in words: corrupt packets, another size, a lost connection."""

    def rgb(self) -> Array:
        """uint8 `(H, W, 3)`, to look at.

        Raises:
            ConfigError: an image of other channels or types than can be shown.
        """
        if isinstance(self.image, VideoImage):
            return self.image.rgb()
        if is_image(self.image):
            return np.asarray(self.image.convert("RGB"))
        found: Array = self.image
        if found.dtype != np.uint8 or found.shape[2:] != (3,):
            raise ConfigError(f"an image of {found.dtype} {found.shape} cannot be drawn", hint="RGB of 8 bits can")
        return found
