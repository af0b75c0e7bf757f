"""Released weights, known by name or by hash: what they may be used for, and what their files do not say."""

from __future__ import annotations

import hashlib
import re
from typing import Literal

from torch import Tensor

from mae_deploy.checkpoint import NON_COMMERCIAL, UNKNOWN_LICENCE, inherited_licence
from mae_deploy.weights.read import mae_lite
from mae_deploy.weights.read.files import MODEL_FILES, Source

_MAE = re.compile(
    r"mae_(pretrain|visualize|finetuned?)_vit_(base|large|huge)"
    r"|vit-mae-(base|large|huge)"
    r"|vit_(base|large|huge)_patch1[46]_224[._]mae"
)
"""File and repository names of the MAE authors' non-commercial weights and their re-uploads."""

_MAE_CONVERTED = re.compile(r"(?=.*mae)(?=.*vit)(?=.*(converted|3rdparty))", re.DOTALL)
"""OpenMMLab marks weights that others trained: of a MAE, they are the authors'."""

_MAE_MD5 = {
    # github.com/facebookresearch/mae, README.md
    "8cad7c": ("encoder", 768),
    "b8b06e": ("encoder", 1024),
    "9bdbb0": ("encoder", 1280),
    # FINETUNE.md
    "1b25e9": ("classifier", 768),
    "51f550": ("classifier", 1024),
    "2541f2": ("classifier", 1280),
}
"""The first digits of the MD5 sums that the MAE authors publish, and what each file holds: kind and width."""

_OPENMMLAB_SHA256 = (
    *("c2cf66ba", "bc79e40b", "5d81fbc4", "f7569ca2", "b11d0425", "df72726a", "cc7e98c9", "ff848775"),  # pretrained
    *("cf70aa21", "0bfc9bfd", "95b6a0ce"),  # fine-tuned
)
"""The first digits of the SHA-256 sums in the file names of mmpretrain's MAE weights, which OpenMMLab trained itself
(configs/mae/metafile.yml)."""
_OPENMMLAB = re.compile(rf"_\d{{8}}-({'|'.join(_OPENMMLAB_SHA256)})\.pth")

_APACHE = "Apache-2.0"
"""What mmpretrain and MAE-Lite state for their projects, weights among them; neither states another licence for the
weights."""

_PIXELS = re.compile(r"mae_(visualize)_vit_|mae_pretrain_vit_(?:base|large|huge)_(full)")


def release_of(source: Source, kind: str) -> Literal["mae", "openmmlab"] | None:
    """Whose release of a MAE it is: the authors', or OpenMMLab's own."""
    if source.own_licence:
        return None
    names = _published_names(source)
    if (
        _MAE.search(names)
        or (source.layout == "mmpretrain" and _MAE_CONVERTED.search(names))
        or _has_released_md5(source, kind)
    ):
        return "mae"
    theirs = source.sha256[:8] in _OPENMMLAB_SHA256 or _OPENMMLAB.search(source.file.name)
    return "openmmlab" if theirs else None


def licence_of(source: Source, release: str | None) -> str:
    """What a file of ours says, else the licence of a known release, else what timm states, else unspecified."""
    if source.own_licence:
        return source.own_licence
    if release is not None:
        return NON_COMMERCIAL if release == "mae" else _APACHE
    if source.layout == "MAE-Lite" and mae_lite.NAMES.search(source.file.name):
        # Students of a MAE-Base, of which MAE-Lite states neither origin nor licence.
        return inherited_licence(_APACHE, UNKNOWN_LICENCE) if "distill" in source.file.name else _APACHE
    return source.licence or UNKNOWN_LICENCE


def trained_on_normalised_pixels(source: Source) -> bool | None:
    """What the name of an original release tells of its decoder: `full` was trained on normalised pixels, `visualize`
    (GAN loss or not) on pixels.
    """
    found = _PIXELS.search(source.file.name)
    return None if found is None else found[2] is not None


def _published_names(source: Source) -> str:
    """What the weights may be known by: the file's name, or its model folder's, the hub's cache folder, the config's
    and timm's.
    """
    folders = source.file.absolute().parts[:-1]
    own = folders[-1] if source.file.name in MODEL_FILES else source.file.name
    cached = [name for name in folders if name.startswith("models--")]
    return " ".join([own, *cached, str(source.settings.get("_name_or_path", "")), source.architecture or ""])


def _has_released_md5(source: Source, kind: str) -> bool:
    """Whether the file is one of the authors' under another name; six digits are published, so the model must be the
    right one too.
    """
    width = _width(source.tensors)
    if (
        source.layout != "original or timm"
        or source.file.suffix == ".safetensors"
        or (kind, width) not in _MAE_MD5.values()
    ):
        return False
    digest = hashlib.md5(usedforsecurity=False)
    with source.file.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return _MAE_MD5.get(digest.hexdigest()[:6]) == (kind, width)


def _width(tensors: dict[str, Tensor]) -> int:
    return tensors["cls_token"].shape[-1] if "cls_token" in tensors else 0
