"""A TensorRT engine that shows what is inside: built like one of the bundle, with inner tensors as further outputs."""

from __future__ import annotations

from collections.abc import Sequence

from mae_deploy.files import temporary_folder
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.engines.base import EngineOptions
from mae_deploy.runtime.manifest import EngineEntry, plan_engine
from mae_deploy.runtime.profiles import Profile
from mae_deploy.runtime.tensorrt.build import build_plan
from mae_deploy.runtime.tensorrt.engine import TensorRtEngine, TensorRtRtxEngine, gpu_index
from mae_deploy.runtime.tensorrt.options import BuildOptions
from mae_deploy.runtime.tensorrt.plans import TENSORRT_RTX, graph_for


def open_tapped(bundle: Bundle, entry: EngineEntry, options: EngineOptions, taps: Sequence[str]) -> TensorRtEngine:
    """Build and load an engine like one of the bundle, with inner tensors as further outputs; it is not kept.

    Raises:
        CheckFailed: the graph is not what was exported.
        ConfigError: a tap is not a tensor of the network.
        MaeDeployError: TensorRT cannot build it.
    """
    profiles: list[Profile] = [
        {name: (sizes[0], sizes[1], sizes[2]) for name, sizes in profile.items()} for profile in entry["profiles"]
    ]
    precision, rtx = entry["precision"], plan_engine(entry) == TENSORRT_RTX
    graph = bundle.graph(graph_for(bundle, precision))
    level = entry["build"].get("options", {}).get("optimization_level")
    with temporary_folder() as folder:
        plan = build_plan(
            graph,
            folder / "tapped.plan",
            precision=precision,
            typing=bundle.manifest["typing"],
            profiles=profiles,
            options=BuildOptions(optimization_level=level),
            index=gpu_index(options.device),
            rtx=rtx,
            outputs_marked=taps,
        )
        return (TensorRtRtxEngine if rtx else TensorRtEngine)(
            plan.file, options, precision=precision, taps=taps, profiles=profiles
        )
