"""In what precision a frozen network computes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from mae_deploy.training.device import DTYPES, ResolvedPrecision


def set_precision(
    model: nn.Module, precision: ResolvedPrecision, device: torch.device
) -> Callable[[], AbstractContextManager[Any]]:
    """Store the weights of products in this precision, and return what to enter for the arithmetic.

    Norms, residual stream and position embeddings stay FP32: all in BF16 is no faster, and its error twice as large
    (docs/distillation.md).
    """
    if precision == "fp32":
        return lambda: torch.autocast(device.type, enabled=False)
    dtype = DTYPES[precision]
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.to(dtype)
    # Nothing is cast from FP32 that would be worth keeping, and a cache kept for the step would hold on to it.
    return lambda: torch.autocast(device.type, dtype, cache_enabled=False)
