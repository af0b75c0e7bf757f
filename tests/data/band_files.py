"""Five-band images of 16 bits on disk, as TIFF and as NumPy files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from mae_deploy.images.read import Array

BANDS = 5
PIXEL_MAX = 10000
SIZE = (17, 13)
"""Height and width of the stored images."""


def bands_image(seed: int, *, low: int = 0, high: int = PIXEL_MAX) -> Array:
    """uint16 `(17, 13, 5)`, in squares of 4 pixels with some noise."""
    rng = np.random.default_rng(seed)
    squares = rng.integers(low, high, (5, 4, BANDS)).repeat(4, axis=0).repeat(4, axis=1)[: SIZE[0], : SIZE[1]]
    image: Array = (squares + rng.integers(0, 200, (*SIZE, BANDS))).astype(np.uint16)
    return image


def write_tiff(path: Path, pixels: Array, **options: Any) -> Path:
    """`(H, W, C)` as it stands, the bands of a pixel side by side."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, pixels, **{"photometric": "minisblack", "planarconfig": "contig", **options})
    return path


def write_npy(path: Path, pixels: Array) -> Path:
    """`(H, W, C)` as it stands."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, pixels)
    return path


def write_scenes(folder: Path, count: int) -> Path:
    """`NN.tif`."""
    for number in range(count):
        write_tiff(folder / f"{number:02d}.tif", bands_image(number))
    return folder


def write_band_classes(root: Path, *, train: int = 6, val: int = 3) -> Path:
    """`train/` and `val/` with a dark and a light class of `.npy` files."""
    for split, count, first in (("train", train, 0), ("val", val, train)):
        for number in range(first, first + count):
            write_npy(root / split / "dark" / f"{number:02d}.npy", bands_image(number, high=2000))
            write_npy(root / split / "light" / f"{number:02d}.npy", bands_image(number, low=7000))
    return root
