"""PyTorch's FP32 outputs, against which every graph and engine is judged."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mae_deploy.models.vit import Classifier, Encoder
from mae_deploy.preprocess import Array

_BATCH = 8


@torch.no_grad()
def reference_outputs(model: Encoder, images: Array, ids_keep: Array | None, names: tuple[str, ...], device: str) -> dict[str, Array]:
    """The named outputs in float32.

    Args:
        images: float32 `(S, C, H, W)`, normalised.
        ids_keep: int64 `(S, K)`, or None for all patches.
    """
    model = model.to(device).eval()
    found: dict[str, list[Array]] = {name: [] for name in names}
    for first in range(0, len(images), _BATCH):
        batch = torch.from_numpy(images[first : first + _BATCH]).to(device)
        ids = torch.from_numpy(ids_keep[first : first + _BATCH]).to(device) if ids_keep is not None else None
        for name, value in _outputs(model, batch, ids).items():
            if name in found:
                found[name].append(value.float().cpu().numpy())
    return {name: np.concatenate(values) for name, values in found.items()}


def _outputs(model: Encoder, images: Tensor, ids_keep: Tensor | None) -> dict[str, Tensor]:
    tokens = Encoder.forward(model, images, ids_keep)
    values = {"cls": tokens[:, 0], "tokens": tokens[:, 1:], "pooled": tokens[:, 1:].mean(dim=1)}
    if isinstance(model, Classifier):
        if model.pool == "avg":
            values["pooled"] = model.fc_norm(values["pooled"])
        values["logits"] = model.head(values["pooled"] if model.pool == "avg" else values["cls"])
    return values
