"""What TensorRT's inspector says of an engine's layers, read without trust in its form: that differs from version to
version.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

_TYPES = {"int8": r"int8", "fp8": r"fp8|e4m3", "bf16": r"bf16|bfloat16", "fp16": r"fp16|half", "fp32": r"fp32|float"}
"""How the precisions are called; the lowest first, and what another name contains after it."""


def summarise(report: str) -> dict[str, Any]:
    """Of an inspector's JSON: how many layers, how many of them are fused attention, and how many have each precision
    as the lowest of their tensors.

    What cannot be read is counted as nothing: `{"layers": 0, "fused_attention": 0, "precisions": {}}`.
    """
    layers = _layers(report)
    precisions = Counter(found for layer in layers if (found := _precision(layer)) is not None)
    return {
        "layers": len(layers),
        "fused_attention": sum(_is_fused_attention(layer) for layer in layers),
        "precisions": {name: precisions[name] for name in _TYPES if name in precisions},
    }


def _layers(report: str) -> list[Any]:
    try:
        content = json.loads(report)
    except ValueError:
        return []
    layers = content.get("Layers") if isinstance(content, dict) else None
    return layers if isinstance(layers, list) else []


def _is_fused_attention(layer: Any) -> bool:
    """A kernel such as `_gemm_mha_v2_0x…`; a layer without details is its name."""
    names = [layer.get(key) for key in ("TacticName", "Name")] if isinstance(layer, dict) else [layer]
    return any(isinstance(name, str) and re.search(r"(?<![a-z])f?mha(?![a-z])", name.lower()) for name in names)


def _precision(layer: Any) -> str | None:
    if not isinstance(layer, dict):
        return None
    described = " ".join(_descriptions(layer)).lower()
    return next((name for name, pattern in _TYPES.items() if re.search(pattern, described)), None)


def _descriptions(layer: dict[str, Any]) -> Iterator[str]:
    """What is said of the types of a layer's tensors, under keys such as `Format/Datatype`, `Format` or `Datatype`."""
    for side in ("Inputs", "Outputs"):
        tensors = layer.get(side)
        for tensor in tensors if isinstance(tensors, list) else []:
            if isinstance(tensor, dict):
                yield from (
                    value
                    for key, value in tensor.items()
                    if isinstance(value, str) and re.search("format|type", key, re.IGNORECASE)
                )
