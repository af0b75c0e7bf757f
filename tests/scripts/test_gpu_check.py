"""The logic of scripts/gpu_check.sh that needs no GPU: which steps there are, what runs again, and what the report
says.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mae_deploy.commands.config import BuildEngineConfig, VerifyConfig
from mae_deploy.export.config import ExportConfig
from mae_deploy.files import read_json
from mae_deploy.images.find import find_images
from mae_deploy.options import flags_of
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.cuda.driver import Gpu
from mae_deploy.runtime.tensorrt import api as tensorrt_api
from scripts import gpu_check
from scripts.gpu_check import Machine, Outcome, Settings, State, Step, plan, read_settings, run_command, run_steps
from scripts.gpu_check_report import markdown, ratios, report
from scripts.gpu_check_speed import BARE, Candidate, RawCalls, random_inputs, timed
from tests.runtime.cuda.stub_driver import StubMemory
from tests.runtime.tensorrt.fake_tensorrt import C, H, W, make_tensorrt, reference
from tests.runtime.tensorrt.fake_tensorrt import plan as fake_plan
from tests.runtime.tiny_bundle import K, N, write_bundle

EVERYTHING = ("gpu", "export", "pytest", "pytorch", "tensorrt", "onnxruntime")


def machine(*have: str, gpu: str = "NVIDIA H200", tensorrt: str = "8.6.0") -> Machine:
    """A machine that has these of `EVERYTHING`."""
    found = (
        Gpu(index=0, name=gpu, compute_capability=(9, 0), memory_bytes=1 << 37, driver="12.4")
        if "gpu" in have
        else None
    )
    versions = {name: tensorrt if name == "tensorrt" else "1.0" for name in have}
    return Machine(
        gpu=found, versions=versions, lacks={name: f"no {name} here" for name in EVERYTHING if name not in have}
    )


def settings(folder: Path, *options: str) -> Settings:
    return read_settings(["--state", str(folder / "state"), "--out", str(folder / "out"), *options])


# --- the plan --------------------------------------------------------------------------------------------------------


def test_steps_of_a_model_come_in_order(tmp_path: Path) -> None:
    steps = plan(settings(tmp_path, "--models", "huge", "--precisions", "fp16"), machine(*EVERYTHING))
    names = ["export", "build", "verify"]
    assert [step.name for step in steps] == [
        "tests",
        "images",
        "weights/huge",
        *(f"{name}/huge-full-fp16" for name in names),
        *(f"{name}/huge-visible-fp16" for name in names),
        "speed/huge/pytorch+tensorrt",
    ]


def test_smallest_models_come_first_and_only_what_is_asked_for(tmp_path: Path) -> None:
    steps = plan(settings(tmp_path, "--models", "base,tiny", "--only", "build,speed"), machine("gpu", "tensorrt"))
    assert [step.name for step in steps if step.kind == "speed"] == ["speed/tiny/tensorrt", "speed/base/tensorrt"]
    assert {step.kind for step in steps} == {"build", "speed"}


def test_export_command(tmp_path: Path) -> None:
    random = gpu_check.export_command("huge-visible-int8", settings(tmp_path, "--typing", "weak"), on_gpu=False)
    text = " ".join(random)
    assert "--tokens visible:64 " in text
    assert "--typing weak" in text
    assert "--no-build" in text
    assert "--no-search" in text
    trained = gpu_check.export_command(
        "base-full-int8", settings(tmp_path, "--checkpoint", f"base={tmp_path}"), on_gpu=True
    )
    assert trained[2] == str(tmp_path)
    assert "--no-search" not in trained, "the budget of trained weights is the usual one"
    assert "--calib-data" in trained


def test_commands_and_options_exist(tmp_path: Path) -> None:
    commands = {
        ExportConfig: gpu_check.export_command("tiny-full-int8", settings(tmp_path), on_gpu=False),
        BuildEngineConfig: gpu_check.build_command(tmp_path),
        VerifyConfig: gpu_check.verify_command(tmp_path),
    }
    for config, command in commands.items():
        known = {"--json", *(flag.name for flag in flags_of(config))}
        assert {word.replace("--no-", "--") for word in command if word.startswith("--")} <= known


@pytest.mark.parametrize(
    "options",
    [("--models", "giant"), ("--checkpoint", "giant=."), ("--checkpoint", "base=nowhere"), ("--only", "tests,giant")],
)
def test_what_is_not_there_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        settings(tmp_path, *options)
    assert options[1].split(",")[-1] in capsys.readouterr().err


# --- running and resuming --------------------------------------------------------------------------------------------


class Work:
    """Steps that count how often they run."""

    def __init__(self, folder: Path) -> None:
        self.runs: list[str] = []
        self.outcomes: dict[str, Outcome] = {}
        self.product = folder / "product"

    def steps(self) -> list[Step]:
        return [
            Step(
                name="export/a", needs=("export",), product=self.product, run=self.does("export/a", self.product.mkdir)
            ),
            Step(name="build/a", needs=("gpu", "tensorrt"), after=("export/a",), run=self.does("build/a")),
            Step(name="verify/a", needs=("gpu", "tensorrt"), after=("build/a",), run=self.does("verify/a")),
        ]

    def does(self, name: str, action: Callable[[], object] = lambda: None) -> Callable[[], Outcome]:
        def run() -> Outcome:
            self.runs.append(name)
            action()
            return self.outcomes.get(name, Outcome(status="done", result=[name]))

        return run


def go(work: Work, folder: Path, here: Machine) -> dict[str, str]:
    work.runs.clear()
    return run_steps(work.steps(), State(folder), here, lambda text: None)


def test_a_second_run_does_nothing(tmp_path: Path) -> None:
    work = Work(tmp_path)
    assert go(work, tmp_path, machine(*EVERYTHING)) == {}
    assert work.runs == ["export/a", "build/a", "verify/a"]
    assert go(work, tmp_path, machine(*EVERYTHING)) == {}
    assert work.runs == []


def test_failures_run_again_and_hold_up_what_follows(tmp_path: Path) -> None:
    work = Work(tmp_path)
    work.outcomes["build/a"] = Outcome(status="failed", message="out of memory")
    assert go(work, tmp_path, machine(*EVERYTHING)) == {"verify/a": "waits for build/a"}
    work.outcomes.clear()
    go(work, tmp_path, machine(*EVERYTHING))
    assert work.runs == ["build/a", "verify/a"]


def test_what_is_done_on_another_gpu_or_version_runs_again(tmp_path: Path) -> None:
    work = Work(tmp_path)
    go(work, tmp_path, machine(*EVERYTHING))
    go(work, tmp_path, machine(*EVERYTHING, gpu="NVIDIA H100"))
    assert work.runs == ["build/a", "verify/a"]
    go(work, tmp_path, machine(*EVERYTHING, gpu="NVIDIA H100", tensorrt="10.3.0"))
    assert work.runs == ["build/a", "verify/a"]


def test_what_follows_a_step_that_ran_again_runs_again(tmp_path: Path) -> None:
    work = Work(tmp_path)
    go(work, tmp_path, machine(*EVERYTHING))
    (tmp_path / "steps" / "build.a.json").unlink()
    go(work, tmp_path, machine(*EVERYTHING))
    assert work.runs == ["build/a", "verify/a"]


def test_parts_are_done_on_two_machines(tmp_path: Path) -> None:
    work = Work(tmp_path)
    missing = go(work, tmp_path, machine("gpu", "export", "pytorch"))
    assert work.runs == ["export/a"]
    assert missing == dict.fromkeys(("build/a", "verify/a"), "needs tensorrt: no tensorrt here")
    go(work, tmp_path, machine("gpu", "tensorrt"))
    assert work.runs == ["build/a", "verify/a"], "the bundle made elsewhere is there"


def test_a_rejected_engine_is_an_answer(tmp_path: Path) -> None:
    work = Work(tmp_path)
    work.outcomes["build/a"] = Outcome(status="rejected", message="INT8 is rejected: it is not faster")
    assert go(work, tmp_path, machine(*EVERYTHING)) == {"verify/a": "build/a was rejected"}
    go(work, tmp_path, machine(*EVERYTHING))
    assert work.runs == []


@pytest.mark.parametrize(
    ("command", "code", "said", "status", "message"),
    [
        ("build-engine", 0, "", "done", ""),
        (
            "build-engine",
            1,
            "error INT8 is rejected: it is not faster; it takes 1.20",
            "rejected",
            "INT8 is rejected: it is not faster; it takes 1.20",
        ),
        ("build-engine", 1, "error TensorRT 8.6.0 cannot build", "failed", "error TensorRT 8.6.0 cannot build"),
        ("verify", 1, "", "failed", "exit code 1"),
    ],
)
def test_what_a_command_says_becomes_an_outcome(
    monkeypatch: pytest.MonkeyPatch, command: str, code: int, said: str, status: str, message: str
) -> None:
    monkeypatch.setattr(
        subprocess, "run", lambda words, **_: subprocess.CompletedProcess(words, code, '{"passed": true}', said)
    )
    outcome = run_command(["mae-deploy", command, "bundle"])
    assert (outcome.status, outcome.message) == (status, message)
    assert outcome.result == ({"passed": True} if status == "done" else None)


def test_without_a_gpu_it_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "survey", lambda: machine("export", "pytest"))
    assert gpu_check.main(["--state", str(tmp_path / "state"), "--out", str(tmp_path / "out")]) == 3
    said = capsys.readouterr().err
    assert "no gpu: no gpu here" in said
    assert "no tensorrt: no tensorrt here" in said
    assert not list(tmp_path.iterdir())


def test_images_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "_NUM_IMAGES", 2)
    monkeypatch.setattr(gpu_check, "survey", lambda: machine("export"))
    assert gpu_check.main(["--state", str(tmp_path / "state"), "--only", "images"]) == 0
    assert len(find_images(tmp_path / "state" / "images")) == 2


# --- timing and the report -------------------------------------------------------------------------------------------


def test_candidates_that_take_a_batch_size_take_turns() -> None:
    seen: list[tuple[str, int]] = []

    def make(name: str, batch: int) -> Callable[[], object] | None:
        return None if (name, batch) == ("b", 8) else lambda: seen.append((name, batch))

    candidates: list[Candidate] = [
        ({"engine": name}, lambda batch, name=name: make(name, batch)) for name in ("a", "b")
    ]  # type: ignore[misc]
    rows = timed(candidates, [1, 8], repeats=3)
    assert [(row["engine"], row["batch"], row["calls"]) for row in rows] == [("a", 1, 3), ("b", 1, 3), ("a", 8, 3)]
    assert seen[:4] == [("a", 1), ("b", 1), ("a", 1), ("b", 1)]


def test_random_inputs_are_those_of_the_bundle(tmp_path: Path) -> None:
    inputs = random_inputs(Bundle.load(write_bundle(tmp_path / "bundle", token_mode="visible", keep=K)), 3)
    assert inputs["images"].shape[0] == 3
    assert inputs["ids_keep"].shape == (3, K)
    assert all(len(set(row)) == K and max(row) < N for row in inputs["ids_keep"].tolist())


def test_bare_calls_compute(stub_driver: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_api, "_loaded", {})
    trt = make_tensorrt(stub_driver)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    rng = np.random.default_rng(0)
    given: dict[str, Any] = {
        "images": rng.standard_normal((2, C, H, W), np.float32),
        "ids_keep": rng.integers(0, 9, (2, 3)),
    }
    with StubMemory(stub_driver) as memory:
        raw = RawCalls(tensorrt_api.load_tensorrt(), memory, fake_plan())
        call = raw.call(given)
        assert call is not None
        call()
        (context,) = [weak.context for weak in trt.contexts if weak.context is not None]
        found = np.ctypeslib.as_array((ctypes.c_float * (2 * C)).from_address(context.addresses["cls"]))
        np.testing.assert_allclose(found.reshape(2, C), reference(**given)["cls"], rtol=1e-6)
        assert raw.call({name: np.repeat(array, 4, axis=0) for name, array in given.items()}) is None, (
            "no profile holds eight"
        )
        del call, context
        raw.close()
        assert not any(weak.context for weak in trt.contexts), "they go before the memory"


def row(
    engine: str, tokens: str, batch: int, p50_ms: float, *, precision: str = "fp16", source: str = "pytorch+tensorrt"
) -> dict[str, Any]:
    arrays = {"engine": engine, "version": "1", "precision": precision, "tokens": tokens, "arrays": "gpu"}
    return {
        **arrays,
        "batch": batch,
        "p50_ms": p50_ms,
        "p95_ms": 2 * p50_ms,
        "images_per_second": 1000 * batch / p50_ms,
        "source": source,
    }


ROWS = [
    row("tensorrt", "full", 1, 1.0),
    row(BARE, "full", 1, 0.97),
    row("tensorrt", "full", 32, 8.0),
    row("tensorrt", "visible", 32, 2.0),
    row("tensorrt", "full", 32, 6.4, precision="int8"),
    row("pytorch", "full", 1, 1.4),
    row("torch.compile", "full", 32, 9.6),
]


def test_ratios_are_of_the_right_rows() -> None:
    found = {ratio.what: ratio for ratio in ratios("base", ROWS)}
    figures = {what: (round(ratio.value, 3), ratio.met, ratio.in_turns) for what, ratio in found.items()}
    assert figures == {
        "visible patches over all, FP16, batch 32": (4.0, True, True),
        "TensorRT FP16 over PyTorch eager FP16, batch 1": (1.4, False, True),
        "TensorRT FP16 over torch.compile FP16, batch 32": (1.2, True, True),
        "TensorRT INT8 over FP16, batch 32": (1.25, None, True),
        "a call above TensorRT's bare enqueue, FP16, batch 1": (30.0, True, True),
    }


def test_rows_of_two_processes_are_said_to_be_so() -> None:
    rows = [{**found, "source": "tensorrt" if found["engine"].startswith("tensorrt") else "pytorch"} for found in ROWS]
    in_turns = {ratio.what.split(",")[0]: ratio.in_turns for ratio in ratios("tiny", rows)}
    assert in_turns["visible patches over all"]
    assert not in_turns["TensorRT FP16 over PyTorch eager FP16"]


def test_the_report_has_every_figure(tmp_path: Path) -> None:
    here = machine(*EVERYTHING)
    state = State(tmp_path)
    speed = [{key: value for key, value in found.items() if key != "source"} for found in ROWS]
    entry = {"build": {"seconds": 12.3, "size": 44_000_000, "kernels": {"fused_attention": 12}}}
    outcomes = {
        "build/base-full-fp16": Outcome(status="done", result=entry),
        "verify/base-full-fp16": Outcome(
            status="done", result={"passed": True, "outputs": [{"cosine": 0.99991}, {"cosine": 0.99987}]}
        ),
        "build/base-full-int8": Outcome(status="rejected", message="INT8 is rejected: it is not faster"),
        "build/base-visible-fp16": Outcome(status="failed", message="TensorRT cannot"),
        "speed/base/pytorch+tensorrt": Outcome(status="done", result=speed),
        "tests": Outcome(status="done", result="7 passed"),
    }
    for name, outcome in outcomes.items():
        state.keep(Step(name=name, needs=(), run=gpu_check.run_tests), outcome, here, 1.0)
    found = report(state.records, {"speed/huge/tensorrt": "no engine is built"}, here.facts(), random_weights=["base"])
    assert {engine["bundle"]: (engine["status"], engine["worst_cosine"]) for engine in found["engines"]} == {
        "base-full-fp16": ("done", 0.99987),
        "base-full-int8": ("rejected", None),
        "base-visible-fp16": ("failed", None),
    }
    page = markdown(found)
    for text in (
        "# NVIDIA H200",
        "Random weights: base.",
        "| base | visible patches over all, FP16, batch 32 | 4.00 × | 3 × | yes |",
        "| base | TensorRT FP16 over PyTorch eager FP16, batch 1 | 1.40 × | 1.5 × | **no** |",
        "| base-full-fp16 | done | 12 | 44.0 | 12 | 0.999870 | yes |",
        "rejected: INT8 is rejected: it is not faster",
        "- build/base-visible-fp16: TensorRT cannot",
        "- speed/huge/tensorrt: no engine is built",
        "GPU tests: 7 passed.",
    ):
        assert text in page


def test_the_command_writes_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "survey", lambda: machine("gpu", "pytest"))
    monkeypatch.setattr(gpu_check, "run_tests", lambda: Outcome(status="failed", result="1 failed", message="1 failed"))
    assert gpu_check.main(["--state", str(tmp_path / "state"), "--out", str(tmp_path / "out"), "--models", "tiny"]) == 1
    found = read_json(tmp_path / "out" / "gpu-nvidia-h200.json")
    assert found["failed"] == {"tests": "1 failed"}
    assert found["missing"]["speed/tiny/pytorch+tensorrt"] == "needs tensorrt: no tensorrt here"
    assert (tmp_path / "out" / "gpu-nvidia-h200.md").read_text().startswith("# NVIDIA H200")
