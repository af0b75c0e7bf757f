"""What kind of data set a name stands for: folders, tar shards, or a Hugging Face data set on disk."""

from __future__ import annotations

from pathlib import Path

from mae_deploy.data.config import Columns
from mae_deploy.data.sources.base import ImageSource
from mae_deploy.data.sources.files import image_files, labelled_files
from mae_deploy.data.sources.patterns import is_shards, is_streamed, shards_in
from mae_deploy.data.sources.shards import ShardSource, shard_images
from mae_deploy.data.sources.tables import TableSource, find_tables
from mae_deploy.errors import ConfigError

_USUAL = Columns()

_SPLITS = {"val": ("val", "validation")}
"""Other names for a split."""


def unlabelled_images(data: Path | str, columns: Columns = _USUAL) -> ImageSource:
    """Every image of a folder, of local shards (a folder of them, or a pattern), or of a Hugging Face data set on disk.

    Raises:
        ConfigError: there is none.
    """
    if is_streamed(str(data)):
        raise ConfigError(
            f"{data} can only be read from front to back, which only pretraining does",
            hint="download the shards, or unpack the compressed tar",
        )
    if is_shards(str(data)):
        return shard_images(str(data))
    if tables := find_tables(Path(data)):
        return TableSource(str(data), tables, columns)
    try:
        return image_files(Path(data))
    except ConfigError:
        if shards := shards_in(Path(data), "**/*.tar"):
            return ShardSource(str(data), shards)
        raise


def labelled_images(
    root: Path | str, split: str, class_names: tuple[str, ...] | None = None, columns: Columns = _USUAL
) -> ImageSource:
    """The labelled images of a split: `root/split/<class>/…`, shards in `root/split/` or `root/split-*.tar`, or a
    Hugging Face data set.

    Args:
        class_names: the classes in the order of the labels; default: the data's own order, of folders the alphabetical
            one.

    Raises:
        ConfigError: no such split, no labels, or a class that is not among `class_names`.
    """
    root = Path(root)
    for name in _SPLITS.get(split, (split,)):
        if shards := shards_in(root / name) or shards_in(root, f"{name}-*.tar"):
            return ShardSource(str(root / name), shards, labelled=True, class_names=class_names)
        if tables := find_tables(root / name) or sorted(
            [*root.glob(f"{name}-*.parquet"), *root.glob(f"data/{name}-*.parquet")]
        ):
            return TableSource(str(root / name), tables, columns, labelled=True, class_names=class_names)
        if (root / name).is_dir():
            return labelled_files(root / name, class_names)
    return labelled_files(root / split, class_names)


def split_names(root: Path | str) -> list[str]:
    """The splits of a labelled data set: those of train, val and test that are there; none where it has no train."""
    root = Path(root)
    names = [
        name for name in ("train", "val", "test") if any(_has(root, alias) for alias in _SPLITS.get(name, (name,)))
    ]
    return names if "train" in names else []


def _has(root: Path, name: str) -> bool:
    return (root / name).is_dir() or any(
        next(root.glob(pattern), None) for pattern in (f"{name}-*.tar", f"{name}-*.parquet", f"data/{name}-*.parquet")
    )


def labelled_val(data: Path, class_names: tuple[str, ...] | None) -> ImageSource:
    """The images of DATA/val if there is a val, else of DATA; labels in the order of the names, where there are any."""
    has_val = any(
        (data / name).is_dir() or any(data.glob(f"{name}-*")) or any(data.glob(f"data/{name}-*"))
        for name in ("val", "validation")
    )
    root, split = (data, "val") if has_val else (data.parent, data.name)
    return labelled_images(root, split, class_names)
