"""A look at a few images of a data set before a run: how many bits they have, and how much of their range is used."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mae_deploy.data.sources.base import ImageSource
from mae_deploy.errors import ConfigError, MissingDependency
from mae_deploy.images.read import MODES, UnreadableImage, read_header, read_image, stored_pixels
from mae_deploy.progress import notice

LOOKED_AT = 8
"""Images, spread over the data set."""

_NARROW = 4
"""A range of which no more than one part in this is used."""


def check_pixels(source: ImageSource, channels: int, pixel_max: float | None) -> None:
    """Look at a few images of a data set; see `check_images`."""
    places = np.linspace(0, len(source) - 1, min(LOOKED_AT, len(source))).round().astype(int).tolist()
    check_images(source.name, _contents(source, places), channels, pixel_max)


def check_images(name: str, images: Iterable[tuple[str, bytes]], channels: int, pixel_max: float | None) -> None:
    """Say once where bits are lost, or where a range is hardly used or left by far.

    Args:
        images: names and contents of the files.

    Raises:
        ConfigError: all have 8 bits, where `pixel_max` expects more.
    """
    looks = [look for key, content in images if (look := _look(key, content, channels, pixel_max)) is not None]
    deep = [look for look in looks if look.deep]
    largest = max((look.largest for look in deep), default=0.0)
    if pixel_max is not None and pixel_max > 255 and looks and not deep:
        raise ConfigError(
            f"--pixel-max {pixel_max:g}: the pixels of {name} have 8 bits, such as {looks[0].key}",
            hint="leave --pixel-max out; what was trained with it needs images of more bits",
        )
    several = [look for look in looks if look.pictures > 1]
    if several and channels in MODES:  # pages may be channels
        _say(
            f"{name}: of {len(looks)} images looked at, {len(several)} hold several pictures, such as {several[0].key}"
            f" with {several[0].pictures}; the first is read"
        )
    if largest < 1:
        return
    seen = f"{name}: of {len(looks)} images looked at, {len(deep)} have more than 8 bits"
    bits = f"--pixel-max {(1 << int(largest).bit_length()) - 1}" if deep[0].integers else "--pixel-max"
    if deep[0].channels != channels:
        bits += f" --in-chans {deep[0].channels}"
    if pixel_max is None:
        levels = max(look.levels for look in deep)
        if levels * _NARROW <= 256:
            _say(f"{seen} and no value above {largest:g}, {levels} levels in 8 bits; {bits} in training uses all")
        else:
            _say(f"{seen}, of which 8 are used; {bits} in training uses all")
    elif pixel_max == 65535 and largest * _NARROW <= pixel_max:
        _say(f"{seen} and no value above {largest:g}, {largest / pixel_max:.2g} of --pixel-max 65535; {bits} uses all")
    elif largest > _NARROW * pixel_max:
        _say(f"{seen} and values up to {largest:g}, {largest / pixel_max:.3g} times --pixel-max {pixel_max:g}")


@dataclass(frozen=True, slots=True)
class _Look:
    """What one image showed."""

    key: str
    deep: bool
    """More than 8 bits."""
    pictures: int
    integers: bool = True
    channels: int = 0
    largest: float = 0
    levels: int = 0
    """From black to its brightest pixel, once it is reduced to 8 bits."""


def _contents(source: ImageSource, places: Iterable[int]) -> Iterator[tuple[str, bytes]]:
    for place in places:
        try:
            yield source.key(place), source.raw(place)
        except UnreadableImage:  # whoever reads it says so
            continue


def _look(key: str, content: bytes, channels: int, pixel_max: float | None) -> _Look | None:
    """None where it cannot be read: whoever reads it says so."""
    path = Path(key)
    header = read_header(path, content)
    try:
        if not header.may_be_deep:
            return _Look(key, False, header.pictures)
        pixels = stored_pixels(path, channels, content)
        if pixels.dtype.itemsize == 1:
            return _Look(key, False, header.pictures)
        levels = 0 if pixel_max is not None else int(np.asarray(read_image(path, channels, content=content)).max()) + 1
    except (UnreadableImage, MissingDependency):
        several = pixel_max is None and header.pictures > 1
        return _Look(key, False, header.pictures) if several else None
    return _Look(key, True, header.pictures, pixels.dtype.kind in "ui", pixels.shape[2], float(pixels.max()), levels)


@functools.cache
def _say(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        notice("pixels:", line)
