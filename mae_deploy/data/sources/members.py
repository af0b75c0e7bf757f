"""Which members of a tar are images, and which label is whose: the same for indexed and for streamed shards."""

from __future__ import annotations

import posixpath
import tarfile
from collections.abc import Iterable, Mapping
from typing import Literal

from mae_deploy.data.sources.base import UNLABELLED
from mae_deploy.images.arrays import NUMPY_SUFFIX
from mae_deploy.images.find import is_image_name, reason_by_suffix
from mae_deploy.images.left_out import LeftOut

_LABEL_SUFFIX = ".cls"

TWICE = "that came before under the same name"
BESIDE = "arrays beside images"
"""Why an image may be left out."""


def clean_name(member: str) -> str:
    """A member's name as tar means it: `./cat/0.jpg` is `cat/0.jpg`."""
    return posixpath.normpath(member)


_REASONS = {"hidden": "hidden", "link": "links or sparse files"}

Kind = Literal["image", "label", "hidden", "link", "other"]


def kind_of_member(member: tarfile.TarInfo, left_out: LeftOut) -> tuple[str, Kind]:
    """The clean name of a member that is no folder, and what it is; what is neither image nor label is counted."""
    name = clean_name(member.name)
    kind = kind_of(name) if member.isreg() and not member.issparse() else "link"
    if kind not in ("image", "label"):
        left_out.add(_REASONS.get(kind) or reason_by_suffix(name), name)
    return name, kind


def kind_of(name: str) -> Kind:
    """What a member of this clean name is. Hidden are names with a dot in front, such as the `._0.jpg` that macOS adds,
    and what lies in such folders.
    """
    if any(part.startswith(".") or part == "__MACOSX" for part in name.split("/")):
        return "hidden"
    if name.lower().endswith(_LABEL_SUFFIX):
        return "label"
    return "image" if is_image_name(name) else "other"


def group_key(name: str) -> str:
    """The sample that a member belongs to, as WebDataset has it: folder and name up to the first dot."""
    folder, _, file = name.rpartition("/")
    return f"{folder}/{file.partition('.')[0]}"


def label_stem(name: str) -> str:
    """What a `.cls` member is the label of."""
    return name[: -len(_LABEL_SUFFIX)]


def label_of(image: str, labels: Mapping[str, int]) -> int:
    """The label with the longest stem that the image's name begins with, cut at its dots; else `UNLABELLED`.

    Args:
        labels: by `label_stem`.
    """
    folder = posixpath.dirname(image)
    stem, dot = image, "."
    while dot and len(stem) > len(folder):
        if stem in labels:
            return labels[stem]
        stem, dot, _ = stem.rpartition(".")
    return UNLABELLED


def arrays_beside(images: Iterable[str]) -> set[str]:
    """The NumPy files that belong to an image of another kind: labels, masks or features, as in folders."""
    names = list(images)
    keys = {group_key(name) for name in names if not _is_array(name)}
    return {name for name in names if _is_array(name) and group_key(name) in keys}


def _is_array(name: str) -> bool:
    return name.lower().endswith(NUMPY_SUFFIX)
