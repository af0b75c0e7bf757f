"""AdamW's parameter groups: weight decay as the original groups it, and layer-wise learning-rate decay."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

ParamGroup = dict[str, Any]
"""`params`, `names`, `weight_decay` and `lr_scale`."""


def decay_groups(model: nn.Module, weight_decay: float) -> list[ParamGroup]:
    """Pretraining's two groups: vectors and biases do not decay, everything else does (`cls_token` and `mask_token`
    too).
    """
    groups: dict[bool, ParamGroup] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and not name.endswith(".bias")
            _add(groups.setdefault(decays, _group(weight_decay if decays else 0.0, 1.0)), name, parameter)
    return list(groups.values())


_UNDECAYED = ("pos_embed", "cls_token", "reg_token", "channel_embed", "rope.freqs")


def layer_decay_groups(model: nn.Module, weight_decay: float, layer_decay: float) -> list[ParamGroup]:
    """Fine-tuning's groups: the learning rate shrinks by `layer_decay` a layer from the head down (BEiT, and the
    original's `lr_decay.py`).
    """
    layers = len(model.get_submodule("blocks")._modules) + 1
    groups: dict[tuple[int, bool], ParamGroup] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            layer = layer_of(name, layers)
            decays = parameter.ndim > 1 and name not in _UNDECAYED
            _add(
                groups.setdefault(
                    (layer, decays), _group(weight_decay if decays else 0.0, layer_decay ** (layers - layer))
                ),
                name,
                parameter,
            )
    return list(groups.values())


def layer_of(name: str, layers: int) -> int:
    """0 for the embeddings, i + 1 for block i, `layers` for what comes after the blocks."""
    if name.startswith(("cls_token", "reg_token", "pos_embed", "channel_embed", "rope", "patch_embed", "norm_pre")):
        return 0
    return int(name.split(".")[1]) + 1 if name.startswith("blocks.") else layers


def adamw(groups: list[ParamGroup], *, betas: tuple[float, float]) -> torch.optim.AdamW:
    """Fused AdamW over the groups; the loop sets each group's learning rate as the schedule's times its `lr_scale`."""
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)


def _group(weight_decay: float, lr_scale: float) -> ParamGroup:
    return {"params": [], "names": [], "weight_decay": weight_decay, "lr_scale": lr_scale}


def _add(group: ParamGroup, name: str, parameter: nn.Parameter) -> None:
    group["params"].append(parameter)
    group["names"].append(name)
