"""What kind of data set a name stands for: folders, tar shards, or a Hugging Face data set on disk. Where it may be two
of them, nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mae_deploy.data.config import Columns
from mae_deploy.data.sources.base import ImageSource
from mae_deploy.data.sources.files import class_folders, folder_hint, image_files, labelled_files
from mae_deploy.data.sources.patterns import files_of, is_shards, is_streamed, shards_in
from mae_deploy.data.sources.shards import ShardSource, shard_images
from mae_deploy.data.sources.tables import TableSource, find_tables, name_files
from mae_deploy.errors import ConfigError
from mae_deploy.images.find import Found, permissions_said, survey

_USUAL = Columns()

_SPLITS = {"train": ("train", "training"), "val": ("val", "validation", "valid"), "test": ("test", "testing")}
"""Names of a split, the usual one first."""


@permissions_said()
def unlabelled_images(data: Path | str, columns: Columns = _USUAL) -> ImageSource:
    """Every image of a folder, of local shards (a folder of them, or a pattern), or of a Hugging Face data set on disk.

    Raises:
        ConfigError: there is none, or a folder holds two kinds.
    """
    if is_streamed(str(data)):
        raise ConfigError(
            f"{data} can only be read from front to back, which only pretraining does",
            hint="download the shards, or unpack the compressed tar",
        )
    path = Path(data)
    if not path.is_dir():
        if is_shards(str(data)):
            return shard_images(str(data))
        if tables := find_tables(path):
            return TableSource(str(data), tables, columns)
        return image_files(path)
    tables, found = find_tables(path), survey(path)
    _check_one_kind(path, found, columns)
    if found.archives:
        # Those below are for folders of splits: beside shards, they are another data set.
        direct = shards_in(path)
        for deeper in found.archives if direct else ():
            if deeper.parent != path:
                found.left_out.add(".tar below", str(deeper.relative_to(path)))
        source: ShardSource | TableSource = ShardSource(str(data), direct or found.archives)
    elif tables := tables or [table for table in found.tables if table.suffix.lower() == ".parquet"]:
        source = TableSource(str(data), tables, columns)
    else:
        return image_files(path, found)
    source.left_out.merge(found.left_out)
    return source


@permissions_said()
def labelled_images(
    root: Path | str,
    split: str,
    class_names: tuple[str, ...] | None = None,
    columns: Columns = _USUAL,
    *,
    exact: bool = False,
) -> ImageSource:
    """The labelled images of a split: `root/split/<class>/…`, shards in `root/split/` or `root/split-*.tar`, or a
    Hugging Face data set.

    Args:
        exact: `val` is called so, and neither validation nor valid.
        class_names: the classes in the order of the labels; default: the data's own order, of folders the alphabetical
            one.

    Raises:
        ConfigError: no such split or two of them, no labels, or a class that is not among `class_names`.
    """
    root = Path(root)
    if not root.is_dir():
        raise ConfigError(
            f"{root} is {'a file' if root.exists() else 'not there'}; labelled data is a folder with train and val",
            hint=folder_hint(root) if root.exists() else None,
        )
    places = _places(root, (split,) if exact else _names(split), class_names, columns)
    if not places:
        there = ", ".join(_entries(root)) or "nothing"
        raise ConfigError(f"no {split} in {root}, where there is: {there}", hint=_hint(root, split))
    if len(places) > 1:
        raise ConfigError(
            f"{root} holds its {split} twice: {' and '.join(place.describe() for place in places)}",
            hint="move one of them away",
        )
    return places[0].open()


@permissions_said()
def labelled_val(data: Path, class_names: tuple[str, ...] | None, split: str | None = None) -> ImageSource:
    """The images of the split of that name, by default of DATA/val if there is a val, else of DATA itself, which may be
    a single table or tar file, too; labels in the order of the names, where there are any.
    """
    if split is not None:
        return labelled_images(data, split, class_names, exact=True)
    data = data if data.name else data.resolve()
    if data.is_dir() and data.name not in _SPLITS["val"] and (has_split(data, "val") or has_split(data, "train")):
        return labelled_images(data, "val", class_names)
    return labelled_whole(data, class_names)


@permissions_said()
def labelled_whole(data: Path, class_names: tuple[str, ...] | None = None, columns: Columns = _USUAL) -> ImageSource:
    """All images of a folder of classes, shards or tables, or of a single table or tar file."""
    if tables := find_tables(data) if data.is_file() else []:
        return TableSource(str(data), tables, columns, labelled=True, class_names=class_names)
    if data.is_file() and is_shards(str(data)):
        return shard_images(str(data), labelled=True, class_names=class_names)
    if not data.is_dir():
        return labelled_images(data, "val", class_names)  # which says what is wrong
    data = data if data.name else data.resolve()
    return labelled_images(data.parent, data.name, class_names, columns, exact=True)


@permissions_said()
def split_names(root: Path | str) -> list[str]:
    """The splits of a labelled data set: those of train, val and test that are there; none where it has no train."""
    names = [name for name in ("train", "val", "test") if has_split(root, name)]
    return names if "train" in names else []


@permissions_said()
def has_split(root: Path | str, split: str) -> bool:
    """Whether there is anything by a split's name."""
    root = Path(root)
    return any((root / name).is_dir() or _files(root, name) for name in _names(split))


@permissions_said()
def beside_splits(root: Path | str, splits: Iterable[str]) -> list[str]:
    """Folders, shards and tables in the folder of a labelled data set that are of none of these splits."""
    root = Path(root)
    used = {path for split in splits for name in _names(split) for path in (root / name, *_files(root, name))}
    used |= {path.parent for path in used} - {root.parent}
    tables = [table for folder in (root, root / "data") for table in files_of(folder, ".parquet")]
    beside = [*class_folders(root), *shards_in(root), *tables] if root.is_dir() else []
    return sorted(str(path.relative_to(root)) for path in beside if path not in used)


# --- kinds -----------------------------------------------------------------------------------------------------------


def _check_one_kind(path: Path, found: Found, columns: Columns) -> None:
    direct = any(file.parent == path for file in (*found.archives, *found.tables))
    images = found.images or ([] if direct else found.arrays)
    if images and found.tables and not found.archives and name_files(found.tables, columns):
        return  # the images are the table's
    kinds = {"image": images, "tar archive": found.archives, "table": found.tables}
    there = [f"{_count(len(files), kind)} ({files[0].relative_to(path)}, …)" for kind, files in kinds.items() if files]
    if len(there) > 1:
        raise ConfigError(
            f"{path} holds two kinds of data: {' and '.join(there)}",
            hint=f"give the folder of one of them, a pattern such as '{path}/*.tar', or move the other away",
        )


@dataclass(frozen=True, slots=True)
class _Place:
    """One way in which a split may be stored, and what is there."""

    path: str
    kind: str
    count: Callable[[], int]
    open: Callable[[], ImageSource]

    def describe(self) -> str:
        return f"{_count(self.count(), self.kind)} in {self.path}"


def _places(root: Path, names: Sequence[str], class_names: tuple[str, ...] | None, columns: Columns) -> list[_Place]:
    found: list[_Place] = []
    source: Callable[[], ImageSource]
    for name in names:
        folder = root / name
        for where, shards in ((folder, shards_in(folder)), (root / f"{name}-*.tar", _files(root, name, ".tar"))):
            if shards:
                source = partial(ShardSource, str(folder), shards, labelled=True, class_names=class_names)
                found.append(_Place(str(where), "tar archive", partial(len, shards), source))
        for where, tables in (
            (folder, find_tables(folder)),
            (root / f"{name}-*.parquet", _files(root, name, ".parquet")),
        ):
            if tables:
                source = partial(TableSource, str(folder), tables, columns, labelled=True, class_names=class_names)
                found.append(_Place(str(where), "table", partial(len, tables), source))
        classes = class_folders(folder) if folder.is_dir() else []
        if classes or (folder.is_dir() and not found):
            files = partial(labelled_files, folder, class_names)
            found.append(_Place(f"the folders of {folder}", "image", partial(_images_in, classes), files))
    # A folder beside shards or tables counts where it holds images.
    return found if len(found) < 2 else [place for place in found if place.count() > 0]


def _images_in(folders: list[Path]) -> int:
    return sum(len(survey(folder).images) for folder in folders)


def _files(root: Path, name: str, *suffixes: str) -> list[Path]:
    """Shards and tables of a split that lie beside one another, `train.tar`, `train-0.tar`, or as on the Hugging Face
    hub, `data/train-00000-of-00001.parquet`.
    """
    found = {".tar": ("",), ".parquet": ("", "data/")}
    return sorted(
        path
        for suffix in suffixes or tuple(found)
        for folder in found[suffix]
        for path in files_of(root / folder, suffix)
        if path.stem == name or path.stem.startswith(f"{name}-")
    )


def _names(split: str) -> tuple[str, ...]:
    return _SPLITS.get(split, (split,))


def _entries(root: Path) -> list[str]:
    tables = files_of(root / "data", ".parquet")
    found = sorted(root.iterdir(), key=lambda path: (not path.is_dir(), path.name))
    found = [path for path in found if path.name != "data" or not tables]
    shown = [f"{path.name}/" if path.is_dir() else path.name for path in found if not path.name.startswith(".")]
    shown[:0] = [f"data/{path.name}" for path in tables]
    return [*shown[:12], *(["…"] if len(shown) > 12 else [])]


def _hint(root: Path, split: str) -> str:
    if below := [folder for folder in class_folders(root) if has_split(folder, split)]:
        return f"there is a {split} in {below[0]}: give that folder"
    if split == "train":
        return "labelled data is DATA/train/<class>/… and DATA/val/<class>/…; for DATA/<class>/…, give --val-share 0.1"
    return "name it with --val-split, or hold out images of train with --val-share 0.1"


def _count(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"
