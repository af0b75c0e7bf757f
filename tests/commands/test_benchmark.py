"""`mae-deploy benchmark` as it is typed: what is timed, in which order, and what the figures mean."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from mae_deploy.cli import main
from mae_deploy.commands import benchmark
from mae_deploy.preprocess import Array
from mae_deploy.runtime import Backbone
from mae_deploy.runtime.benchmark import Timing
from tests.runtime.tiny_bundle import N, write_bundle
from tests.test_cli import TRAINING, run_without

FEW = ("--repeats", "3", "--warmup", "1")


def measured(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> list[dict[str, Any]]:
    assert main(["benchmark", *map(str, arguments), "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    rows: list[dict[str, Any]] = json.loads(captured.out)
    return rows


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, ...], tuple[int, ...] | None]]:
    """Bundle, shape of the images and of `keep` of every call of a backbone."""
    seen: list[tuple[str, tuple[int, ...], tuple[int, ...] | None]] = []
    original = Backbone.__call__

    def call(self: Backbone, images: Array, keep: Array | None = None, **more: Any) -> Any:
        seen.append((self.bundle.path.name, images.shape, None if keep is None else keep.shape))
        return original(self, images, keep, **more)

    monkeypatch.setattr(Backbone, "__call__", call)
    return seen


def test_two_bundles_take_turns(exported: Path, calls: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    first, second = exported / "classifier", exported / "encoder"
    rows = measured(capsys, first, second, *FEW)
    assert calls == [("classifier", (1, 3, 6, 10), None), ("encoder", (1, 3, 6, 10), (1, 3))] * 4, "four rounds, the first of them not timed"
    assert [(row["bundle"], row["tokens"], row["patches"], row["batch"], row["engine"], row["calls"]) for row in rows] == [
        (str(first), "full", 15, 1, "onnxruntime", 3),
        (str(second), "visible", 3, 1, "onnxruntime", 3),
    ]
    assert all(0 < row["min_ms"] <= row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"] <= row["max_ms"] for row in rows)
    assert rows[0]["ratio"] == 1


def test_the_figures_by_hand(exported: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    durations = {"classifier": (0.004, 0.002, 0.008), "encoder": (0.001, 0.003, 0.001)}

    def measure(functions: Mapping[str, Callable[[], object]], *, repeats: int, warmup: int) -> dict[str, Timing]:
        assert (repeats, warmup) == (30, 5)
        return {name: Timing(durations[Path(name).name]) for name in functions}

    monkeypatch.setattr(benchmark, "measure", measure)
    monkeypatch.setenv("COLUMNS", "300")
    arguments: list[str | Path] = [exported / "classifier", exported / "encoder", "--batch-size", "5", "--keep-ratio", "0.5"]
    full, visible = measured(capsys, *arguments)
    assert (full["p50_ms"], full["images_per_second"], full["ratio"]) == pytest.approx((4, 5 / 0.004, 1))
    assert (visible["p50_ms"], visible["images_per_second"], visible["ratio"]) == pytest.approx((1, 5 / 0.001, 0.25))
    assert (visible["patches"], visible["batch"]) == (7, 5)
    assert main(["benchmark", *map(str, arguments)]) == 0
    lines = [[cell.strip() for cell in line.strip("│").split("│")] for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    # The 95th percentile of three lies nine tenths of the way from the second to the third.
    assert lines == [
        [str(exported / "classifier"), "full", "15", "5", "4.00", "7.60", "1250.0", "1.000"],
        [str(exported / "encoder"), "visible", "7", "5", "1.00", "2.80", "5000.0", "0.250"],
    ]


def test_what_a_bundle_fixes_wins(tmp_path: Path, calls: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    bundle = write_bundle(tmp_path / "bundle", batch=2, keep=4)
    (row,) = measured(capsys, bundle, "--batch-size", "7", "--keep-ratio", "1", *FEW)
    assert (row["batch"], row["patches"]) == (2, 4)
    assert set(calls) == {("bundle", (2, 3, 6, 14), (2, 4))}


@pytest.mark.parametrize(("ratio", "patches"), [("1", N), ("0.5", N // 2), ("0.001", 1)])
def test_the_share_of_the_patches(tmp_path: Path, ratio: str, patches: int, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = measured(capsys, write_bundle(tmp_path / "bundle"), "--keep-ratio", ratio, *FEW)
    assert row["patches"] == patches


def test_a_path_that_looks_like_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    bundle = write_bundle(tmp_path / "a[" / "x]")
    assert main(["benchmark", str(bundle), *FEW]) == 0
    assert str(bundle) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("names", "more", "said"),
    [
        (["a", "a"], [], "a bundle is named twice: a, a"),
        (["a", "./a/"], [], "a bundle is named twice: a, a"),
        ([], [], "BUNDLES is missing"),
        (["a", "nowhere"], [], "no bundle at nowhere: there is no manifest.json"),
        (["a"], ["--keep-ratio", "0"], "--keep-ratio 0.0 must be above 0 and at most 1"),
        (["a"], ["--keep-ratio", "1.5"], "--keep-ratio 1.5 must be above 0 and at most 1"),
        (["a"], ["--repeats", "0"], "--batch-size and --repeats must be at least 1, --warmup at least 0"),
        (["a"], ["--batch-size", "0"], "--batch-size and --repeats must be at least 1, --warmup at least 0"),
        (["a"], ["--engine", "abacus"], "unknown engine 'abacus'"),
    ],
)
def test_mistakes_are_2(
    tmp_path: Path, names: list[str], more: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_bundle(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    assert main(["benchmark", *names, *more]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[0] == f"error: {said}"


def test_a_tampered_bundle_is_not_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    with (bundle / "encoder.onnx").open("ab") as file:
        file.write(b"\0")
    assert main(["benchmark", str(bundle), *FEW]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "is not the file that was exported" in captured.err


def test_without_the_training_packages(exported: Path) -> None:
    done = run_without(TRAINING, "benchmark", str(exported / "classifier"), str(exported / "encoder"), *FEW, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(json.loads(done.stdout)) == 2
