"""`mae-deploy quickstart` from end to end on real digits, with networks so small that it takes seconds; its figures are
not judged here.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from mae_deploy.cli import main
from mae_deploy.commands.quickstart import run as quickstart
from mae_deploy.commands.quickstart.config import QuickstartConfig
from mae_deploy.commands.quickstart.plan import Plan, stages
from mae_deploy.commands.quickstart.run import LABELS_PER_CLASS, NUM_UNLABELLED, write_digits
from mae_deploy.commands.quickstart.speed import installed_engines, measure_speed
from mae_deploy.commands.quickstart.stream import made_frames, measure_stream
from mae_deploy.config import from_dict, merge
from mae_deploy.errors import MissingDependency
from mae_deploy.images.read import Array
from mae_deploy.models.config import EncoderConfig
from mae_deploy.pretrain.config import PretrainConfig
from mae_deploy.recipe import read_recipe
from mae_deploy.runtime import Bundle
from mae_deploy.runtime.engines.base import EngineOptions
from mae_deploy.runtime.verify import verify_bundle
from mae_deploy.training import runner

SCANS = 1797
TINY = EncoderConfig(name="vit_nano_patch4", image_size=(32, 32))
SEED = 5
PARTS = ["teacher", "teacher_from_scratch", "student", "student_from_scratch"]


def tiny_recipe(kind: type[Any], name: str, **settings: Any) -> Any:
    """The shipped recipe with one epoch, and a teacher of one block."""
    small: dict[str, Any] = {
        "optim": {"epochs": 1, "batch_size": 175, "warmup_epochs": 0},
        "images": {"num_workers": 0},
    }
    if kind is PretrainConfig:
        small |= {
            "model": {"embed_dim": 12, "depth": 1, "num_heads": 3},
            "decoder": {"decoder_depth": 1, "decoder_embed_dim": 8},
        }
    return from_dict(kind, merge(merge(read_recipe(name), settings), small))


@contextmanager
def small_quickstart() -> Iterator[None]:
    """Small recipes and models, and files that need not survive a power cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quickstart, "_recipe", tiny_recipe)
        patch.setattr(quickstart, "measure_speed", partial(measure_speed, [TINY]))
        patch.setattr(quickstart, "measure_stream", partial(measure_stream, model=TINY, num_frames=5))
        patch.setattr("os.fsync", lambda _: None)  # thousands of small files: seconds on a busy disk
        yield


@pytest.fixture(scope="module", autouse=True)
def patched() -> Iterator[None]:
    """A small one; and the number of threads, which the quickstart sets, as it was."""
    threads = torch.get_num_threads()
    with small_quickstart():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder and the report of a quickstart with one seed."""
    out = tmp_path_factory.mktemp("quickstart") / "out"
    return out, quickstart.run_quickstart(QuickstartConfig(out=out, seeds=(SEED,), device="cpu")).data


# --- the report ------------------------------------------------------------------------------------------------------


def test_the_report(finished: tuple[Path, dict[str, Any]]) -> None:
    out, report = finished
    assert json.loads((out / "report.json").read_text()) == report
    assert list(report) == [
        "mae_deploy",
        "created",
        "command",
        "machine",
        "dataset",
        "protocol",
        "mae_loss",
        "top1",
        "parity",
        "size_bytes",
        "speed",
        "stream",
        "reconstruction",
        "stages",
        "seconds",
    ]
    assert (report["dataset"]["licence"], "doi:10.24432/C50P49" in report["dataset"]["source"]) == ("CC BY 4.0", True)
    assert {
        key: report["protocol"][key]
        for key in ("unlabelled_images", "labels_per_class", "test_images", "seeds", "pretraining_seed")
    } == {
        "unlabelled_images": 1400,
        "labels_per_class": 5,
        "test_images": 397,
        "seeds": [SEED],
        "pretraining_seed": 0,
    }
    assert list(report["top1"]) == PARTS
    for found in report["top1"].values():
        assert found["mean"] == found["min"] == found["max"] == found["by_seed"][0]
        # A share of 397 images, in percent; the loop rounds nothing.
        assert found["mean"] * 3.97 == pytest.approx(round(found["mean"] * 3.97), abs=1e-3)
    assert report["mae_loss"]["first"] > report["mae_loss"]["last"] > 0
    assert report["seconds"] > 0
    assert [stage["stage"] for stage in report["stages"]] == [stage.title for stage in stages(seeds=1, engines=1)]
    assert sum(stage["seconds"] for stage in report["stages"]) <= report["seconds"] + 1


def test_the_bundles_are_there_and_pass(finished: tuple[Path, dict[str, Any]]) -> None:
    out, report = finished
    assert (
        set(report["parity"])
        == set(report["size_bytes"])
        == {path.name for path in (out / "bundles").iterdir()}
        == set(quickstart.BUNDLES)
    )
    for name, parity in report["parity"].items():
        bundle = Bundle.load(out / "bundles" / name)
        verification = verify_bundle(bundle, options=EngineOptions(threads=1))
        assert verification.passed
        assert parity["passed"] is True
        # Verified a second time on the same machine: the same figures but for the order of threads.
        assert parity["max_abs"] == pytest.approx(
            max(check.comparison.max_abs for check in verification.outputs), abs=1e-5
        )
        assert report["size_bytes"][name] == sum(
            (bundle.path / file).stat().st_size for file in ("encoder.onnx", "golden.npz")
        )
        assert (bundle.licence, bundle.preprocess.channels, bundle.model["image_size"]) == ("own", 1, [32, 32])
    assert Bundle.load(out / "bundles" / "encoder-visible").token_mode == "visible"
    student = Bundle.load(out / "bundles" / "student")
    assert student.class_names == [str(digit) for digit in range(10)]
    record = student.manifest["provenance"]["checkpoint"]
    assert (record["stage"], record["teacher"]["stage"], record["parent"]["stage"]) == (
        "distill",
        "finetune",
        "distill",
    )


def test_the_report_for_people(finished: tuple[Path, dict[str, Any]]) -> None:
    out, report = finished
    page = (out / "report.md").read_text(encoding="utf-8")
    for text in (
        "43 writers",
        "CC BY 4.0",
        "1400 images without labels",
        "5 labels a class",
        "397 other images",
        f"Seeds {SEED};",
        "](reconstruction.png)",
    ):
        assert text in page, text
    rows = [line for line in page.partition("## Patches")[0].splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + 1 + len(PARTS) + 3 + 3
    assert f"{report['mae_loss']['first']:.3f} → {report['mae_loss']['last']:.3f}" in page
    for part in PARTS:
        assert f"{report['top1'][part]['mean']:.1f} % |" in page
    speed = [line for line in page.splitlines() if line.startswith("| vit_nano_patch4 | onnxruntime")]
    assert [line.split(" | ")[2:4] for line in speed] == [
        ["fp32", "64"],
        ["fp32", "16"],
        ["int8", "64"],
        ["int8", "16"],
    ]


def test_the_report_in_one_file_with_its_pictures(finished: tuple[Path, dict[str, Any]]) -> None:
    out, _ = finished
    page = (out / "report.html").read_text(encoding="utf-8")
    pictures = re.findall(r'<img src="data:image/png;base64,([^"]+)"', page)
    assert page.count("<img ") == len(pictures) == 3
    files = [out / name for name in ("reconstruction.png", "report-speed.png", "stream.png")]
    assert [base64.b64decode(picture) for picture in pictures] == [file.read_bytes() for file in files]


# --- real sizes ------------------------------------------------------------------------------------------------------


def test_speed(finished: tuple[Path, dict[str, Any]]) -> None:
    rows = finished[1]["speed"]
    assert [row["engine"] for row in rows] == [engine for engine in installed_engines() for _ in range(4)]
    for row in rows:
        first = next(other for other in rows if other["engine"] == row["engine"])
        assert (first["precision"], first["patches"]) == ("fp32", 64)
        assert row["ratio"] == pytest.approx(row["p50_ms"] / first["p50_ms"])


def test_an_engine_that_does_not_work_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise MissingDependency("built for another CPU")

    monkeypatch.setattr("mae_deploy.commands.quickstart.speed.ENGINES", {"json": refuse})  # a module that is there
    monkeypatch.setattr("mae_deploy.commands.quickstart.speed.open_graph", refuse)
    assert measure_speed([TINY]) == []
    assert "left out: vit_nano_patch4 on json: built for another CPU" in capsys.readouterr().err


def test_stream(finished: tuple[Path, dict[str, Any]]) -> None:
    out, report = finished
    stream = report["stream"]
    assert (stream["patches"][0], len(stream["patches"])) == (64, 5)
    assert max(stream["patches"][1:]) < 64
    assert 0 < stream["operations"] < 1
    assert 0.9 < stream["cosine"] <= 1
    assert stream["ratio"] == pytest.approx(stream["stream_ms"] / stream["whole_ms"])
    assert verify_bundle(Bundle.load(out / "stream" / "bundle")).passed
    with Image.open(out / "stream.png") as picture:
        first = np.asarray(picture)[:, :32]
        assert picture.size == (4 * (32 + 8) - 8, 32)
    assert first.mean() > 2 * np.asarray(Image.open(out / "stream.png"))[:, 3 * 40 :].mean(), (
        "what was left out is dark"
    )


def test_the_square_moves() -> None:
    first, second = (frame.astype(int) for frame in made_frames(2))
    changed = np.abs(first - second).max(axis=2) > 20
    rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
    assert 90 < rows[0] <= rows[-1] < 170
    assert columns[-1] < 70


def test_the_plan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("mae_deploy.commands.quickstart.plan._measured_rate", lambda: 45.0)
    plan = Plan.for_this_machine(seeds=3, engines=1)
    assert plan.slowness == 2
    plan.show()
    shown = capsys.readouterr().err
    for stage in stages(seeds=3, engines=1):
        assert f"{2 * stage.seconds:.0f} s" in shown
    assert stages(seeds=3, engines=1)[2].seconds == 3 * stages(seeds=1, engines=1)[2].seconds
    assert sum(stage.seconds for stage in stages(seeds=1, engines=2)) <= 300


def test_the_picture(finished: tuple[Path, dict[str, Any]]) -> None:
    out, report = finished
    assert report["reconstruction"] == str(out / "reconstruction.png")
    with Image.open(out / "reconstruction.png") as picture:
        # Eight rows of three cells, 32 pixels enlarged three times, with gaps of four.
        assert (picture.format, picture.size) == ("PNG", (3 * 100 - 4, 8 * 100 - 4))


def test_a_second_run_trains_nothing_and_reports_the_same(
    finished: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, report = finished
    monkeypatch.setattr(runner.TrainingRunner, "_launch", lambda *_: pytest.fail("a finished run was trained again"))
    assert main(["quickstart", "--out", str(out), "--seeds", str(SEED), "--device", "cpu", "--json"]) == 0
    captured = capsys.readouterr()
    again = json.loads(captured.out)
    assert {key: again[key] for key in ("mae_loss", "top1", "protocol")} == {
        key: report[key] for key in ("mae_loss", "top1", "protocol")
    }
    assert "7/7 draw pictures and write the report" in captured.err.splitlines()


def test_another_folder_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("kept")
    assert main(["quickstart", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: --out {tmp_path} holds something else\nhint: choose another --out\n"
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


# --- the data --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scans as files, with few-label sets of two seeds."""
    folder = tmp_path_factory.mktemp("digits") / "data"
    assert write_digits(folder, (0, SEED)) == folder / "unlabelled"
    return folder


def numbers(folder: Path) -> list[int]:
    """The scans below a folder, by their numbers in the data set."""
    return sorted(int(path.stem) for path in folder.rglob("*.png"))


def pixels(path: Path) -> Array:
    with Image.open(path) as image:
        assert image.mode == "L"
        return np.asarray(image)


def test_no_scan_is_both_trained_and_tested_on(digits: Path) -> None:
    unlabelled, val = numbers(digits / "unlabelled"), numbers(digits / "val")
    assert (len(unlabelled), len(val)) == (NUM_UNLABELLED, SCANS - NUM_UNLABELLED) == (1400, 397)
    assert sorted(unlabelled + val) == list(range(SCANS))


def test_files_are_the_scans_and_folders_their_labels(digits: Path) -> None:
    data: Any = load_digits()
    for path in [*(digits / "val").rglob("*.png"), *(digits / "few-labels-0" / "train").rglob("*.png")]:
        assert path.parent.name == str(data.target[int(path.stem)])
    for path in sorted((digits / "unlabelled").iterdir())[::97]:
        # 17 grey levels become 256: half a level is lost at most.
        np.testing.assert_allclose(pixels(path) * (16 / 255), data.images[int(path.stem)], atol=0.5 * 16 / 255)


@pytest.mark.parametrize("seed", [0, SEED])
def test_few_labels_are_drawn_from_the_unlabelled(digits: Path, seed: int) -> None:
    few = digits / f"few-labels-{seed}"
    chosen = numbers(few / "train")
    assert len(set(chosen)) == 10 * LABELS_PER_CLASS == 50
    assert set(chosen) < set(numbers(digits / "unlabelled"))
    assert {folder.name: len(list(folder.iterdir())) for folder in (few / "train").iterdir()} == {
        str(digit): 5 for digit in range(10)
    }
    assert numbers(few / "val") == numbers(digits / "val")


def test_a_seed_changes_the_labelled_images(digits: Path) -> None:
    first, second = (set(numbers(digits / f"few-labels-{seed}" / "train")) for seed in (0, SEED))
    assert len(first & second) < 10


def test_examples_are_test_images_of_eight_digits(digits: Path) -> None:
    examples = numbers(digits / "examples")
    assert set(examples) < set(numbers(digits / "val"))
    labels: Any = load_digits(return_X_y=True)[1]
    assert sorted(labels[examples]) == list(range(8))


@pytest.fixture
def few_digits(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Path]:
    """`write_digits` for half of the scans, each digit among them."""
    data: Any = load_digits()
    data.images, data.target = data.images[:900], data.target[:900]
    monkeypatch.setattr("sklearn.datasets.load_digits", lambda: data)
    monkeypatch.setattr(quickstart, "NUM_UNLABELLED", 800)
    return lambda folder: write_digits(folder, (SEED,))


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


def test_the_same_files_each_time(tmp_path: Path, few_digits: Callable[[Path], Path]) -> None:
    few_digits(tmp_path / "one")
    few_digits(tmp_path / "two")
    first = content(tmp_path / "one")
    assert len(first) == 900 + 8 + 50 + 100
    assert content(tmp_path / "two") == first


def test_what_a_killed_run_left_is_completed(tmp_path: Path, few_digits: Callable[[Path], Path]) -> None:
    few_digits(tmp_path / "data")
    whole = content(tmp_path / "data")
    # `unlabelled` is written last of the three; without it the others may be halves.
    (tmp_path / "data" / "unlabelled").rename(tmp_path / "data" / ".partial-1-unlabelled")
    next((tmp_path / "data" / "val" / "3").iterdir()).unlink()
    few_digits(tmp_path / "data")
    assert {
        name: data for name, data in content(tmp_path / "data").items() if not name.startswith(".partial-")
    } == whole


def test_finished_data_is_not_written_again(tmp_path: Path, few_digits: Callable[[Path], Path]) -> None:
    few_digits(tmp_path / "data")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")}
    few_digits(tmp_path / "data")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")} == times
