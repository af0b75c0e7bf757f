"""In what precision a frozen network computes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import nn

from mae_deploy.errors import MissingDependency
from mae_deploy.training.config import TrainingPrecision

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_precision(precision: TrainingPrecision, device: torch.device) -> Literal["fp32", "bf16", "fp16"]:
    """What `auto` means: bf16 where the device multiplies in it, else fp32.

    Raises:
        MissingDependency: fp16 on a CPU.
    """
    if precision == "fp16" and device.type == "cpu":
        raise MissingDependency(
            "--teacher-precision fp16 needs a CUDA device", hint="use --teacher-precision bf16 or fp32"
        )
    if precision != "auto":
        return precision
    if device.type == "cpu":
        multiplies = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        multiplies = torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if multiplies else "fp32"


def set_precision(
    model: nn.Module, precision: TrainingPrecision, device: torch.device
) -> Callable[[], AbstractContextManager[Any]]:
    """Store the weights of products in this precision, and return what to enter for the arithmetic.

    Norms, residual stream and position embeddings stay FP32: all in BF16 is no faster, and its error twice as large
    (docs/distillation.md).
    """
    resolved = resolve_precision(precision, device)
    if resolved == "fp32":
        return lambda: torch.autocast(device.type, enabled=False)
    dtype = _DTYPES[resolved]
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.to(dtype)
    # Nothing is cast from FP32 that would be worth keeping, and a cache kept for the step would hold on to it.
    return lambda: torch.autocast(device.type, dtype, cache_enabled=False)
