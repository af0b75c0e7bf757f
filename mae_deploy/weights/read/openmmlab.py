"""mmpretrain's ViTs and masked autoencoders (and mmselfsup's and mmcls's before it): tensors under the original's
names, and the facts of their records.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from torch import Tensor

from mae_deploy.errors import ConfigError
from mae_deploy.weights.read.files import Source, count_blocks

_LAYER = re.compile(r"^(backbone\.)?layers\.\d+\.ln1\.")

_NAMES = [
    (r"^backbone\.", ""),
    (r"^neck\.ln1\.", "decoder_norm."),
    (r"^neck\.(mask_token|decoder_pos_embed)$", r"\1"),
    (r"^neck\.(decoder_embed|decoder_blocks|decoder_pred)\.", r"\1."),
    (r"^neck\.bn\.", "head.0."),
    (r"^head\.(fc|layers\.head)\.", "head."),
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"^layers\.", "blocks."),
    (r"^ln1\.", "norm."),
    (r"^ln2\.", "fc_norm."),
    (r"\.ln([12])\.", r".norm\1."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
]
"""Their names to the original's. `backbone.ln1` norms the tokens (`final_norm`), `backbone.ln2` their average
(`avg_featmap`)."""

_SMALL = (768, 8, 8)
"""Their arch "small" is like nobody else's: width, blocks, heads."""


def is_openmmlab(source: Source) -> bool:
    """Whether the tensors have mmpretrain's names."""
    return any(_LAYER.match(name) for name in source.tensors)


def from_openmmlab(source: Source) -> Source:
    """The same weights under the original's names.

    Raises:
        ConfigError: the model has a norm before and one after pooling, which our classifier does not.
    """
    names = {_renamed(name): name for name in source.tensors}
    tensors = {name: source.tensors[own] for name, own in names.items()}
    if {"norm.weight", "fc_norm.weight"} <= set(tensors):
        raise ConfigError(
            f"{source.file} has a norm before pooling (final_norm) and one after it (avg_featmap), our classifier has"
            " one of them"
        )
    source = replace(
        source, tensors=tensors, names=names, layout="mmpretrain", renamed=len(set(tensors) - set(source.tensors))
    )
    meta = source.beside.get("meta")
    _take_config(source, meta if isinstance(meta, dict) else {})
    return source


def _renamed(name: str) -> str:
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _take_config(source: Source, meta: dict[str, Any]) -> None:
    """Heads, target and classes from the record of training, where the file still has it: published files keep little
    of it.
    """
    config = str(meta.get("cfg", ""))
    source.num_heads = _number(r"\barch=dict\([^()]*\bnum_heads=(\d+)", config) or _small_heads(source.tensors)
    source.decoder_num_heads = _number(r"\bdecoder_num_heads=(\d+)", config)
    if found := re.search(r"\bnorm_pix=(True|False)\b", config):
        source.norm_pix_loss = found[1] == "True"
    described = meta.get("dataset_meta")
    names = described.get("classes") if isinstance(described, dict) else meta.get("CLASSES")
    if isinstance(names, list | tuple):
        source.class_names = tuple(map(str, names))


def _number(pattern: str, text: str) -> int | None:
    found = re.search(pattern, text)
    return int(found[1]) if found else None


def _small_heads(tensors: dict[str, Tensor]) -> int | None:
    width, depth, heads = _SMALL
    cls_token = tensors.get("cls_token")
    return (
        heads
        if cls_token is not None and (cls_token.shape[-1], count_blocks(tensors, "blocks")) == (width, depth)
        else None
    )
