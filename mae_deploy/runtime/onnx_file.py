"""As much of the ONNX file format as a device needs, without the onnx package: what a graph takes, and a graph of
matrix products.

The format is protobuf (https://protobuf.dev/programming-guides/encoding/): a message is a list of fields, each a number
with an integer or with bytes.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np

from mae_deploy.errors import ConfigError
from mae_deploy.images.read import Array
from mae_deploy.runtime.manifest import TensorEntry

_INTEGER, _EIGHT_BYTES, _BYTES, _FOUR_BYTES = 0, 1, 2, 5
"""How protobuf stores a field's value."""

# Field numbers of onnx.proto, by message.
_MODEL_IR_VERSION, MODEL_GRAPH, _MODEL_OPSET = 1, 7, 8
_OPSET_DOMAIN, _OPSET_VERSION = 1, 2
GRAPH_NODE, GRAPH_NAME, GRAPH_INITIALIZER, GRAPH_INPUT, GRAPH_OUTPUT = 1, 2, 5, 11, 12
_NODE_INPUT, _NODE_OUTPUT, _NODE_OPERATOR = 1, 2, 4
_INITIALIZER_DIMS, _INITIALIZER_TYPE, _INITIALIZER_NAME, _INITIALIZER_BYTES = 1, 2, 8, 9
VALUE_NAME, _VALUE_TYPE = 1, 2
_TYPE_TENSOR = 1
_TENSOR_TYPE, _TENSOR_SHAPE = 1, 2
_SHAPE_DIM = 1
_DIM_SIZE, _DIM_NAME = 1, 2

_LONGEST_VARINT = 70
"""Bits: ten bytes of seven."""

_SIGMAS = 4
"""Standard deviations of normal numbers that INT8 covers."""

_FLOAT, _FLOAT16 = 1, 10
_DTYPES = {
    _FLOAT: "float32",
    2: "uint8",
    3: "int8",
    6: "int32",
    7: "int64",
    9: "bool",
    _FLOAT16: "float16",
    11: "float64",
    16: "bfloat16",
}


def read_inputs(path: Path) -> list[TensorEntry]:
    """Name, type and shape of every input of the graph in an ONNX file, of any size: the weights are skipped.

    Raises:
        ConfigError: no such file, or it is not an ONNX model.
    """
    with opened(path) as model:
        return _inputs(model)


def read_opset(path: Path) -> int:
    """The version of ONNX's own operators that an ONNX file uses.

    Raises:
        ConfigError: no such file, or it is not an ONNX model.
    """
    with opened(path) as model:
        return max(
            opset.integer(_OPSET_VERSION)
            for opset in model.messages(_MODEL_OPSET)
            if not any(name.text() for name in opset.messages(_OPSET_DOMAIN))
        )


def write_products(path: Path, size: int, length: int, *, rows: int | None = None, half: bool = False) -> None:
    """Write a graph that multiplies its input `x`, float32 or float16 `(rows, size)`, `length` times by a constant
    matrix `(size, size)`; without `rows` it is as high.

    The matrix keeps the scale of what it multiplies: no value overflows or becomes so small that it slows the
    processor.
    """
    weight = np.random.default_rng(0).standard_normal((size, size), np.float32) / np.float32(size**0.5)
    kind, stored = (_FLOAT16, weight.astype(np.float16)) if half else (_FLOAT, weight)
    shape = (size if rows is None else rows, size)
    initializer = (
        encode(_INITIALIZER_DIMS, size) * 2 + encode(_INITIALIZER_TYPE, kind) + encode(_INITIALIZER_NAME, b"w")
    )
    values = [b"x", *(b"y%d" % index for index in range(length))]
    graph = b"".join(
        encode(GRAPH_NODE, encode_node(b"MatMul", [before, b"w"], after)) for before, after in pairwise(values)
    )
    graph += encode(GRAPH_NAME, b"products")
    graph += encode(GRAPH_INITIALIZER, initializer + encode(_INITIALIZER_BYTES, stored.tobytes()))
    graph += encode(GRAPH_INPUT, encode_value(values[0], kind, shape)) + encode(
        GRAPH_OUTPUT, encode_value(values[-1], kind, shape)
    )
    path.write_bytes(encode_model(graph))


def write_int8_products(path: Path, size: int, length: int) -> None:
    """As `write_products`, in INT8: the matrix has 8 bits, and what it multiplies is quantised to as many before each
    product.
    """
    step = np.float32(_SIGMAS / 127)
    of_weight = step / np.float32(size**0.5)
    weight = np.random.default_rng(0).standard_normal((size, size), np.float32) / np.float32(size**0.5)
    rounded = np.clip(np.round(weight / of_weight), -127, 127).astype(np.int8)
    constants: dict[bytes, Array] = {
        b"step": np.array(step),
        b"zero": np.array(128, np.uint8),
        b"step_w": np.array(of_weight),
    }
    values, graph = [b"x", *(b"y%d" % index for index in range(length))], b""
    for before, after in pairwise(values):
        constants[after + b"_w"] = rounded  # one each: ONNX Runtime fails where several products share theirs
        for operator, inputs, output in (
            (b"QuantizeLinear", [before, b"step", b"zero"], after + b"_q"),
            (b"DequantizeLinear", [after + b"_q", b"step", b"zero"], after + b"_d"),
            (b"DequantizeLinear", [after + b"_w", b"step_w"], after + b"_wd"),
            (b"MatMul", [after + b"_d", after + b"_wd"], after),
        ):
            graph += encode(GRAPH_NODE, encode_node(operator, inputs, output))
    graph += encode(GRAPH_NAME, b"products")
    graph += b"".join(encode(GRAPH_INITIALIZER, _initializer(name, array)) for name, array in constants.items())
    graph += encode(GRAPH_INPUT, encode_value(values[0], _FLOAT, (size, size))) + encode(
        GRAPH_OUTPUT, encode_value(values[-1], _FLOAT, (size, size))
    )
    path.write_bytes(encode_model(graph))


def _initializer(name: bytes, array: Array) -> bytes:
    (kind,) = (number for number, dtype in _DTYPES.items() if dtype == array.dtype.name)
    return (
        b"".join(encode(_INITIALIZER_DIMS, side) for side in array.shape)
        + encode(_INITIALIZER_TYPE, kind)
        + encode(_INITIALIZER_NAME, name)
        + encode(_INITIALIZER_BYTES, array.tobytes())
    )


# --- reading ---------------------------------------------------------------------------------------------------------


@contextmanager
def opened(path: Path) -> Iterator[Message]:
    if not path.is_file():
        raise ConfigError(f"no ONNX file at {path}")
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            yield Message(content, 0, len(content))
    except (ValueError, IndexError) as error:
        raise ConfigError(f"{path} is not an ONNX model ({error})") from error


class Message:
    """A protobuf message, a stretch of a file."""

    def __init__(self, content: mmap.mmap, start: int, stop: int) -> None:
        if stop > len(content):
            raise ValueError("it is cut short")
        self._content, self._start, self._stop = content, start, stop

    def fields(self) -> Iterator[tuple[int, int | Message]]:
        """Number and value of each field: an integer, or a stretch of bytes (of a float, its four or eight)."""
        at = self._start
        while at < self._stop:
            key, at = self._integer(at)
            kind = key & 7
            if kind == _INTEGER:
                value, at = self._integer(at)
                yield key >> 3, value
            elif kind == _BYTES:
                length, at = self._integer(at)
                yield key >> 3, Message(self._content, at, at + length)
                at += length
            elif kind in (_EIGHT_BYTES, _FOUR_BYTES):
                length = 8 if kind == _EIGHT_BYTES else 4
                yield key >> 3, Message(self._content, at, at + length)
                at += length
            else:
                raise ValueError(f"field type {kind}")

    def messages(self, number: int) -> list[Message]:
        """The fields of this number that hold bytes."""
        return [value for found, value in self.fields() if found == number and isinstance(value, Message)]

    def message(self, number: int) -> Message:
        """The last of them, as protobuf wants it."""
        found = self.messages(number)
        if not found:
            raise ValueError(f"field {number} is missing")
        return found[-1]

    def integer(self, number: int) -> int:
        """The last integer of this number; 0 without one."""
        return ([value for found, value in self.fields() if found == number and isinstance(value, int)] or [0])[-1]

    @property
    def size(self) -> int:
        """In bytes."""
        return self._stop - self._start

    def text(self) -> str:
        """The bytes as text."""
        return self.content().decode()

    def content(self) -> bytes:
        """The bytes themselves."""
        return self._content[self._start : self._stop]

    def integers(self) -> Iterator[int]:
        """Varints, one after the other."""
        at = self._start
        while at < self._stop:
            value, at = self._integer(at)
            yield value

    def _integer(self, at: int) -> tuple[int, int]:
        """A varint and where it ends: seven bits a byte, the lowest first, all but the last with the eighth bit set."""
        value = 0
        for place in range(0, _LONGEST_VARINT, 7):
            byte = self._content[at]
            value |= (byte & 0x7F) << place
            at += 1
            if byte < 0x80:
                return value, at
        raise ValueError("an integer has no end")


def _inputs(model: Message) -> list[TensorEntry]:
    graph = model.message(MODEL_GRAPH)
    weights = {tensor.message(_INITIALIZER_NAME).text() for tensor in graph.messages(GRAPH_INITIALIZER)}
    entries = [tensor_entry(value) for value in graph.messages(GRAPH_INPUT)]
    return [entry for entry in entries if entry["name"] not in weights]  # older files list the weights among the inputs


def tensor_entry(value: Message) -> TensorEntry:
    """Name, type and shape of an input or output."""
    name = value.message(VALUE_NAME).text()
    types = [tensor for kind in value.messages(_VALUE_TYPE) for tensor in kind.messages(_TYPE_TENSOR)]
    shapes = types[-1].messages(_TENSOR_SHAPE) if types else []
    if not shapes:
        raise ValueError(f"'{name[:100]}' has {'no shape' if types else 'another type than tensors'}")
    number = types[-1].integer(_TENSOR_TYPE)
    shape = [_size(dim) for dim in shapes[-1].messages(_SHAPE_DIM)]
    return {"name": name, "dtype": _DTYPES.get(number, f"type {number}"), "shape": shape}


def _size(dim: Message) -> int | str:
    """A fixed size, or the name of a dynamic one, which older exporters write as -1."""
    names, size = dim.messages(_DIM_NAME), dim.integer(_DIM_SIZE)
    return size if 0 < size < 1 << 63 else names[-1].text() if names else "?"


# --- writing ---------------------------------------------------------------------------------------------------------


def encode_model(graph: bytes) -> bytes:
    """A whole file, of opset 17."""
    return encode(_MODEL_IR_VERSION, 8) + encode(_MODEL_OPSET, encode(_OPSET_VERSION, 17)) + encode(MODEL_GRAPH, graph)


def encode_node(operator: bytes, inputs: Sequence[bytes], output: bytes) -> bytes:
    """A node without attributes."""
    return (
        b"".join(encode(_NODE_INPUT, name) for name in inputs)
        + encode(_NODE_OUTPUT, output)
        + encode(_NODE_OPERATOR, operator)
    )


def encode_value(name: bytes, kind: int, shape: Sequence[int]) -> bytes:
    """An input or output; `kind` is the number that onnx.proto gives the type of its elements."""
    sizes = b"".join(encode(_SHAPE_DIM, encode(_DIM_SIZE, size)) for size in shape)
    return encode(VALUE_NAME, name) + encode(
        _VALUE_TYPE, encode(_TYPE_TENSOR, encode(_TENSOR_TYPE, kind) + encode(_TENSOR_SHAPE, sizes))
    )


def encode(number: int, value: int | bytes) -> bytes:
    """One field of a message."""
    if isinstance(value, int):
        return _varint(number << 3 | _INTEGER) + _varint(value)
    return _varint(number << 3 | _BYTES) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    found = bytearray()
    while value >= 0x80:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])
