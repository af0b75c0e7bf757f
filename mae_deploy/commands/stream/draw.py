"""Computed patches and the label, drawn on frames; and a video of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mae_deploy.files import atomic_path
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.images.read import Array
from mae_deploy.progress import notice
from mae_deploy.runtime.streams.stream import Seen
from mae_deploy.runtime.video.decode import import_av

PATCH, WHOLE = (230, 159, 0), (213, 94, 0)
"""Colours of computed patches, and of a frame that was computed whole."""
_TINT = 0.35
_RATE = 10
"""Frames a second of a video of images, which say nothing of it."""
_MOST_SAMPLES = 12


def annotated(pixels: Array, seen: Seen, preprocess: Preprocess, patch_size: int, text: str) -> Array:
    """The frame `(H, W, 3)` with its computed patches tinted, and a line of text."""
    found = pixels.copy()
    height, width, _ = found.shape
    rows, columns = (side // patch_size for side in preprocess.image_size)
    left, top, right, bottom = preprocess.seen_part((width, height))
    across, down = (right - left) / columns, (bottom - top) / rows
    whole = len(seen.keep) == rows * columns
    image = Image.fromarray(found)
    draw = ImageDraw.Draw(image, "RGBA")
    for index in () if whole else seen.keep.tolist():
        row, column = divmod(index, columns)
        x, y = left + column * across, top + row * down
        draw.rectangle((x, y, x + across - 1, y + down - 1), fill=(*PATCH, round(255 * _TINT)), outline=PATCH)
    draw.rectangle(
        (left, top, right - 1, bottom - 1), outline=WHOLE if whole else (*PATCH, 120), width=3 if whole else 1
    )
    font = ImageFont.load_default(size=max(10, height // 24))
    box = draw.textbbox((6, 4), text, font=font)
    draw.rectangle((0, 0, box[2] + 6, box[3] + 4), fill=(0, 0, 0, 160))
    draw.text((6, 4), text, font=font, fill=(255, 255, 255))
    return np.asarray(image)


class Samples:
    """Some frames, evenly over the whole stream, at most 480 pixels wide."""

    def __init__(self) -> None:
        self.frames: list[tuple[int, Array]] = []
        self._every = 1

    def wants(self, number: int) -> bool:
        """Whether the frame of this number is to be drawn."""
        return number % self._every == 0

    def add(self, number: int, pixels: Array) -> None:
        """Keep it; where there are too many, every other one goes."""
        image = Image.fromarray(pixels)
        image.thumbnail((480, 480))
        self.frames.append((number, np.asarray(image)))
        if len(self.frames) > _MOST_SAMPLES:
            self.frames = self.frames[::2]
            self._every *= 2


class VideoWriter:
    """Encodes frames of the first one's size."""

    def __init__(self, container: Any, rate: float | None) -> None:
        self._container, self._rate = container, Fraction(rate or _RATE).limit_denominator(1000)
        self._stream: Any = None

    def add(self, pixels: Array) -> None:
        """Encode the next frame `(H, W, 3)`; one of another size is resized."""
        av = import_av()
        if self._stream is None:
            codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
            if codec == "mpeg4":
                notice("codec:", "FFmpeg has no libx264 here: the video is MPEG-4 part 2")
            self._stream = self._container.add_stream(codec, rate=self._rate)
            self._stream.height, self._stream.width = (side // 2 * 2 for side in pixels.shape[:2])
            self._stream.pix_fmt = "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        self._container.mux(self._stream.encode(frame.reformat(self._stream.width, self._stream.height)))

    def finish(self) -> None:
        """Write what the encoder still holds."""
        if self._stream is not None:
            self._container.mux(self._stream.encode())


@contextmanager
def written_video(path: Path, rate: float | None) -> Iterator[VideoWriter]:
    """A video that appears when the block ends, at whatever frame that is."""
    with atomic_path(path) as aside:
        container = import_av().open(str(aside), "w")
        writer = VideoWriter(container, rate)
        try:
            yield writer
            writer.finish()
        finally:
            container.close()
