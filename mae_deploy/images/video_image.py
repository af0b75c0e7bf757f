"""A frame as decoders and cameras give it, in whatever pixel format: resized and converted to RGB in one pass, in C."""

from __future__ import annotations

import threading
from typing import Any, Literal, get_args

import numpy as np

from mae_deploy.errors import ConfigError, import_optional
from mae_deploy.images.arrays import Array
from mae_deploy.images.geometry import Interpolation

PixelFormat = Literal["rgb24", "bgr24", "gray", "nv12", "yuv420p"]
"""FFmpeg's names. Of `(H, W, 3)`, `(H, W)`, and planes as cameras put them below one another: `(3 * H / 2, W)`, Y, then
U and V in turns (nv12) or one after the other (yuv420p)."""

_FILTERS: dict[Interpolation, str] = {
    "bicubic": "BICUBIC",
    "bilinear": "BILINEAR",
    "nearest": "POINT",
    "lanczos": "LANCZOS",
    "box": "AREA",
}
"""FFmpeg's filters, which widen with the factor as Pillow's do; it has no Hamming."""

_MUCH = 2
"""A frame that is shrunk by so much or more is averaged over areas, in about half of the time: tokens are 37 to
48 dB from those of the ordinary path."""

_scalers = threading.local()
"""One a thread: it keeps the tables of the last size."""


class VideoImage:
    """Such a frame, of which nothing was copied. Backbones and streams take it as an image."""

    def __init__(self, frame: Any, *, rotation: int = 0) -> None:
        """Args: frame: PyAV's `VideoFrame`; rotation: degrees counterclockwise by which it is to be turned, 0, 90, ….

        Raises:
            MissingDependency: PyAV is not installed.
        """
        self._frame, self._turns = frame, rotation // 90 % 4
        self._last: tuple[tuple[int, int], Interpolation, Array] | None = None
        width, height = (frame.height, frame.width) if self._turns % 2 else (frame.width, frame.height)
        self.width: int = width
        """In pixels."""
        self.height: int = height
        """In pixels."""

    @classmethod
    def from_array(cls, pixels: Array, pixel_format: PixelFormat) -> VideoImage:
        """A frame in the memory of an array, which must not change before the frame was used.

        Raises:
            ConfigError: an array that is not of this format.
            MissingDependency: PyAV is not installed.
        """
        av = import_optional("av", extra="video")
        if pixel_format not in get_args(PixelFormat):
            raise ConfigError(f"pixel format '{pixel_format}' is not one of {', '.join(get_args(PixelFormat))}")
        axes = 3 if pixel_format in ("rgb24", "bgr24") else 2
        if pixels.dtype != np.uint8 or pixels.ndim != axes or not pixels.size or (axes == 3 and pixels.shape[2] != 3):
            raise ConfigError(f"a frame of {pixel_format} is no array of {pixels.dtype} {pixels.shape}")
        if pixel_format in ("nv12", "yuv420p") and (pixels.shape[0] % 6 or pixels.shape[1] % 2):
            raise ConfigError(
                f"{pixels.shape[0]} rows of {pixels.shape[1]} are no planes of {pixel_format}",
                hint="of a frame of H x W they are 3 * H / 2 rows of W; H can be divided by 4, W by 2",
            )
        return cls(av.VideoFrame.from_numpy_buffer(np.ascontiguousarray(pixels), format=pixel_format))

    def has_filter(self, interpolation: Interpolation) -> bool:
        """Whether `resized` knows it."""
        return interpolation in _FILTERS

    def rgb(self) -> Array:
        """All of it, uint8 `(H, W, 3)`."""
        return self.resized((self.width, self.height), "bicubic")

    def resized(self, size: tuple[int, int], interpolation: Interpolation) -> Array:
        """Uint8 `(H, W, 3)` of this width and height, not the caller's to change. Chrominance is interpolated, and
        nothing truncated: PyAV's own `to_ndarray` of YUV is darker by 1 to 2 of 255.
        """
        if self._last is not None and self._last[:2] == (size, interpolation):
            return self._last[2]
        reformatter = import_optional("av.video.reformatter", extra="video")
        if not hasattr(_scalers, "scaler"):
            _scalers.scaler = reformatter.VideoReformatter()
        flags = reformatter.Interpolation
        shrunk = min(self.width / size[0], self.height / size[1]) >= _MUCH and interpolation != "nearest"
        width, height = size[::-1] if self._turns % 2 else size
        made = _scalers.scaler.reformat(
            self._frame,
            width,
            height,
            "rgb24",
            interpolation=flags["AREA" if shrunk else _FILTERS[interpolation]]
            | flags.ACCURATE_RND
            | flags.FULL_CHR_H_INT
            | flags.FULL_CHR_H_INP,
            threads=1,
        )
        (plane,) = made.planes
        rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[:height, : 3 * width]
        pixels = np.rot90(rows.reshape(height, width, 3), self._turns)
        self._last = (size, interpolation, pixels)
        return pixels
