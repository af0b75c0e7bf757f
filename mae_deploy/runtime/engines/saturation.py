"""Whether ONNX Runtime's products of 8-bit integers are exact on this CPU."""

from __future__ import annotations

from types import ModuleType

import numpy as np

from mae_deploy.runtime.onnx_file import (
    GRAPH_INPUT,
    GRAPH_NAME,
    GRAPH_NODE,
    GRAPH_OUTPUT,
    encode,
    encode_model,
    encode_node,
    encode_value,
)

_UINT8, _INT8, _INT32 = 2, 3, 6
"""Types in onnx.proto."""

_LENGTH = 8


def products_saturate(runtime: ModuleType) -> bool:
    """Multiply the largest values, uint8 by int8: x86 CPUs without VNNI add two products in 16 bits, and cut the sum
    off at 32,767.
    """
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(_integer_product(), options, providers=["CPUExecutionProvider"])
    activations, weights = np.full((1, _LENGTH), 255, np.uint8), np.full((_LENGTH, _LENGTH), 127, np.int8)
    (found,) = session.run(None, {"activations": activations, "weights": weights})
    return bool((found != _LENGTH * 255 * 127).any())


def _integer_product() -> bytes:
    """An ONNX file of one product."""
    graph = encode(GRAPH_NODE, encode_node(b"MatMulInteger", [b"activations", b"weights"], b"product")) + encode(
        GRAPH_NAME, b"product"
    )
    graph += encode(GRAPH_INPUT, encode_value(b"activations", _UINT8, (1, _LENGTH)))
    graph += encode(GRAPH_INPUT, encode_value(b"weights", _INT8, (_LENGTH, _LENGTH)))
    graph += encode(GRAPH_OUTPUT, encode_value(b"product", _INT32, (1, _LENGTH)))
    return encode_model(graph)
