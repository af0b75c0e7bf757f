"""What tests of TensorRT share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mae_deploy.runtime.cuda.driver import Gpu
from mae_deploy.runtime.tensorrt import add_engine as engine_build
from mae_deploy.runtime.tensorrt.build import BuiltPlan
from mae_deploy.runtime.timing import Timing
from tests.runtime.tensorrt.on_graph import OnGraph, built_on, open_engines, timings


@pytest.fixture
def without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Timing]]:
    """Everything but TensorRT itself; the timings that are found can be changed."""
    gpu = Gpu(index=0, name="NVIDIA H200", compute_capability=(9, 0), memory_bytes=1 << 37, driver="12.4")
    found = {"int8": timings(1.0), "fp16": timings(2.0), "fp32": timings(4.0)}

    def plan_of(graph: Path, file: Path, **given: Any) -> BuiltPlan:
        assert not open_engines, "an engine on the GPU takes from what a build can have"
        built_on.append(given["index"])
        if given["on_progress"] is not None:
            given["on_progress"]("tactics", 1.0)
        options = {"hardware_compatible": "none", "version_compatible": False, "strip": False}
        file.write_text(str(graph))
        return BuiltPlan(file=file, layers=None, record={"precision": given["precision"], "options": options})

    monkeypatch.setattr(
        engine_build,
        "load_tensorrt",
        lambda index=0: type(
            "Api", (), {"version": "10.3.0", "title": "TensorRT 10.3.0", "gpu": replace(gpu, index=index)}
        ),
    )
    monkeypatch.setattr(engine_build, "build_plan", plan_of)
    monkeypatch.setattr(engine_build, "TensorRtEngine", OnGraph)
    monkeypatch.setattr(engine_build, "TensorRtRtxEngine", OnGraph)
    monkeypatch.setattr(engine_build, "_time", lambda *_: found)
    return found
