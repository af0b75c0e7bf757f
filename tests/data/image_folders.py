"""Small images on disk: noise, classes that anybody can tell apart, and files that are broken."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (17, 13)
"""Height and width of the stored images."""


def write_noise(folder: Path, count: int, *, first: int = 0, low: int = 0, high: int = 256) -> None:
    """`NN.png` from number `first` on, each of its own noise between two grey levels."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        pixels = np.random.default_rng(number).integers(low, high, (*SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")


def write_classes(root: Path, *, train: int = 6, val: int = 3) -> Path:
    """`train/` and `val/` with a dark and a light class."""
    for split, count, first in (("train", train, 0), ("val", val, train)):
        write_noise(root / split / "dark", count, first=first, high=60)
        write_noise(root / split / "light", count, first=first, low=200)
    return root


def spoil(path: Path) -> Path:
    """Cut a file in half."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path
