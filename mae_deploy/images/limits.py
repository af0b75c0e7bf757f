"""How many pixels an image may have: a small file can hold enough to fill the memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

MOST_PIXELS = 2 * 89_478_485
"""Where nobody says otherwise; Pillow's own limit."""

_VARIABLE = "MAE_DEPLOY_MAX_PIXELS"


class TooManyPixels(ValueError):
    """An image has more pixels than are read."""


def most_pixels() -> int:
    """Width times height of the largest image that is read."""
    return given_limit() or MOST_PIXELS


def given_limit() -> int | None:
    """What the user says; None: nothing."""
    return int(os.environ[_VARIABLE]) if _VARIABLE in os.environ else None


@contextlib.contextmanager
def pixels_at_most(number: int | None) -> Iterator[None]:
    """Within it, another limit, for this process and those that it starts; None: as it is."""
    before = os.environ.get(_VARIABLE)
    if number is not None:
        os.environ[_VARIABLE] = str(number)
    try:
        yield
    finally:
        if before is not None:
            os.environ[_VARIABLE] = before
        elif number is not None:
            del os.environ[_VARIABLE]


def check_size(width: int, height: int) -> None:
    """Whether an image of this size is read.

    Raises:
        TooManyPixels: it has too many.
    """
    if width * height > (limit := most_pixels()):
        raise TooManyPixels(
            f"{width}x{height} are {width * height} pixels, more than {limit}: --max-pixels {width * height} reads it"
        )
