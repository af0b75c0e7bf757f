"""Whether products of 8-bit integers are exact on this CPU: found by multiplying the largest values on each engine.

x86 CPUs without VNNI multiply uint8 by int8 (vpmaddubsw; int8 is made uint8 by adding 128), add two products in 16
bits, and cut the sum off at 32,767: `2 * 255 * 127` is 64,770. ARM and CPUs with VNNI or AMX add them in 32 bits.
"""

from __future__ import annotations

import functools
import importlib
import logging
from types import ModuleType
from typing import Any

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

_log = logging.getLogger(__name__)


def may_saturate(precision: str) -> bool:
    """Whether a graph's products overflow where they are added in 16 bits; weights of 7 bits are small enough.

    Args:
        precision: as an `Engine` takes it.
    """
    return precision.startswith("int8") and "-w7" not in precision


@functools.cache
def say_exact(how: str, remedy: str) -> None:
    """Log, once for each engine, how it computes exactly instead of by its fast products, and what to do about it."""
    _log.warning("%s: this CPU has no VNNI, and its fast products of 8-bit integers overflow; for it, %s", how, remedy)


def onnxruntime_saturates(runtime: ModuleType) -> bool:
    """Whether its fast products, uint8 by int8, are cut off."""
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(_integer_product(), options, providers=["CPUExecutionProvider"])
    activations, weights = np.full((1, _LENGTH), 255, np.uint8), np.full((_LENGTH, _LENGTH), 127, np.int8)
    (found,) = session.run(None, {"activations": activations, "weights": weights})
    return bool((found != _LENGTH * 255 * 127).any())


@functools.cache
def openvino_saturates(core: Any) -> bool:
    """Whether its fast products, int8 by int8, are cut off.

    Args:
        core: OpenVINO's `Core`.
    """
    openvino, operators = (importlib.import_module(name) for name in ("openvino", "openvino.opset13"))
    least, most = np.float32(-128), np.float32(127)
    values = operators.parameter([1, _LENGTH], np.float32)
    activations = operators.fake_quantize(values, least, most, least, most, levels=256)
    stored = operators.convert(operators.constant(np.full((_LENGTH, _LENGTH), 127, np.int8)), np.float32)
    weights = operators.multiply(stored, operators.constant(np.ones((1, _LENGTH), np.float32)))
    model = openvino.Model([operators.matmul(activations, weights, False, False)], [values])
    settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    found = core.compile_model(model, "CPU", settings)(np.full((1, _LENGTH), 127, np.float32))[0]
    return bool((found != _LENGTH * 127 * 127).any())


def _integer_product() -> bytes:
    """An ONNX file of one product."""
    graph = encode(GRAPH_NODE, encode_node(b"MatMulInteger", [b"activations", b"weights"], b"product")) + encode(
        GRAPH_NAME, b"product"
    )
    graph += encode(GRAPH_INPUT, encode_value(b"activations", _UINT8, (1, _LENGTH)))
    graph += encode(GRAPH_INPUT, encode_value(b"weights", _INT8, (_LENGTH, _LENGTH)))
    graph += encode(GRAPH_OUTPUT, encode_value(b"product", _INT32, (1, _LENGTH)))
    return encode_model(graph)
