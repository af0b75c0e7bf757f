"""Images as files: a folder in any tree, or a labelled one with a folder a class."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mae_deploy.data.decode import Shrink, decode
from mae_deploy.data.sources.base import UNLABELLED, read_file
from mae_deploy.errors import ConfigError
from mae_deploy.images.find import find_images
from mae_deploy.images.read import Array, read_image


@dataclass(frozen=True, slots=True)
class ImageList:
    """Image files with their labels, in a stable order."""

    root: Path
    paths: tuple[Path, ...]
    labels: tuple[int, ...]
    class_names: tuple[str, ...] | None = None

    @property
    def name(self) -> str:
        """The folder."""
        return str(self.root)

    def __len__(self) -> int:
        """Number of files."""
        return len(self.paths)

    def key(self, index: int) -> str:
        """The file."""
        return str(self.paths[index])

    def raw(self, index: int) -> bytes:
        """The file's bytes."""
        return read_file(self.paths[index])

    def read(
        self, index: int, channels: int, pixel_max: float | None = None, shrink: Shrink | None = None
    ) -> Image.Image | Array:
        """Decode one file."""
        return (
            read_image(self.paths[index], channels, pixel_max)
            if shrink is None
            else decode(self.key(index), self.raw(index), channels, pixel_max, shrink)
        )

    def fingerprint(self) -> dict[str, int | str]:
        """Number of files and a hash of their names, sizes and labels: tells two data sets apart without reading
        them.
        """
        digest = hashlib.sha256()
        for path, label in zip(self.paths, self.labels, strict=True):
            size = path.stat().st_size if path.exists() else -1  # a broken link: whoever reads it reports it
            digest.update(b"%b\0%d\0%d\n" % (os.fsencode(path.relative_to(self.root).as_posix()), size, label))
        return {"images": len(self.paths), "sha256": digest.hexdigest()}


def image_files(root: Path) -> ImageList:
    """Every image at or below a folder.

    Raises:
        ConfigError: there is none.
    """
    paths = find_images(root)
    return ImageList(root.parent if root.is_file() else root, tuple(paths), (UNLABELLED,) * len(paths))


def labelled_files(folder: Path, class_names: tuple[str, ...] | None = None) -> ImageList:
    """The images of `folder/<class>/…`, classes in alphabetical order or in that of `class_names`.

    Raises:
        ConfigError: no such folder, no classes, or a class that is not among `class_names`.
    """
    found = (
        sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        if folder.is_dir()
        else []
    )
    if not found:
        raise ConfigError(
            f"no class folders in {folder}", hint="labelled data is DATA/train/<class>/… and DATA/val/<class>/…"
        )
    names = class_names or tuple(found)
    if unknown := [name for name in found if name not in names]:
        raise ConfigError(
            f"{folder / unknown[0]} is not one of the {len(names)} classes:"
            f" {', '.join(names[:8])}{' …' if len(names) > 8 else ''}"
        )
    paths: list[Path] = []
    labels: list[int] = []
    for name in found:
        images = find_images(folder / name)
        paths += images
        labels += [names.index(name)] * len(images)
    return ImageList(folder, tuple(paths), tuple(labels), names)
