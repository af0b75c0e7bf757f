"""Every kind of graph is read by NVIDIA's parser, and what is strongly typed is built, without a word of complaint."""

from __future__ import annotations

from importlib import util
from pathlib import Path

import pytest

from mae_deploy.runtime.profiles import Profile
from mae_deploy.runtime.tensorrt import build
from mae_deploy.runtime.tensorrt.api import Api
from mae_deploy.runtime.tensorrt.options import BuildOptions

if util.find_spec("tensorrt_rtx_bindings") is None:
    pytest.skip("make tensorrt fetches TensorRT for RTX", allow_module_level=True)

from tests.builder.kinds import Kind, kinds

EXPECTED = "has Int64 binding"
"""A warning that says what is meant so: indices are int64."""


@pytest.mark.parametrize("kind", [pytest.param(kind, id=kind.name) for kind in kinds()])
def test_a_graph_is_read_and_built(api: Api, kind: Kind, tmp_path: Path) -> None:
    graph = kind.write(tmp_path / "graph.onnx")
    with api.explained("build it"):
        if kind.typing == "strong":
            profile: Profile = {"B": (1, 2, 4), "K": (2, 6, kind.tokens)}
            plan = tmp_path / "graph.plan"
            options = BuildOptions(timing_cache="off")
            build._write_plan(api, graph, plan, kind.precision, "strong", [profile], options, (), None)
            assert plan.stat().st_size > 1000
        else:
            network, parser = build._parsed(api, api.module.Builder(api.logger), graph, strong=False)
            assert network.num_outputs > 0
            del parser
        assert [said for said in api.warnings if EXPECTED not in said] == []
