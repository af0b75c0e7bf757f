"""Weights must be finite floating-point numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from mae_deploy.errors import CheckFailed

_NAMED = 4
"""Tensors that the error names."""


def check_numbers(tensors: Mapping[str, Tensor], file: Path, names: Mapping[str, str] | None = None) -> None:
    """Refuse weights that are whole numbers, complex or quantised, which belong to another computation, and those that
    are NaN or infinite, whose outputs are too.

    Args:
        names: what renamed tensors are called in the file.

    Raises:
        CheckFailed: the first tensors of this kind, by name.
    """
    broken = []
    for name, tensor in tensors.items():
        called = (names or {}).get(name, name)
        if not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.is_meta:
            raise CheckFailed(
                f"{file} holds {called} as {tensor.dtype} ({tensor.layout}), not as floating-point numbers"
            )
        values = tensor.float()  # as they are computed with: large ones of float64 are infinite, too
        if not torch.isfinite(values).all():
            nan, infinite = int(values.isnan().sum()), int(values.isinf().sum())
            parts = [f"{count:,} {word}" for count, word in ((nan, "NaN"), (infinite, "infinite")) if count]
            broken.append(f"{called} ({' and '.join(parts)} of {tensor.numel():,})")
    if broken:
        more = f" and {len(broken) - _NAMED} tensors more" if len(broken) > _NAMED else ""
        raise CheckFailed(
            f"{file} holds weights that are no finite numbers: {', '.join(broken[:_NAMED])}{more}",
            hint="the training that made them diverged, or the file is damaged: take an earlier checkpoint",
        )
