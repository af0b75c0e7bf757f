"""The frames of a video as a camera might have given them: as they are, and disturbed.

Decoding is timed, the disturbance is not.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mae_deploy.commands.stream_eval.config import Condition
from mae_deploy.errors import import_optional
from mae_deploy.files import temporary_folder
from mae_deploy.runtime.video import Frame, Video, open_video

_FLICKER = 0.05
"""Largest change of a frame's brightness."""
_CRF = 35
"""Quality of the second encoding, x264's constant rate factor; 23 is usual, 51 the worst."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """A frame, and what it took to get it from the file."""

    image: Any
    """As streams take it."""
    cpu: float
    """Seconds of the processor, all threads together."""
    wall: float
    """Seconds."""


@contextmanager
def opened(
    source: Path, condition: Condition, *, every: int, max_frames: int, seed: int
) -> Iterator[Iterator[Decoded]]:
    """The frames of a video (or a folder of images) under a condition, one after the other.

    Raises:
        ConfigError: no video.
        MissingDependency: PyAV is not installed.
    """
    with open_video(source, every=every, max_frames=max_frames) as video:
        if condition == "reencoded":
            with temporary_folder() as folder:
                again = folder / "again.mp4"
                _encode(video, again)
                with open_video(again) as second:
                    yield _timed(second)
        else:
            yield map(_Disturbance(condition, seed), _timed(video))


def _timed(video: Video) -> Iterator[Decoded]:
    cpu, wall = time.process_time(), time.perf_counter()
    for frame in video:
        yield Decoded(frame.image, time.process_time() - cpu, time.perf_counter() - wall)
        cpu, wall = time.process_time(), time.perf_counter()


def _encode(video: Video, path: Path) -> None:
    """H.264 where this PyAV has x264, else MPEG-4, which all have."""
    av: Any = import_optional("av", extra="video")
    with av.open(str(path), "w") as container:
        stream: Any = None
        for frame in video:
            pixels = frame.rgb()
            if stream is None:
                x264 = "libx264" in av.codecs_available
                stream = container.add_stream("libx264" if x264 else "mpeg4", rate=25)
                stream.height, stream.width = (side // 2 * 2 for side in pixels.shape[:2])  # 4:2:0 has no odd sides
                stream.pix_fmt = "yuv420p"
                stream.options = {"crf": str(_CRF), "preset": "veryfast"} if x264 else {"qscale": "20"}
            pixels = np.ascontiguousarray(pixels[: stream.height, : stream.width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        if stream is not None:
            container.mux(stream.encode(None))


class _Disturbance:
    def __init__(self, condition: Condition, seed: int) -> None:
        self._condition = condition
        self._rng = np.random.default_rng(seed)

    def __call__(self, found: Decoded) -> Decoded:
        if self._condition == "clean":
            return found
        frame = Frame(index=0, time=None, image=found.image).rgb()
        if self._condition == "flicker":
            gain = 1 + self._rng.uniform(-_FLICKER, _FLICKER)
            frame = np.clip(np.round(frame * np.float32(gain)), 0, 255).astype(np.uint8)
        else:
            down, right = self._rng.integers(-1, 2, 2)
            height, width = frame.shape[:2]
            row = np.clip(np.arange(height) + down, 0, height - 1)
            column = np.clip(np.arange(width) + right, 0, width - 1)
            frame = frame[row[:, None], column]
        return replace(found, image=frame)
