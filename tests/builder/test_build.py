"""What our build code asks of NVIDIA's builder: profiles, options, further outputs, progress, and failures in words."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import util
from pathlib import Path
from typing import Any

import pytest

from mae_deploy.errors import ConfigError, MaeDeployError
from mae_deploy.runtime.onnx_file import (
    GRAPH_INPUT,
    GRAPH_NAME,
    GRAPH_NODE,
    GRAPH_OUTPUT,
    encode,
    encode_model,
    encode_node,
    encode_value,
)
from mae_deploy.runtime.profiles import Profile
from mae_deploy.runtime.tensorrt import build
from mae_deploy.runtime.tensorrt.api import Api
from mae_deploy.runtime.tensorrt.build import Report
from mae_deploy.runtime.tensorrt.options import BuildOptions

if util.find_spec("tensorrt_rtx_bindings") is None:
    pytest.skip("make tensorrt fetches TensorRT for RTX", allow_module_level=True)

from tests.builder.kinds import kinds

OPEN: Profile = {"B": (1, 2, 4), "K": (2, 6, 24)}


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Graphs by name."""
    folder = tmp_path_factory.mktemp("graphs")
    names = ("strong-fp16-visible-Kopen-Bopen", "strong-fp16-visible-K6-B2", "strong-fp32-full-Kopen-Bopen")
    return {kind.name: kind.write(folder / f"{kind.name}.onnx") for kind in kinds() if kind.name in names}


def built(
    api: Api,
    graph: Path,
    folder: Path,
    *,
    precision: str = "fp16",
    profiles: Sequence[Profile] = (OPEN,),
    outputs: Sequence[str] = (),
    on_progress: Report | None = None,
    **options: Any,
) -> bytes:
    """The plan."""
    plan = folder / "built.plan"
    given = BuildOptions(**{"timing_cache": "off", **options})
    with api.explained("build it"):
        build._write_plan(api, graph, plan, precision, "strong", profiles, given, outputs, on_progress)
    return plan.read_bytes()


def test_several_profiles(api: Api, graphs: dict[str, Path], tmp_path: Path) -> None:
    graph = graphs["strong-fp16-visible-Kopen-Bopen"]
    one: Profile = {"B": (1, 1, 1), "K": (6, 6, 6)}
    assert len(built(api, graph, tmp_path, profiles=[one, OPEN])) > 1000


def test_fp32(api: Api, graphs: dict[str, Path], tmp_path: Path) -> None:
    assert len(built(api, graphs["strong-fp32-full-Kopen-Bopen"], tmp_path, precision="fp32")) > 1000


def test_open_sizes_without_a_profile_are_refused(api: Api, graphs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(MaeDeployError, match="cannot build"):
        built(api, graphs["strong-fp16-visible-Kopen-Bopen"], tmp_path, profiles=[])


def test_progress_rises_and_an_interrupt_ends_the_build(api: Api, graphs: dict[str, Path], tmp_path: Path) -> None:
    shares: list[float] = []
    graph = graphs["strong-fp16-visible-K6-B2"]
    built(api, graph, tmp_path, on_progress=lambda phase, share: shares.append(share))
    assert shares == sorted(shares)
    assert len(set(shares)) > 3

    def interrupt(phase: str, share: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        built(api, graph, tmp_path, on_progress=interrupt)


def test_further_outputs(api: Api, graphs: dict[str, Path], tmp_path: Path) -> None:
    graph = graphs["strong-fp16-visible-K6-B2"]
    assert len(built(api, graph, tmp_path, outputs=["blocks.0/mlp_residual"])) > 1000
    with pytest.raises(ConfigError, match="has no tensor 'nothing'"):
        built(api, graph, tmp_path, outputs=["nothing"])


def test_no_timings_are_kept_where_nothing_is_timed(api: Api, graphs: dict[str, Path], tmp_path: Path) -> None:
    assert built(api, graphs["strong-fp16-visible-K6-B2"], tmp_path, timing_cache=str(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"hardware_compatible": "ampere"},
        {"hardware_compatible": "same"},
        {"optimization_level": 0},
        {"optimization_level": 5},
        {"workspace": 64},
    ],
    ids=str,
)
def test_options(api: Api, graphs: dict[str, Path], tmp_path: Path, options: dict[str, Any]) -> None:
    assert len(built(api, graphs["strong-fp16-visible-K6-B2"], tmp_path, **options)) > 1000


@pytest.mark.parametrize("option", ["strip", "refit", "version_compatible"])
def test_options_that_need_a_gpu_or_another_library(
    api: Api, graphs: dict[str, Path], tmp_path: Path, option: str
) -> None:
    given: dict[str, Any] = {option: True}
    try:
        plan, said = built(api, graphs["strong-fp16-visible-K6-B2"], tmp_path, **given), ""
    except MaeDeployError as error:  # without them
        plan, said = b"", str(error)
    assert len(plan) > 1000 or "\n" not in said
    assert "gives no reason" not in said


def test_what_is_no_graph_is_refused_by_name(api: Api, tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_bytes(b"\xff" * 100)
    with pytest.raises(MaeDeployError, match=r"cannot read .*text\.onnx"):
        build._parsed(api, api.module.Builder(api.logger), tmp_path / "text.onnx", strong=True)


def test_an_unknown_operator_is_named(api: Api, tmp_path: Path) -> None:
    value = encode_value(b"x", 1, (2, 3))
    graph = (
        encode(GRAPH_NODE, encode_node(b"NoSuchOperator", [b"x"], b"y"))
        + encode(GRAPH_NAME, b"unknown")
        + encode(GRAPH_INPUT, value)
        + encode(GRAPH_OUTPUT, encode_value(b"y", 1, (2, 3)))
    )
    (tmp_path / "unknown.onnx").write_bytes(encode_model(graph))
    with pytest.raises(MaeDeployError, match="NoSuchOperator"):
        build._parsed(api, api.module.Builder(api.logger), tmp_path / "unknown.onnx", strong=True)
