"""How many pixels an image may have: a small file can hold enough to fill the memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from mae_deploy.errors import ConfigError
from mae_deploy.text import as_size, is_count

MOST_PIXELS = 2 * 89_478_485
"""Where nobody says otherwise; Pillow's own limit."""

_BYTES = 8
"""Of a file, for each of these pixels: four channels of 16 bits."""

_VARIABLE = "MAE_DEPLOY_MAX_PIXELS"


class TooManyPixels(ValueError):
    """An image has more pixels than are read."""


def most_pixels() -> int:
    """Width times height of the largest image that is read."""
    return given_limit() or MOST_PIXELS


def given_limit() -> int | None:
    """What the user says; None: nothing.

    Raises:
        ConfigError: it is no number.
    """
    text = os.environ.get(_VARIABLE)
    if text is not None and not (text.isascii() and is_count(text)):
        raise ConfigError(f"{_VARIABLE}={text:.80} in the environment is no number of pixels", hint="such as 50000000")
    return None if text is None else int(text)


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


def check_bytes(size: int) -> None:
    """Whether an image file, or the array in it, of so many bytes is read.

    Raises:
        TooManyPixels: it is too large, whatever its width and height are said to be.
    """
    if size > (limit := _BYTES * most_pixels()):
        raise TooManyPixels(
            f"{as_size(size)} are more than {as_size(limit)}: --max-pixels {-(-size // _BYTES)} reads it"
        )
