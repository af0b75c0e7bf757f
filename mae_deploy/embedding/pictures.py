"""The images behind features, as the network saw them, and a picture of several."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mae_deploy.data.config import Columns
from mae_deploy.embedding.images import Indexed, Videos, open_collection
from mae_deploy.errors import ConfigError, MaeDeployError
from mae_deploy.files import atomic_path
from mae_deploy.images.read import Array, UnreadableImage
from mae_deploy.runtime.manifest import read_preprocess

CELL, _LINE, _GAP = 144, 15, 8
"""Pixels of a picture's side, of a line of text, and between pictures."""

_MARK = (213, 94, 0)


@dataclass(frozen=True, slots=True)
class Cell:
    """A picture with lines of text below it."""

    image: Image.Image | None
    """None: it cannot be shown."""
    text: tuple[str, ...]
    marked: bool = False


class Pictures:
    """Images of a collection by their ids."""

    def __init__(self, about: dict[str, Any], data: str | None) -> None:
        """Open the collection that features were made of.

        Args:
            about: what the features' files say.
            data: where it is now; None: where it was.

        Raises:
            ConfigError: it is not there, is another one, or can only be read from front to back.
        """
        job = about["job"]
        self._spec = read_preprocess(about["bundle"]["preprocess"])
        found = open_collection(
            data or placed(job["data"], about["folder"]),
            Columns(image=job["image_column"]),
            every=job["every"],
            shard_images=job["shard_images"],
        )
        if isinstance(found, Indexed) and found.fingerprint() != job["fingerprint"]:
            raise ConfigError(f"{found.name} has changed since it was embedded", hint="say with --data where it is")
        if not isinstance(found, Indexed | Videos):
            raise ConfigError(f"{found.name} can only be read from front to back")
        self._images = found

    def __call__(self, id: int) -> Image.Image | None:
        """The image's crop; None where it cannot be read any more."""
        try:
            item = self._images.item(id) if isinstance(self._images, Indexed) else self._images.frame(id)
            return self.cropped(item.read(self._spec))
        except (UnreadableImage, MaeDeployError, StopIteration):
            return None

    def cropped(self, image: Any) -> Image.Image:
        """What the network sees of an image, in colours that can be shown."""
        pixels = self._spec.crop(image)
        if pixels.dtype != np.uint8:
            pixels = np.clip(pixels / self._spec.divisor * 255, 0, 255).astype(np.uint8)
        return Image.fromarray(np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else _three(pixels))


def _three(pixels: Array) -> Array:
    """Three channels: the first ones, and a black one where there are two."""
    shown: Array = np.zeros((*pixels.shape[:2], 3), np.uint8)
    shown[:, :, : min(3, pixels.shape[2])] = pixels[:, :, :3]
    return shown


def placed(name: str, folder: str) -> str:
    """A name as it was meant in a folder; that of a URL or a command is itself."""
    return name if "://" in name or name.startswith("pipe:") else os.path.normpath(os.path.join(folder, name))


def write_grid(path: Path, rows: Sequence[Sequence[Cell]]) -> None:
    """A PNG of rows of pictures, each with its text."""
    lines = max(len(cell.text) for row in rows for cell in row)
    width, height = CELL + _GAP, CELL + _LINE * lines + 2 * _GAP
    page = Image.new("RGB", (max(map(len, rows)) * width + _GAP, len(rows) * height + _GAP), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=11)
    for number, row in enumerate(rows):
        for place, cell in enumerate(row):
            left, top = _GAP + place * width, _GAP + number * height
            if cell.image is not None:
                scale = CELL / max(cell.image.size)
                size = max(1, round(cell.image.width * scale)), max(1, round(cell.image.height * scale))
                method = Image.Resampling.NEAREST if scale > 2 else Image.Resampling.BICUBIC
                page.paste(cell.image.resize(size, method), (left, top))
            else:
                draw.rectangle((left, top, left + CELL - 1, top + CELL - 1), fill=(238, 238, 238))
            if cell.marked:
                draw.rectangle((left - 3, top - 3, left + CELL + 2, top + CELL + 2), outline=_MARK, width=3)
            for line, text in enumerate(cell.text):
                draw.text((left, top + CELL + 3 + line * _LINE), _cut(text, font), font=font, fill="black")
    with atomic_path(path) as aside:
        page.save(aside, "PNG")


def _cut(text: str, font: Any) -> str:
    """The end of a text that is too long says more than its beginning."""
    if font.getlength(text) <= CELL:
        return text
    while text and font.getlength(f"…{text}") > CELL:
        text = text[1:]
    return f"…{text}"
