"""Which files below a folder are images, and what else is there."""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mae_deploy.errors import ConfigError
from mae_deploy.images.arrays import NUMPY_SUFFIX
from mae_deploy.images.left_out import LeftOut
from mae_deploy.images.names import described, expand
from mae_deploy.images.read import formats
from mae_deploy.progress import notice

ARCHIVE_SUFFIX = ".tar"

_ALLOW = "allow it, or move it out of the data"

TABLE_SUFFIXES = (".parquet", ".arrow")

_READ_BY = {**dict.fromkeys((".heic", ".heif", ".hif"), "pillow-heif"), ".avif": "--upgrade pillow"}
"""What reads formats that not every Pillow does."""

_FORMATS = "any format that Pillow reads, TIFF, or .npy arrays (H, W, C), in any tree of folders"

_OUTPUTS = (
    ({"config.yaml", "environment.json"}, "run folders of mae-deploy"),
    ({"manifest.json", "golden.npz"}, "bundles of mae-deploy"),
    ({"sweep.yaml", "sweep.json"}, "sweeps of mae-deploy"),
    ({"compare.json", "compare.md"}, "comparisons of mae-deploy"),
    ({"report.json", "report.md"}, "reports of mae-deploy"),
    ({"_embed.json"}, "features of mae-deploy"),
)
"""Files by which a folder that we wrote is known."""


@dataclass(slots=True)
class Found:
    """The regular files below a folder by what they are, each list in a stable order."""

    images: list[Path] = field(default_factory=list)
    arrays: list[Path] = field(default_factory=list)
    """NumPy files: beside images labels, masks or features; where there is nothing else, the images."""
    archives: list[Path] = field(default_factory=list)
    """Tar files."""
    tables: list[Path] = field(default_factory=list)
    """Parquet and Arrow files."""
    left_out: LeftOut = field(default_factory=LeftOut)


def find_images(*names: Path, say: bool = True) -> list[Path]:
    """All image files that are named, in a stable order: files, folders, patterns or lists (see `names.expand`). Of a
    folder, the images below it, or all `.npy` files where there is no image.

    Args:
        say: print what was found, and what was left out.

    Raises:
        ConfigError: one of them is not there, or a folder has no image.
    """
    images: list[Path] = []
    left_out = LeftOut()
    for named in expand(names):
        if named.path.is_dir():
            below = survey(named.path)
            if named.matched and not (below.images or below.arrays):
                left_out.add("folders without images", str(named.path))
                continue
            found = images_only(below, named.path)
            images += found.images
            left_out.merge(found.left_out)
        elif named.matched and not is_image_file(named.path):
            left_out.add(reason_by_suffix(named.path.name), str(named.path))
        elif named.path.exists() and not named.path.is_file():
            raise ConfigError(f"{named.path} is neither a file nor a folder")
        else:
            images.append(named.path)
    if not images:
        raise ConfigError(f"no images in {described(names)}; there are: {left_out}", hint=_FORMATS)
    if say:
        rest = f"; left out: {left_out}" if left_out else ""
        notice("data:", f"{described(names)}: {len(images)} image{'s' * (len(images) != 1)}{rest}")
    return images


def survey(root: Path) -> Found:
    """What is below a folder. Hidden files and folders are left out, and those that this program wrote: run folders,
    bundles.

    Raises:
        ConfigError: no such folder, or one below it that cannot be read.
    """
    if not root.is_dir():
        raise ConfigError(
            f"{root} is neither a file nor a folder" if root.exists() else f"no such file or folder: {root}"
        )
    found = Found()
    known = image_suffixes()
    for path in sorted(_walk(root, found.left_out), key=lambda path: path.relative_to(root).as_posix()):
        suffix = path.suffix.lower()
        if suffix in known:
            found.images.append(path)
        elif suffix == NUMPY_SUFFIX:
            found.arrays.append(path)
        elif suffix == ARCHIVE_SUFFIX:
            found.archives.append(path)
        elif suffix in TABLE_SUFFIXES:
            found.tables.append(path)
        elif not suffix and _holds_image(path):
            found.images.append(path)
        else:
            found.left_out.add(reason_by_suffix(path.name), str(path.relative_to(root)))
    return found


@contextlib.contextmanager
def permissions_said() -> Iterator[None]:
    """What may not be read is an error that names the folder, not one that finds nothing in it; a decorator, too.

    Raises:
        ConfigError: in the place of PermissionError.
    """
    try:
        yield
    except PermissionError as error:
        path = Path(error.filename)
        folder = next(place for place in (path, *path.parents) if os.path.isdir(place))
        raise ConfigError(
            f"cannot read the folder {folder}: {error.strerror}", hint="allow it, or move it out of the data"
        ) from error


def output_of_ours(names: set[str]) -> str | None:
    """What a folder with files of these names is, where this program wrote it."""
    return next((what for marks, what in _OUTPUTS if marks <= names), None)


def images_only(found: Found, root: Path) -> Found:
    """What was found, with the images alone as such, and the rest counted as left out.

    Raises:
        ConfigError: no image.
    """
    rest = [*found.archives, *found.tables]
    if found.images:
        rest += found.arrays
    for path in rest:
        found.left_out.add(path.suffix.lower(), str(path.relative_to(root)))
    images = found.images or found.arrays
    if not images:
        raise ConfigError(
            f"no images below {root}" + (f"; there are: {found.left_out}" if found.left_out else ""),
            hint=_FORMATS,
        )
    return Found(images, left_out=found.left_out)


def is_image_name(name: str) -> bool:
    """Whether a file of this name is an image by its suffix."""
    suffix = os.path.splitext(name)[1].lower()
    return suffix == NUMPY_SUFFIX or suffix in image_suffixes()


def is_image_file(path: Path) -> bool:
    """Whether a file is an image by its suffix or, without one, by its first bytes."""
    return is_image_name(path.name) or (not path.suffix and _holds_image(path))


def reason_by_suffix(name: str) -> str:
    """Why a file of this name is no image that can be read here."""
    suffix = os.path.splitext(name)[1].lower()
    if (package := _READ_BY.get(suffix)) is not None:
        return f"{suffix} (pip install {package})"
    return suffix or "without a suffix"


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Suffixes in lower case that Pillow reads here."""
    from PIL import Image

    known = {*formats(), "MPO"}  # which Pillow opens as a JPEG
    return frozenset(suffix for suffix, name in Image.EXTENSION.items() if name in known)


def _holds_image(path: Path) -> bool:
    """Whether Pillow knows a file by its first bytes."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Image.open(path, formats=formats()).close()
    except Exception:  # as in `read_image`: on files that are no images, Pillow's plug-ins raise nearly anything
        return False
    return True


def _walk(root: Path, left_out: LeftOut) -> Iterator[Path]:
    """Files, and links that lead nowhere, which whoever reads them reports."""
    entered: set[tuple[int, int]] = set()
    folders = [root]
    while folders:
        folder = folders.pop()
        try:
            here = os.stat(folder)
            with os.scandir(folder) as scan:
                entries = sorted(scan, key=lambda entry: entry.name)
        except OSError as error:
            raise ConfigError(
                f"cannot read the folder {folder}: {error.strerror}", hint="allow it, or move it out of the data"
            ) from error
        # A link may lead to a folder that was walked already, or back up: each is entered once.
        if (here.st_dev, here.st_ino) in entered:
            continue
        entered.add((here.st_dev, here.st_ino))
        if folder != root and (ours := output_of_ours({entry.name for entry in entries})) is not None:
            left_out.add(ours, str(folder.relative_to(root)))
            continue
        below = []
        for entry in entries:
            path = folder / entry.name
            if entry.name.startswith("."):
                if is_image_name(entry.name):
                    left_out.add("hidden images", str(path.relative_to(root)))
            elif _is(entry, "dir"):
                below.append(path)
            elif _is(entry, "file") or (entry.is_symlink() and not path.exists()):
                yield path
            else:  # reading a pipe would wait for ever
                left_out.add("pipes, sockets or devices", str(path.relative_to(root)))
        folders += reversed(below)


def _is(entry: os.DirEntry[str], kind: str) -> bool:
    try:
        return entry.is_dir() if kind == "dir" else entry.is_file()
    except OSError:  # a link that leads to itself
        return False
