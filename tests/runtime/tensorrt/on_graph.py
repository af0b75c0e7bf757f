"""ONNX Runtime in the place of TensorRT: what surrounds builds is tested without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mae_deploy.runtime.engines.base import EngineOptions
from mae_deploy.runtime.engines.onnxruntime import OnnxRuntimeEngine
from mae_deploy.runtime.timing import Timing

open_engines: list[OnnxRuntimeEngine] = []
built_on: list[int] = []
opened_on: list[str] = []


class OnGraph(OnnxRuntimeEngine):
    """ONNX Runtime in the place of TensorRT: it runs the graph whose path the plan holds."""

    def __init__(
        self, path: Path, options: Any, *, precision: str, profiles: Any, host_code: bool, weights: Any
    ) -> None:
        here = EngineOptions(threads=1)
        super().__init__(Path(path.read_text()), here, precision=precision, profiles=profiles)
        self.name, self.use_graphs = "tensorrt", options.cuda_graphs
        open_engines.append(self)
        opened_on.append(options.device)

    def close(self) -> None:
        super().close()
        if self in open_engines:
            open_engines.remove(self)


def timings(*milliseconds: float) -> list[Timing]:
    return [Timing((value / 1000,)) for value in milliseconds]
