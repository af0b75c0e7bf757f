"""Inner tensors of an ONNX graph as further outputs, without the onnx package and without a change of the file."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from pathlib import Path

from mae_deploy.runtime.onnx_file import GRAPH_OUTPUT, MODEL_GRAPH, VALUE_NAME, encode


def with_outputs(graph: Path, names: Sequence[str]) -> bytes:
    """The content of an ONNX file, and after it a second model that has only a graph with these outputs.

    A reader of protobuf merges the two: fields that may repeat, such as a graph's outputs, are joined
    (https://protobuf.dev/programming-guides/encoding/#last-one-wins). The outputs have no type: an engine infers it.
    """
    outputs = b"".join(encode(GRAPH_OUTPUT, encode(VALUE_NAME, name.encode())) for name in names)
    with graph.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return b"".join((content, encode(MODEL_GRAPH, outputs)))
