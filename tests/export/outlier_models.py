"""An encoder with trained-like statistics, wide enough that rounding noise averages, and the outlier channels that
spoil its activations.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mae_deploy.models.config import EncoderConfig
from mae_deploy.models.vit import Encoder

CONFIG = EncoderConfig(name="noisy", image_size=(12, 20), patch_size=4, embed_dim=48, depth=2, num_heads=3)
"""3x5 patches, heads of 16."""


def noisy_encoder(seed: int = 0) -> Encoder:
    """Linears that keep the variance, norms around 1, small biases."""
    generator = torch.Generator().manual_seed(seed)
    model = Encoder(CONFIG).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                tensor.copy_(1 + 0.2 * noise)
            elif name.endswith("bias") or tensor.ndim < 2 or name in ("cls_token", "pos_embed"):
                tensor.copy_(0.2 * noise)
            else:
                tensor.copy_(noise / math.sqrt(tensor[0].numel()))
    return model


def plant_outliers(tensors: dict[str, Tensor], factor: float = 50.0) -> dict[str, Tensor]:
    """Two channels of every LayerNorm in the blocks times `factor`, and the columns that read them divided by it: the
    same function.
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
    return planted


def decibels(expected: Tensor, found: Tensor) -> float:
    """Signal to noise."""
    return 10 * math.log10(expected.square().sum().item() / (found - expected).square().sum().item())
