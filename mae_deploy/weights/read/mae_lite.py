"""MAE-Lite's checkpoints (wangsr126/MAE-Lite): the model among the parts of its training, with more heads than others
of its width.
"""

from __future__ import annotations

import re
from dataclasses import replace

from mae_deploy.weights.read.files import Source, count_blocks, tensor_of

_MODEL = "model."
_DISTILLING = re.compile(r"^(tch_model|attn_adapter|hidden_adapter)\.")
"""The teacher and adapters of distillation."""
_TRAINING = re.compile(rf"^ema_model\.|{_DISTILLING.pattern}")
"""And the running average."""
_RECORDS = {"start_epoch", "best_top1"}
"""What stands beside its weights."""

_HEADS = 12
"""Its ViT-T and ViT-S, 192 and 384 wide, have 12 heads; those of DeiT and timm have 3 and 6."""
_WIDTHS = (192, 384)

NAMES = re.compile(r"mae_(tiny|small)_(distill_)?(d2_)?\d+e.*\.pth(\.tar)?$")
"""What its authors call their checkpoints."""


def is_mae_lite(source: Source) -> bool:
    """Whether the tensors stand under `model.`, among the parts of MAE-Lite's training or with its records or name:
    other wrappers say `model.` too.
    """
    if f"{_MODEL}patch_embed.proj.weight" not in source.tensors:
        return False
    parts = any(_DISTILLING.match(name) for name in source.tensors)
    return parts or _RECORDS <= set(source.beside) or bool(NAMES.search(source.file.name))


def from_mae_lite(source: Source) -> Source:
    """The same weights under the original's names."""
    left = [name for name in source.tensors if _TRAINING.match(name)]
    names = {name.removeprefix(_MODEL): name for name in source.tensors if name not in left}
    tensors = {name: source.tensors[own] for name, own in names.items()}
    parts = sorted({name.split(".")[0] for name in left})
    source = replace(
        source,
        tensors=tensors,
        names=names,
        layout="MAE-Lite",
        renamed=len(tensors),
        dropped=[f"{part}.*" for part in parts],
    )
    if tensor_of(source, "patch_embed.proj.weight", 4).shape[0] in _WIDTHS:
        source.num_heads = _HEADS
    _drop_last_half_block(source)
    return source


def _drop_last_half_block(source: Source) -> None:
    """Decoupled distillation (D²-MAE) trains a query and key on top, and its decoder reads an earlier block: what is of
    use is the encoder.
    """
    tensors = source.tensors
    last = f"blocks.{count_blocks(tensors, 'blocks') - 1}."
    if f"{last}attn.qkv.weight" in tensors and f"{last}mlp.fc1.weight" not in tensors:
        gone = [name for name in tensors if name.startswith((last, "decoder_")) or name == "mask_token"]
        for name in gone:
            del tensors[name]
        source.dropped += gone
        source.notes.append(
            "decoupled distillation: its decoder and final norm belong to an earlier block; fine-tuning starts from the"
            " encoder"
        )
