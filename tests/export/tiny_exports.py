"""Checkpoints to export, and graphs run by ONNX Runtime as they lie on the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnxruntime

from mae_deploy.checkpoint import save_checkpoint
from mae_deploy.export.onnx_builder import GraphBuilder
from mae_deploy.models.vit import Encoder
from mae_deploy.preprocess import Array
from tests.models.tiny_models import CLASSES, metadata_of

CLASS_NAMES = tuple(f"class-{letter}" for letter in "abcdefghijk"[:CLASSES])


def write_checkpoint(folder: Path, model: Encoder, **metadata: Any) -> Path:
    """A checkpoint folder of this model."""
    save_checkpoint(folder, model.state_dict(), metadata_of(model, **metadata))
    return folder


def read_graph(path: Path) -> onnx.ModelProto:
    """The graph without its external data."""
    return onnx.load(path, load_external_data=False)


def open_session(path: Path) -> Any:
    """ONNX Runtime as it comes, on one thread; not through the project's own engine."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run_session(session: Any, **inputs: Array) -> dict[str, Array]:
    """All outputs by name."""
    names = [entry.name for entry in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


class SavedGraph:
    """A builder's graph on the disk and in a session."""

    def __init__(self, graph: GraphBuilder, folder: Path) -> None:
        self.path = folder / "graph.onnx"
        self.files = graph.save(self.path)
        self.model = read_graph(self.path)
        self.session = open_session(self.path)

    def __call__(self, **inputs: Array) -> dict[str, Array]:
        return run_session(self.session, **inputs)

    @property
    def weights(self) -> dict[str, onnx.TensorProto]:
        """The stored constants by name."""
        return {tensor.name: tensor for tensor in self.model.graph.initializer}
