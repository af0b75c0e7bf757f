"""The training and validation images of a labelled data set, and the line that says what a command has found."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from mae_deploy.data.config import Columns, ValidationConfig
from mae_deploy.data.sources.base import ImageSource, hold_out
from mae_deploy.data.sources.open import beside_splits, has_split, labelled_images, labelled_whole
from mae_deploy.errors import ConfigError
from mae_deploy.images.find import permissions_said, survey
from mae_deploy.images.left_out import LeftOut
from mae_deploy.progress import notice
from mae_deploy.seeding import derive_seed

_LISTED = 8
"""Classes that are listed each with its count, at most."""


@permissions_said()
def labelled_splits(
    data: Path | str,
    validation: ValidationConfig,
    *,
    seed: int,
    class_names: tuple[str, ...] | None = None,
    columns: Columns | None = None,
) -> tuple[ImageSource, ImageSource]:
    """What to train on, and what to validate with; says what was found.

    Raises:
        ConfigError: see `labelled_images`; or all images are of one class, with which nothing can be learnt.
    """
    columns = columns or Columns()
    if validation.val_share is not None and not has_split(data, "train"):
        train = labelled_whole(Path(data), class_names, columns)
        unused = []
    else:
        train = labelled_images(data, "train", class_names, columns)
        unused = beside_splits(data, ["train"])
    if class_names is None and len({*train.labels}) < 2:  # a teacher's logits tell more than one class
        raise ConfigError(
            f"all {len(train)} images of {train.name} are of one class, {_only_class(train)}", hint=_below(train)
        )
    if validation.val_share is not None:
        train, val = hold_out(train, validation.val_share, np.random.default_rng(derive_seed(seed, "validation")))
    else:
        name = validation.val_split
        val = labelled_images(data, name or "val", train.class_names, columns, exact=name is not None)
        unused = beside_splits(data, ["train", name or "val"])
    announce(data, {"train": train, "val": val}, unused)
    return train, val


def announce(data: Path | str, parts: dict[str, ImageSource], unused: list[str] | None = None) -> None:
    """The line at the start of a command: images, classes with their counts, and what was left out and why.

    Args:
        parts: by split; the name of a single one may be empty.
        unused: what lies beside the splits.
    """
    left_out = LeftOut()
    for part in parts.values():
        left_out.merge(part.left_out)
    found = ", ".join(f"{name} {_describe(part)}".strip() for name, part in parts.items())
    rest = f"; left out: {left_out}" if left_out else ""
    announce_line(f"{data}: {found}{rest}" + (f"; not used: {', '.join(unused)}" if unused else ""))


def announce_line(text: str) -> None:
    """A line about the data."""
    notice("data:", text)


def _describe(source: ImageSource) -> str:
    images = f"{len(source)} image{'s' * (len(source) != 1)}"
    if source.class_names is None:
        return images
    counts = Counter(source.labels)
    of_class = {source.class_names[label]: count for label, count in sorted(counts.items())}
    num_classes = len(source.class_names)
    missing = num_classes - len(of_class)
    of = f"{images} of {f'{len(of_class)} of ' if missing else ''}{num_classes} class{'es' * (num_classes != 1)}"
    if len(of_class) <= _LISTED:
        return f"{of} ({', '.join(f'{name}: {count}' for name, count in of_class.items())})"
    fewest, most = min(of_class, key=of_class.__getitem__), max(of_class, key=of_class.__getitem__)
    return f"{of} (from {of_class[fewest]} of {fewest} to {of_class[most]} of {most})"


def _only_class(source: ImageSource) -> str:
    return (source.class_names or ("?",))[source.labels[0]]


def _below(source: ImageSource) -> str:
    """What may have been meant, where the only class is a folder that holds folders."""
    folder = Path(source.name) / _only_class(source)
    below = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if not below:
        return "a class is a folder of its own, DATA/train/<class>/…; images without classes are for pretrain"
    counts = {name: len(survey(folder / name).images) for name in below[:_LISTED]}
    listed = ", ".join(f"{name} ({count} images)" for name, count in counts.items())
    more = f" and {len(below) - _LISTED} more" if len(below) > _LISTED else ""
    return f"below {folder} are {listed}{more}: if these are the classes, move them up into {source.name}"
