"""Images as files: a folder in any tree, or a labelled one with a folder a class."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from mae_deploy.data.decode import Shrink, decode
from mae_deploy.data.sources.base import (
    UNLABELLED,
    check_classes,
    class_key,
    class_positions,
    distinct_classes,
    read_file,
)
from mae_deploy.errors import ConfigError
from mae_deploy.images.find import Found, images_only, is_image_name, output_of_ours, reason_by_suffix, survey
from mae_deploy.images.left_out import LeftOut
from mae_deploy.images.read import Array, read_image

_PACKED = (".zip", ".rar", ".7z", ".gz", ".tgz", ".bz2", ".xz", ".zst")


@dataclass(frozen=True, slots=True)
class ImageList:
    """Image files with their labels, in a stable order."""

    root: Path
    paths: tuple[Path, ...]
    labels: tuple[int, ...]
    class_names: tuple[str, ...] | None = None
    left_out: LeftOut = field(default_factory=LeftOut, compare=False)

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


def image_files(root: Path, found: Found | None = None) -> ImageList:
    """Every image at or below a folder.

    Args:
        found: what is there, where it is known.

    Raises:
        ConfigError: there is none, or the file is none by its suffix.
    """
    if root.is_file():
        if not is_image_name(root.name):
            raise ConfigError(
                f"{root} is no image, no tar file and no table: {reason_by_suffix(root.name)}", hint=folder_hint(root)
            )
        return ImageList(root.parent, (root,), (UNLABELLED,))
    only = images_only(found or survey(root), root)
    return ImageList(root, tuple(only.images), (UNLABELLED,) * len(only.images), left_out=only.left_out)


def labelled_files(folder: Path, class_names: tuple[str, ...] | None = None) -> ImageList:
    """The images of `folder/<class>/…`, classes in alphabetical order or in that of `class_names`. A class without
    images is left out.

    Raises:
        ConfigError: no classes, or one that is not among `class_names`.
    """
    left_out, classes = LeftOut(), dict[str, list[Path]]()
    for loose in sorted(path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")):
        left_out.add("images in no class folder" if is_image_name(loose) else reason_by_suffix(loose), loose)
    first: dict[Path, Path] = {}
    for path in class_folders(folder):
        if folder.resolve().is_relative_to(path.resolve()):
            left_out.add("links to folders above", path.name)
            continue
        if (other := first.setdefault(path.resolve(), path)) is not path:
            raise ConfigError(f"{other} and {path} are the same folder, but two classes", hint="remove the link")
        found = survey(path)
        classes[path.name] = found.images or found.arrays
        for rest in (*found.archives, *found.tables, *(found.arrays if found.images else ())):
            found.left_out.add(rest.suffix.lower(), str(rest.relative_to(folder)))
        left_out.merge(found.left_out)
        if not classes[path.name]:
            left_out.add("class folders without images", path.name)
            del classes[path.name]
    if not classes:
        raise ConfigError(
            f"no class folders with images in {folder}" + (f"; there are: {left_out}" if left_out else ""),
            hint="labelled data is DATA/train/<class>/… and DATA/val/<class>/…",
        )
    if class_names is not None:
        check_classes(classes, class_names, lambda name: str(folder / name))
    names = class_names or distinct_classes(classes)
    place = class_positions(names)
    paths = [path for images in classes.values() for path in images]
    labels = [place[class_key(name)] for name, images in classes.items() for _ in images]
    return ImageList(folder, tuple(paths), tuple(labels), names, left_out)


def folder_hint(file: Path) -> str:
    """What to do with a file that was given in place of a folder."""
    return "unpack it, and give the folder" if file.suffix.lower() in _PACKED else "give the folder of images"


def class_folders(folder: Path) -> list[Path]:
    """The folders in a folder in alphabetical order, without hidden ones and those that this program wrote."""
    found = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return [path for path in found if output_of_ours({entry.name for entry in path.iterdir()}) is None]
