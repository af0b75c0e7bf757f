"""An encoder with trained-like statistics, wide enough that rounding noise averages, and the outlier channels that
spoil its activations.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from mae_deploy.models.config import EncoderConfig
from mae_deploy.models.quantization.layers import is_gated
from mae_deploy.models.vit import Encoder

CONFIG = EncoderConfig(name="noisy", image_size=(12, 20), patch_size=4, embed_dim=48, depth=2, num_heads=3)
"""3x5 patches, heads of 16."""

GATED = replace(CONFIG, rotary="dinov3", position_table=False, num_registers=2, activation="swiglu")
"""As DINOv3's larger ones."""
NORMED = replace(GATED, attn_norm=True, mlp_norm=True)
"""As EVA-02's larger ones in CLIP."""


def noisy_encoder(seed: int = 0, config: EncoderConfig = CONFIG) -> Encoder:
    """Linears that keep the variance, norms around 1, small biases."""
    generator = torch.Generator().manual_seed(seed)
    model = Encoder(config).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                tensor.copy_(1 + 0.2 * noise)
            elif name.endswith("bias") or tensor.ndim < 2 or name in ("cls_token", "reg_token", "pos_embed"):
                tensor.copy_(0.2 * noise)
            else:
                tensor.copy_(noise / math.sqrt(tensor[0].numel()))
    return model


def plant_outliers(tensors: dict[str, Tensor], factor: float = 50.0) -> dict[str, Tensor]:
    """Two channels of every LayerNorm in the blocks times `factor`, of SwiGLU's product too, and the columns that read
    them divided by it: the same function.
    """
    planted = dict(tensors)
    for name in tensors:
        if name.endswith(("norm1.weight", "norm2.weight")):
            block, norm, _ = name.rsplit(".", 2)
            linear = f"{block}.attn.qkv.weight" if norm == "norm1" else f"{block}.mlp.fc1.weight"
            channels = torch.ones(len(tensors[name]))
            channels[[3, 11]] = factor
            planted[name] = tensors[name] * channels
            planted[f"{block}.{norm}.bias"] = tensors[f"{block}.{norm}.bias"] * channels
            planted[linear] = tensors[linear] / channels
    for name in [name for name in tensors if name.endswith("fc2.weight") and is_gated(tensors, name.split(".mlp")[0])]:
        units = torch.ones(tensors[name].shape[1])
        units[[2, 17]] = factor
        planted[name] = tensors[name] / units
        last = name.replace("fc2", "norm")  # else the value, which is multiplied with its gate
        if last not in tensors:
            last, units = name.replace("fc2", "fc1"), torch.cat([torch.ones_like(units), units])
        for layer in (last, last.replace("weight", "bias")):
            planted[layer] = planted[layer] * units.reshape(-1, *[1] * (planted[layer].ndim - 1))
    return planted


def decibels(expected: Tensor, found: Tensor) -> float:
    """Signal to noise."""
    return 10 * math.log10(expected.square().sum().item() / (found - expected).square().sum().item())
