"""Where an image goes on its way to the model: to what size it is resized, and which box of it is the model's input."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

CropMode = Literal["center", "squash", "border", "letterbox"]
"""How an image of another form than the input's is fitted; the first three are timm's."""

Interpolation = Literal["bicubic", "bilinear", "nearest", "lanczos", "box", "hamming"]
"""Pillow's filters."""

Box = tuple[int, int, int, int]
"""Left, top, right and bottom."""

_LONGEST = 100
"""Longer strips (sides as 1 to 100) are cut to their middle before they are resized to cover the input: whole, one of
1 × 65,000 pixels would take gigabytes."""


@dataclass(frozen=True, slots=True)
class Placement:
    """How an image of one size becomes the input."""

    part: Box
    """What is resized: the whole image, but of a strip its middle."""
    size: tuple[int, int]
    """Width and height that it is resized to."""
    box: Box
    """What of the resized image is the input; what lies outside of the image is filled."""


@functools.lru_cache(maxsize=256)  # a stream asks five times a frame
def place(crop_mode: CropMode, image_size: tuple[int, int], crop_pct: float, found: tuple[int, int]) -> Placement:
    """Where an image goes.

    Args:
        image_size: the input's height and width.
        crop_pct: the input's side as a share of the resized image's.
        found: the image's width and height.
    """
    height, width = image_size
    covered = (width, height) if crop_mode == "letterbox" else (int(width / crop_pct), int(height / crop_pct))
    part = (0, 0, *found)
    if crop_mode == "squash":
        size = covered
    elif crop_mode == "center":
        part = _middle(*found)
        size = _cover(covered, (part[2] - part[0], part[3] - part[1]))
    else:
        ratio = max(found[0] / covered[0], found[1] / covered[1])
        size = max(1, round(found[0] / ratio)), max(1, round(found[1] / ratio))
    left, top = _start(size[0], width), _start(size[1], height)
    return Placement(part, size, (left, top, left + width, top + height))


def _cover(covered: tuple[int, int], found: tuple[int, int]) -> tuple[int, int]:
    """The smallest size of the image's form that covers this width and height; as torchvision rounds it."""
    if covered[1] * found[0] >= covered[0] * found[1]:
        return int(covered[1] * found[0] / found[1]), covered[1]
    return covered[0], int(covered[0] * found[1] / found[0])


def _start(side: int, wanted: int) -> int:
    """Where the middle begins; below 0 where the image is smaller. As torchvision and timm round it."""
    return round((side - wanted) / 2) if side >= wanted else -((wanted - side) // 2)


def _middle(width: int, height: int) -> Box:
    """The box of an image without the far ends of a strip."""
    longest = _LONGEST * min(width, height)
    left, top = ((side - min(side, longest)) // 2 for side in (width, height))
    return left, top, left + min(width, longest), top + min(height, longest)
