"""Engines of cached graphs: built, checked at every size, and run as streams; on the module that stands for TensorRT,
and with ONNX Runtime in its place.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from mae_deploy.cli import main
from mae_deploy.errors import CheckFailed, ConfigError
from mae_deploy.images.read import Array
from mae_deploy.runtime import Backbone
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.cache import CacheShape, Sequences, last_update
from mae_deploy.runtime.engines.base import EngineOptions
from mae_deploy.runtime.profiles import Profile
from mae_deploy.runtime.tensorrt import api as tensorrt_api
from mae_deploy.runtime.tensorrt import engine as tensorrt_engine
from mae_deploy.runtime.tensorrt.add_engine import build_engine, resolve_profiles
from mae_deploy.runtime.tensorrt.check_plan import check_plan, expected_outputs, golden_keeps, inputs_at
from mae_deploy.runtime.tensorrt.engine import TensorRtEngine
from tests.export.tiny_exports import write_checkpoint
from tests.models.tiny_models import ENCODER, tiny_encoder
from tests.runtime.cuda.stub_driver import StubMemory
from tests.runtime.tensorrt import fake_tensorrt as fake
from tests.runtime.tensorrt.on_graph import OnGraph

PROFILES: list[Profile] = [{"B": (1, 2, 3), "K": (2, 5, ENCODER.num_patches)}]
SHAPE = CacheShape(
    num_patches=fake.N,
    depth=1,
    num_heads=fake.HEADS,
    embed_dim=fake.HEADS * fake.WIDTH,
    dtype="float16",
    fixed_rows=True,
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`trt` and `onnx`: a cached bundle for each."""
    root = tmp_path_factory.mktemp("planned")
    checkpoint = write_checkpoint(root / "checkpoint", tiny_encoder())
    for name, options in {"trt": ["--engine", "trt", "--no-build", "--batch", "dynamic"], "onnx": []}.items():
        assert main(["export", str(checkpoint), "--out", str(root / name), "--tokens", "cached", *options]) == 0
    return root


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Bundle:
    """One to which an engine can be added."""
    copy = tmp_path / "bundle"
    copy.mkdir()
    for path in (exported / "trt").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return Bundle.load(copy)


# --- on the module that stands for TensorRT -------------------------------------------------------------------------


class Numpy:
    """The network of streams as an engine."""

    profiles: Sequence[Mapping[str, Sequence[int]]] = ()
    in_flight = 1
    input_names = ("ids_keep", "patches", "cache_mask", "keys_0", "values_0")
    output_names = ("cls", "tokens", "new_rows")

    def submit(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> Any:
        found = fake.stream_reference(**inputs)
        return SimpleNamespace(result=lambda: {name: found[name] for name in outputs})


def sequences(samples: int, *lengths: int) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    ids = [np.concatenate([rng.permutation(fake.N)[:length] for length in lengths]) for _ in range(samples)]
    return {
        "patches": rng.normal(size=(samples, sum(lengths), fake.PIXELS)).astype(np.float32),
        "ids_keep": np.stack(ids),
        "updates": np.tile(np.array(lengths), (samples, 1)),
    }


@pytest.mark.parametrize("graphs", [True, False])
def test_updates_reach_the_gpu_and_their_rows_the_next_one(
    stub_driver: ctypes.CDLL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, graphs: bool
) -> None:
    monkeypatch.setattr(tensorrt_api, "_loaded", {})
    monkeypatch.setitem(sys.modules, "tensorrt", fake.make_tensorrt(stub_driver))
    monkeypatch.setattr(tensorrt_engine, "open_memory", lambda *_: StubMemory(stub_driver))
    profiles = [{"B": (1, 1, 1), "K": (fake.N, fake.N, fake.N)}, {"B": (2, 2, 2), "K": (1, 3, 5)}]
    (tmp_path / "a.plan").write_bytes(fake.plan(*profiles, streams=True))
    given = sequences(5, fake.N, 3, 3, 5, 3)
    expected = Sequences(cast(Any, Numpy()), SHAPE).run(given, ["cls", "tokens"])
    with TensorRtEngine(tmp_path / "a.plan", EngineOptions(cuda_graphs=graphs), profiles=profiles) as engine:
        assert set(engine.input_names) == set(Numpy.input_names)
        found = Sequences(engine, SHAPE).run(given, ["cls", "tokens"])
        with pytest.raises(ConfigError, match=r"takes no ids_keep \(1, 6\), .*, cache_mask \(1, 8\); it"):
            Sequences(engine, SHAPE).run(sequences(1, 6))
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)
    assert np.ptp(expected["cls"]) > 0


def test_the_update_that_is_timed_attends_to_a_full_cache() -> None:
    given = last_update(sequences(2, 4, 3), SHAPE, Numpy.input_names)
    assert set(given) == set(Numpy.input_names)
    np.testing.assert_array_equal(given["ids_keep"], sequences(2, 4, 3)["ids_keep"][:, 4:])
    assert (given["cache_mask"].sum(axis=1) == fake.N - 3).all()


# --- with ONNX Runtime in its place ---------------------------------------------------------------------------------


def test_only_a_graph_that_takes_all_rows_is_built(exported: Path) -> None:
    (profile,) = resolve_profiles(Bundle.load(exported / "trt"), [])
    assert profile["K"][2] == ENCODER.num_patches
    with pytest.raises(ConfigError, match="leaves open how many rows of the cache it takes"):
        resolve_profiles(Bundle.load(exported / "onnx"), [])
    with pytest.raises(ConfigError, match=f"no --profile holds K = {ENCODER.num_patches}, with which the golden"):
        resolve_profiles(Bundle.load(exported / "trt"), [{"K": (1, 2, 5)}])


def test_an_engine_of_streams_is_checked_at_every_size_and_kept(bundle: Bundle, without_a_gpu: Any) -> None:
    built = build_engine(bundle, profiles=PROFILES)
    names = {check.name for check in built.checks}
    assert {"golden", "repeated update", "permuted ids_keep", "sample alone"} <= names
    N = ENCODER.num_patches
    sizes = [f"profile 0 {size}" for size in ("min, B=1, K=2", "opt, B=2, K=5", f"max, B=3, K={N}")]
    assert built.entry["parity"]["sizes"] == [*sizes, *(f"{size}, CUDA graph" for size in sizes)]
    assert built.entry["profiles"] == [{"B": [1, 2, 3], "K": [2, 5, N]}]


@pytest.mark.parametrize("wrong", ["tokens", "new_rows"])
def test_an_engine_that_is_wrong_at_one_size_is_not_kept(
    wrong: str, bundle: Bundle, without_a_gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong rows are found at the update after them."""
    right = OnGraph._run

    def run(engine: OnGraph, inputs: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        found = right(engine, inputs, outputs)
        if inputs["ids_keep"].shape == (2, 5):
            found[wrong] = found[wrong] * np.float32(1.01)
        return found

    monkeypatch.setattr(OnGraph, "_run", run)
    with pytest.raises(CheckFailed, match=r"misses parity: .*profile 0 opt, B=2, K=5"):
        build_engine(bundle, profiles=PROFILES)
    assert Bundle.load(bundle.path).manifest["engines"] == []


def test_without_a_reference_the_golden_streams_judge_the_batches_that_hold_them(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mae_deploy.runtime.tensorrt.check_plan._is_computed_by_onnxruntime", lambda _: False)
    N, usual = ENCODER.num_patches, golden_keeps(bundle)[-1]
    profiles: list[Profile] = [{"B": (1, 1, 1), "K": (usual, usual, usual)}, {"B": (2, 2, 2), "K": (usual, usual, N)}]
    file = bundle.path / "plan"
    file.write_text(str(bundle.graph()))
    with OnGraph(file, EngineOptions(), precision="fp32", profiles=profiles, host_code=False, weights=None) as engine:
        checks = check_plan(bundle, cast(Any, engine), profiles, expected_outputs(bundle, profiles))
    assert not any(check.failures for check in checks)
    # At B = 1 there is no profile for the whole frames with which the golden streams begin.
    assert {check.name.partition(",")[0] for check in checks if "profile" in check.name} == {"profile 1 min"}


def test_samples_of_any_size_are_two_updates(bundle: Bundle) -> None:
    found = inputs_at(bundle, bundle.golden(), 4)
    assert found["ids_keep"].shape[1] == found["patches"].shape[1] == 8
    assert (found["updates"] == 4).all()
    assert all(len(set(half)) == 4 for row in found["ids_keep"].tolist() for half in (row[:4], row[4:]))


def test_a_stream_runs_on_its_engine_as_on_the_graph(
    bundle: Bundle, exported: Path, without_a_gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_engine(bundle, profiles=PROFILES)
    frames = np.random.default_rng(0).integers(0, 256, (4, *ENCODER.image_size, 3), np.uint8)
    frames[1:, : ENCODER.patch] = frames[0, : ENCODER.patch]
    options: dict[str, Any] = {"bypass": 0.9, "audit": 0.0}
    file = bundle.path / bundle.manifest["engines"][0]["file"]
    planned = OnGraph(
        file,
        EngineOptions(),
        precision="fp32",
        profiles=bundle.manifest["engines"][0]["profiles"],
        host_code=False,
        weights=None,
    )
    with Backbone(bundle, planned) as mine, Backbone.load(exported / "onnx") as other:
        ours, theirs = mine.stream_pool(5, **options), other.stream_pool(5, **options)
        for frame in frames:
            for seen, expected in zip(ours([frame] * 5), theirs([frame] * 5), strict=True):
                np.testing.assert_allclose(seen.tokens, expected.tokens, atol=1e-5)
                np.testing.assert_array_equal(seen.keep, expected.keep)
