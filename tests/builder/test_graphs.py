"""Every kind of graph is read by NVIDIA's parser, and what is strongly typed is built, without a word of complaint."""

from __future__ import annotations

from pathlib import Path

import pytest

from mae_deploy.runtime.onnx_file import read_inputs
from mae_deploy.runtime.profiles import Profile
from mae_deploy.runtime.tensorrt import build
from mae_deploy.runtime.tensorrt.api import Api
from mae_deploy.runtime.tensorrt.options import BuildOptions
from tests.builder.kinds import Kind, kinds

EXPECTED = ("Make sure input ids_keep has Int64 binding", "Make sure input num_keep has Int64 binding")
"""Warnings that say what is meant so: indices are int64."""


@pytest.mark.parametrize("kind", [pytest.param(kind, id=kind.name) for kind in kinds()])
def test_a_graph_is_read_and_built(api: Api, kind: Kind, tmp_path: Path) -> None:
    graph = kind.write(tmp_path / "graph.onnx")
    api.said.clear()
    builder = api.module.Builder(api.logger)
    network, parser = build._parsed(api, builder, graph, strong=True)
    assert network.num_outputs > 0
    if kind.typing == "strong":
        config, _ = build._config(api, builder, kind.precision, "strong", BuildOptions(timing_cache="off"))
        profile: Profile = {"B": (1, 2, 4), "K": (2, 6, kind.tokens)}
        build._add_profiles(api, builder, config, read_inputs(graph), [profile])
        plan = build._build(api, builder, network, config, None, None)
        assert plan.nbytes > 1000
    del parser
    assert [said for said in api.warnings if not any(known in said for known in EXPECTED)] == []
