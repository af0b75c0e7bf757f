"""What other families compute besides, brought into the tensors that our encoder has; the outputs stay the same but for
rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor


def add_zero_biases(tensors: dict[str, Tensor], depth: int) -> int:
    """Zeros for the biases that layers of the encoder lack, in place; returns how many."""
    layers = [
        "patch_embed.proj",
        *(
            f"blocks.{index}.{layer}"
            for index in range(depth)
            for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        ),
        *(("attn_pool.q", "attn_pool.kv") if "attn_pool.q.weight" in tensors else ()),
    ]
    absent = [layer for layer in layers if f"{layer}.bias" not in tensors]
    tensors |= {f"{layer}.bias": torch.zeros(tensors[f"{layer}.weight"].shape[0]) for layer in absent}
    return len(absent)


def fold_layer_scale(tensors: dict[str, Tensor], depth: int) -> int:
    """LayerScale into the layer before it, in place: `gamma * (W x + b) = (gamma W) x + gamma b`; returns how many."""
    scaled = 0
    for index in range(depth):
        for scales, layer in ((("ls1.gamma", "gamma_1"), "attn.proj"), (("ls2.gamma", "gamma_2"), "mlp.fc2")):
            for scale in scales:
                gamma = tensors.pop(f"blocks.{index}.{scale}", None)
                if gamma is not None:
                    weight, bias = f"blocks.{index}.{layer}.weight", f"blocks.{index}.{layer}.bias"
                    tensors |= {weight: gamma[:, None] * tensors[weight], bias: gamma * tensors[bias]}
                    scaled += 1
    return scaled
