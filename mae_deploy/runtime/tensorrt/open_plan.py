"""A bundle's TensorRT engine, opened: its hash checked before TensorRT sees a byte of it, its weights put back where
they were left out.
"""

from __future__ import annotations

from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.engines.base import EngineOptions
from mae_deploy.runtime.manifest import EngineEntry, plan_engine
from mae_deploy.runtime.tensorrt.engine import TensorRtEngine, TensorRtRtxEngine
from mae_deploy.runtime.tensorrt.plans import TENSORRT_RTX, graph_for


def open_plan(bundle: Bundle, entry: EngineEntry, options: EngineOptions) -> TensorRtEngine:
    """Load an engine of the bundle.

    Raises:
        CheckFailed: the plan, or the graph that a stripped one needs, is not the file that was built.
        MissingDependency: neither pycuda nor cuda-bindings is there.
        MaeDeployError: TensorRT refuses the plan.
    """
    plan = bundle.file(entry["file"])
    weights = bundle.graph(graph_for(bundle, entry["precision"])) if entry["stripped"] else None
    kind = TensorRtRtxEngine if plan_engine(entry) == TENSORRT_RTX else TensorRtEngine
    return kind(
        plan,
        options,
        precision=entry["precision"],
        profiles=entry["profiles"],
        host_code=entry["version_compatible"],
        weights=weights,
    )
