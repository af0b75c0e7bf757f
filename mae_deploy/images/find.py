"""Which files below a folder are images."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mae_deploy.errors import ConfigError
from mae_deploy.images.read import NUMPY_SUFFIX

if TYPE_CHECKING:  # imported where it is used: a device that is given normalised arrays needs no Pillow
    pass
from mae_deploy.images.read import _formats


def find_images(root: Path) -> list[Path]:
    """All image files at or below `root`, or all `.npy` files where there is no image, in a stable order; hidden files
    and folders are left out.

    Raises:
        ConfigError: nothing is there.
    """
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise ConfigError(f"no such file or folder: {root}")
    known = _image_suffixes()
    files = sorted(_walk(root), key=lambda path: path.relative_to(root).as_posix())
    # Beside images, .npy files are labels, masks or features; where there is nothing else, they are the images.
    found = [path for path in files if path.suffix.lower() in known] or [
        path for path in files if path.suffix.lower() == NUMPY_SUFFIX
    ]
    if not found:
        raise ConfigError(
            f"no images below {root}",
            hint="any format that Pillow reads, TIFF, or .npy arrays (H, W, C), in any tree of folders",
        )
    return found


def _walk(root: Path) -> Iterator[Path]:
    entered: set[tuple[int, int]] = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        # A link may lead to a folder that was walked already, or back up: each is entered once.
        here = os.stat(folder)
        if (here.st_dev, here.st_ino) in entered:
            folders.clear()
            continue
        entered.add((here.st_dev, here.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(folder) / name for name in files if not name.startswith("."))


def is_image_name(name: str) -> bool:
    """Whether a file of this name is an image by its suffix."""
    suffix = os.path.splitext(name)[1].lower()
    return suffix == NUMPY_SUFFIX or suffix in _image_suffixes()


@functools.cache
def _image_suffixes() -> frozenset[str]:
    from PIL import Image

    formats = _formats()
    return frozenset(suffix for suffix, name in Image.EXTENSION.items() if name in formats)
