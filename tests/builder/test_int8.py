"""Products in INT8 are in no support matrix of TensorRT for RTX, which lists INT8 for weights alone; its builder takes
them all the same, for every GPU and for each (docs/tensorrt.md). Where this fails, a later version refuses them.
"""

from __future__ import annotations

from importlib import util
from pathlib import Path

import pytest

from mae_deploy.runtime.onnx_file import read_inputs
from mae_deploy.runtime.profiles import Profile
from mae_deploy.runtime.tensorrt import build
from mae_deploy.runtime.tensorrt.api import Api
from mae_deploy.runtime.tensorrt.options import BuildOptions

if util.find_spec("tensorrt_rtx_bindings") is None:
    pytest.skip("make tensorrt fetches TensorRT for RTX", allow_module_level=True)

from tests.builder.kinds import kinds


@pytest.mark.parametrize("target", [None, "SM86", "SM89", "SM120"])
@pytest.mark.parametrize("name", ["strong-int8-full-Kopen-B2", "strong-int8-full-attention"])
def test_products_in_int8_are_built(api: Api, tmp_path: Path, name: str, target: str | None) -> None:
    kind = next(kind for kind in kinds() if kind.name == name)
    trt, graph = api.module, kind.write(tmp_path / "graph.onnx")
    with api.explained("build it"):
        builder = trt.Builder(api.logger)
        network, parser = build._parsed(api, builder, graph, strong=True)
        config, _ = build._config(api, builder, "int8", "strong", BuildOptions(timing_cache="off"))
        if target is not None:
            config.num_compute_capabilities = 1
            config.set_compute_capability(getattr(trt.ComputeCapability, target), 0)
        profiles: list[Profile] = [{"B": (1, 2, 4)}]
        build._add_profiles(api, builder, config, read_inputs(graph), profiles)
        plan = build._build(api, builder, network, config, None, None)
        assert plan.nbytes > 1000
        del parser
        assert [said for said in api.warnings if "has Int64 binding" not in said] == []
