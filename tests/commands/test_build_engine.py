"""`mae-deploy build-engine` as it is typed, on a machine without a GPU; what it builds is tested in tests/gpu."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mae_deploy.cli import main
from mae_deploy.commands import build_engine as command
from mae_deploy.errors import CheckFailed, MissingDependency
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.tensorrt.add_engine import Built
from tests.runtime.tensorrt.planned_bundle import PLAN_FILE, RTX, planned
from tests.runtime.tiny_bundle import write_bundle
from tests.test_cli import TRAINING, run_without


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "a[" / "x]")


@pytest.fixture
def without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(index: int) -> None:
        raise MissingDependency("there is no NVIDIA driver on this machine", hint="install it")

    monkeypatch.setattr(command, "load_tensorrt", missing)


def build_record(**changes: Any) -> dict[str, Any]:
    kernels = {"layers": 30, "fused_attention": 12, "precisions": {"int8": 20, "fp32": 10}}
    return {"seconds": 61.4, "size": 7_000_000, "kernels": kernels, "warnings": ["w"], **changes}


def fake(monkeypatch: pytest.MonkeyPatch, path: Path, **changes: Any) -> dict[str, Any]:
    """Let the command find that an engine was built, and return what it asks for."""
    entry = planned(path).manifest["engines"][0]
    entry["build"] = build_record()
    entry["parity"] = {"checks": 40, "sizes": ["profile 0 min, B=1, K=1"]}
    asked: dict[str, Any] = {}

    def build(bundle: Bundle, **given: Any) -> Built:
        asked.update(given, bundle=bundle.path)
        given["on_progress"]("fp16: tactics", 0.5)
        return Built(**{"entry": entry, "checks": (), "baseline": None, "rejected": None, **changes})

    monkeypatch.setattr(command, "load_tensorrt", lambda index: asked.update(index=index))
    monkeypatch.setattr(command, "build_engine", build)
    return asked


def test_without_a_gpu_it_says_so(bundle: Path, without_a_gpu: None, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(path.name for path in bundle.rglob("*"))
    assert main(["build-engine", str(bundle)]) == 3
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "error: there is no NVIDIA driver on this machine\nhint: install it\n")
    assert sorted(path.name for path in bundle.rglob("*")) == before


def test_what_is_asked_for(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = fake(monkeypatch, tmp_path / "other")
    arguments = [
        "--precision",
        "int8",
        "--profile",
        "B:1,1,1 K:4,4,4; B:8,8,8",
        "--prefer",
        "fp16",
        "--workspace",
        "512",
        "--optimization-level",
        "2",
    ]
    arguments += [
        "--timing-cache",
        "off",
        "--hardware-compatible",
        "ampere",
        "--version-compatible",
        "--strip",
        "--refit",
        "--device",
        "cuda:1",
    ]
    assert main(["build-engine", str(bundle), *arguments, "--json"]) == 0
    assert (asked["bundle"], asked["precision"], asked["prefer"]) == (bundle, "int8", "fp16")
    assert (asked["index"], asked["device"]) == (1, "cuda:1")
    assert asked["profiles"] == [{"B": (1, 1, 1), "K": (4, 4, 4)}, {"B": (8, 8, 8)}]
    options = asked["options"]
    assert (options.workspace, options.optimization_level, options.timing_cache, options.hardware_compatible) == (
        512,
        2,
        "off",
        "ampere",
    )
    assert (options.version_compatible, options.strip, options.refit) == (True, True, True)
    found = json.loads(capsys.readouterr().out)
    assert (found["bundle"], found["file"], found["latency_ms"], found["rejected"]) == (
        str(bundle),
        PLAN_FILE,
        0.5,
        None,
    )


def test_a_device_that_is_none(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build-engine", str(bundle), "--device", "gpu1"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown device 'gpu1'\nhint: cuda is the first GPU, cuda:1")


def test_for_people(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    speed = {"latency_ratio": 1.25, "profile": 0, "latency_ms": {"int8": [2.5], "fp16": [2.0]}}
    fake(monkeypatch, tmp_path / "other", baseline=speed, rejected="INT8 is rejected: it is not faster")
    assert main(["build-engine", str(bundle)]) == 0
    captured = capsys.readouterr()
    words = " ".join(captured.out.split())
    for expected in (
        "fp16, TensorRT 10.3.0, Orin, B:1,8,32 K:1,4,21, 0.50 ms",
        "7 MB, built in 1 min",
        "30 layers, 12 of them fused attention; 20 int8, 10 fp32",
        "40 checks passed: profile 0 min, B=1, K=1",
        "1.25 of its latency",
    ):
        assert expected in words, expected
    assert "FP16 is kept: INT8 is rejected: it is not faster" in captured.err


def test_an_engine_that_is_refused(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake(monkeypatch, tmp_path / "other")

    def refuse(*_: Any, **__: Any) -> Any:
        raise CheckFailed(
            "INT8 is rejected: it is not faster; it takes 1.20 of FP16's latency, 1.200 against 1.000 ms",
            hint="--prefer fp16",
        )

    monkeypatch.setattr(command, "build_engine", refuse)
    assert main(["build-engine", str(bundle)]) == 1
    assert capsys.readouterr().err.endswith("1.200 against 1.000 ms\nhint: --prefer fp16\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--profile", "B:2,1,3"], "--profile 'B:2,1,3' is not min,opt,max"),
        (["--workspace", "0"], "--workspace must be at least 1, got 0"),
        (["--optimization-level", "7"], "--optimization-level must be at least 0 and at most 5, got 7"),
        (["--precision", "fp32", "--prefer", "fp16"], "--prefer fp16 does not go with --precision fp32"),
    ],
)
def test_usage(bundle: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build-engine", str(bundle), *arguments]) == 2
    assert said in capsys.readouterr().err.splitlines()[0]


def test_no_bundle_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build-engine", str(tmp_path / "none")]) == 2
    assert "no bundle at" in capsys.readouterr().err


def test_without_the_training_packages(bundle: Path) -> None:
    done = run_without((*TRAINING, "onnx", "tensorrt"), "build-engine", str(bundle))
    assert done.returncode == 3, "a driver, a GPU or tensorrt is missing, but not torch"
    assert "torch" not in done.stderr
    assert len(done.stderr.splitlines()) <= 2


def rtx(monkeypatch: pytest.MonkeyPatch, path: Path, **entry: Any) -> dict[str, Any]:
    """Let the command find that TensorRT for RTX built an engine, with no TensorRT and no GPU."""
    asked = fake(monkeypatch, path)
    monkeypatch.delattr(command, "load_tensorrt")
    monkeypatch.setattr(command, "load_builder", lambda: None)
    build: Any = vars(command)["build_engine"]

    def build_engine(*given: Any, **more: Any) -> Built:
        built: Built = build(*given, **more)
        return replace(built, entry={**built.entry, **RTX, **entry})  # type: ignore[typeddict-item]

    monkeypatch.setattr(command, "build_engine", build_engine)
    return asked


@pytest.mark.parametrize("chosen", [True, False], ids=["asked for", "of the bundle"])
def test_tensorrt_for_rtx_without_a_gpu(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], chosen: bool
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    asked = rtx(monkeypatch, tmp_path / "other")
    if not chosen:
        bundle = write_bundle(tmp_path / "made", change=lambda manifest: manifest.update(engine="tensorrt-rtx"))
    assert main(["build-engine", str(bundle), *(["--engine", "trt-rtx"] if chosen else [])]) == 0
    captured = capsys.readouterr()
    assert asked["rtx"] is True
    words = " ".join(captured.out.split())
    assert (
        "fp16, TensorRT for RTX 1.7.1.116, RTX GPUs from compute capability 8.0 on, B:1,8,32 K:1,4,21, not verified"
        in words
    )
    assert "kernels made on each device" in words
    assert "not verified: no GPU has run it yet, the first one that loads it checks it" in captured.err


def test_tensorrt_for_rtx_that_was_checked_here(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    parity = {"NVIDIA GeForce RTX 4090": {"checks": 40, "sizes": ["profile 0 min, B=1, K=1"]}}
    rtx(monkeypatch, tmp_path / "other", parity=parity, latency_ms=0.25)
    assert main(["build-engine", str(bundle), "--engine", "trt-rtx"]) == 0
    captured = capsys.readouterr()
    words = " ".join(captured.out.split())
    assert "0.25 ms, verified on NVIDIA GeForce RTX 4090" in words
    assert "40 checks passed: profile 0 min, B=1, K=1" in words
    assert "not verified" not in captured.err


@pytest.mark.parametrize("option", ["--triton", "--deepstream"])
def test_servers_do_not_run_tensorrt_for_rtx(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    monkeypatch.setattr(command, "check_bundle", lambda bundle: None)
    path = write_bundle(tmp_path / "full", token_mode="full")
    assert main(["build-engine", str(path), "--engine", "trt-rtx", option, str(tmp_path / "out")]) == 2
    assert "servers run engines of TensorRT, not of TensorRT for RTX" in capsys.readouterr().err
