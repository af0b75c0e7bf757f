"""What scripts/measure_gpu.py times on a GPU, on a small bundle."""

from __future__ import annotations

from pathlib import Path

import pytest

from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.tensorrt.add_engine import build_engine
from mae_deploy.runtime.tensorrt.api import Api
from mae_deploy.runtime.tensorrt.options import BuildOptions
from scripts.measure_gpu import BARE, REPLAY, main

pytestmark = pytest.mark.gpu


def test_an_engine_is_timed_on_the_gpu_from_the_host_and_bare(api: Api, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from tests.runtime.tiny_bundle import write_bundle

    bundle = Bundle.load(write_bundle(tmp_path / "bundle", token_mode="full"))
    build_engine(
        bundle,
        profiles=[{"B": (1, 1, 1)}, {"B": (4, 4, 4)}],
        options=BuildOptions(optimization_level=1, timing_cache="off", workspace=256),
    )
    rows = main([str(bundle.path), "--batch", "1", "4", "9", "--repeats", "5"])
    assert [(row["engine"], row["arrays"], row["batch"]) for row in rows] == [
        (engine, arrays, batch)
        for batch in (1, 4)
        for engine, arrays in (("tensorrt", "gpu"), ("tensorrt", "host"), (BARE, "gpu"), (REPLAY, "gpu"))
    ]
    assert all(row["p50_ms"] > 0 for row in rows)
