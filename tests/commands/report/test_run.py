"""A report exports, judges and times trained classifiers, says what INT8 is worth, and after a kill does only what is
missing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mae_deploy.cli import main
from mae_deploy.commands.report.config import ReportConfig
from mae_deploy.commands.report.run import _int8_result, folder_names, was_disturbed
from mae_deploy.commands.report.student import CALIBRATION_IMAGES, Student, drop
from mae_deploy.errors import ConfigError
from mae_deploy.evaluation import evaluate
from mae_deploy.export import run as export
from mae_deploy.export.int8_config import Int8Config
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.flops import flops_per_image
from mae_deploy.runtime.parity.certificate import Classes, Speed
from mae_deploy.runtime.timing import Timing
from tests.export.robust_exports import CONFIG, robust_classifier, write_blots
from tests.export.tiny_exports import CLASS_NAMES, write_checkpoint
from tests.models.tiny_models import tiny_encoder

N = CONFIG.num_patches
IMAGES = 24
QUICK = ("--threads", "1", "--repeats", "2", "--warmup", "0", "--max-latency", "1000")


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs `plain` and `elastic`, which was trained on half of the patches and more, `encoder` without a head, and
    `data/val` of two classes.
    """
    root = tmp_path_factory.mktemp("students")
    model = robust_classifier()
    write_checkpoint(root / "plain", model, licence="own", class_names=CLASS_NAMES)
    write_checkpoint(
        root / "elastic",
        model,
        licence="own",
        class_names=CLASS_NAMES,
        provenance={"config": {"keep_ratio": [0.4, 1.0]}},
    )
    write_checkpoint(root / "encoder", tiny_encoder(), licence="own")
    for index, name in enumerate(CLASS_NAMES[:2]):
        write_blots(root / "data" / "val" / name, IMAGES // 2, first=100 * index)
    return root


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was exported and evaluated: the folders of the bundles, in turn."""
    done: list[str] = []

    def watch(module: Any, function: str, what: str, folder: Callable[[Any], Path]) -> None:
        real = getattr(module, function)

        def watched(config: Any) -> Any:
            done.append(f"{what} {'/'.join(folder(config).parts[-2:])}")
            return real(config)

        monkeypatch.setattr(module, function, watched)

    watch(export, "run_export", "export", lambda config: config.out)
    watch(evaluate, "count_right", "eval", lambda config: config.model)
    return done


def report(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    code = main(["report", *QUICK, *map(str, arguments), "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    found: dict[str, Any] = json.loads(captured.out)
    return found


def top1(capsys: pytest.CaptureFixture[str], bundle: str, students: Path, *more: str) -> float:
    assert main(["eval", bundle, str(students / "data"), "--json", *more]) == 0
    return float(json.loads(capsys.readouterr().out)["top1"])


def test_students_side_by_side(students: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report"
    found = report(capsys, students / "plain", students / "elastic", "--data", students / "data", "--out", out)
    assert found["images"] == IMAGES
    plain, *elastic = rows = found["rows"]
    assert [(row["keep_ratio"], row["patches"]) for row in rows] == [
        (1, N),
        (1, N),
        (0.75, int(0.75 * N)),
        (0.5, N // 2),
        (0.4, int(0.4 * N)),
    ]
    assert [Path(row["run"]).name for row in rows] == ["plain", *["elastic"] * 4]
    assert {row["parameters"] for row in rows} == {
        sum(parameter.numel() for parameter in robust_classifier().parameters())
    }
    for row in (plain, elastic[-1]):
        share = ("--keep-ratio", f"{row['keep_ratio']}") if row is not plain else ()
        assert row["top1"] == top1(capsys, row["fp32_bundle"], students, *share)
        assert row["int8_top1"] == top1(capsys, row["int8_bundle"], students, *share)
        assert row["int8_drop"] == row["top1"] - row["int8_top1"]
        assert row["gflop"] == pytest.approx(
            (flops_per_image(Bundle.load(row["fp32_bundle"]).manifest, row["patches"]) or 0) / 1e9
        )
    for row in rows:
        assert row["int8_ratio"] == pytest.approx(row["int8_ms"] / row["fp32_ms"])
        assert row["int8_linears"] == "8 of 8"
    assert plain["top1"] == elastic[0]["top1"]  # one network
    assert [Bundle.load(rows[index]["int8_bundle"]).token_mode for index in (0, 1)] == ["full", "visible"]
    assert json.loads((out / "report.json").read_text()) == found
    page = (out / "report.md").read_text()
    assert page.count(f"| {students / 'elastic'} |") == 4
    assert found["command"] in page


def test_shares_that_are_asked_for(students: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = report(
        capsys, students / "plain", "--data", students / "data", "--out", tmp_path / "report", "--keep-ratio", "0.6"
    )
    assert [(row["keep_ratio"], row["patches"]) for row in found["rows"]] == [(0.6, int(0.6 * N))]


def test_tables_in_the_terminal(students: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(
            [
                "report",
                str(students / "plain"),
                "--data",
                str(students / "data"),
                "--out",
                str(tmp_path / "report"),
                *QUICK,
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "params M" in out
    assert "INT8 top-1" in out
    assert max(map(len, out.splitlines())) <= 80


# --- what INT8 is worth ----------------------------------------------------------------------------------------------


def test_int8_that_takes_longer_or_loses_too_much_is_a_row_that_says_so(
    students: Path, tmp_path: Path, work: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """INT8 gets one image more wrong; the mix that is searched for then gets all right that FP32 does."""
    real = evaluate.count_right

    def worse(config: Any) -> Any:
        wrong = list(range(IMAGES // 2 + (config.model.name == "int8")))
        share: Any = SimpleNamespace(wrong=wrong, top1=100 - 100 * len(wrong) / IMAGES)
        return real(config)._replace(shares=[share])

    monkeypatch.setattr(evaluate, "count_right", worse)
    arguments = (students / "plain", "--data", students / "data", "--out")
    (row,) = report(capsys, *arguments, tmp_path / "a", "--no-search")["rows"]
    assert row["verdict"] == "loses more than 0.5 points"
    assert row["int8_drop"] == pytest.approx(100 / IMAGES)
    assert work == ["export plain/fp32", "eval plain/fp32", "export plain/int8", "eval plain/int8"]
    (row,) = report(capsys, *arguments, tmp_path / "b", "--max-drop", "27", "--max-latency", "0.001")["rows"]
    assert row["verdict"] == "more than 0.001 of FP32's latency"
    assert row["int8_drop_interval"][1] == pytest.approx(25.68, abs=0.01)
    # A mean of 4 points, which may be 26; a mix that loses nothing shows 18.
    (row,) = report(capsys, *arguments, tmp_path / "c", "--max-drop", "20")["rows"]
    assert (row["verdict"], row["int8_drop"], Path(row["int8_bundle"]).name) == ("ok", 0, "int8-mix")
    assert work[-2:] == ["export plain/int8-mix", "eval plain/int8-mix"]


CLASSES = Classes(np.repeat([1, 0], [10, 390]), np.repeat([1, 0], [12, 388]), np.zeros(400, np.int64))
"""Two of 400 images lost."""


@pytest.mark.parametrize(
    ("max_drop", "max_latency", "said"),
    [
        (2.5, 1.1, "ok"),
        (0.4, 1.1, "loses more than 0.4 points"),
        (0.5, 1.1, "may lose 2.17 points: 400 images show no less"),
        (2.5, 0.95, "perhaps more than 0.95 of FP32's latency"),
        (2.5, 0.9, "more than 0.9 of FP32's latency"),
        (2.5, 1.0, "perhaps not faster"),
        (0.4, 0.5, "loses more than 0.4 points; more than 0.5 of FP32's latency"),
    ],
)
def test_int8_is_judged_on_the_ends_of_intervals(max_drop: float, max_latency: float, said: str) -> None:
    """The ratio of the medians is 0.9, of rounds drawn again up to 1.05."""
    speed = Speed(timing=Timing((0.7,) * 2 + (0.9,) * 6 + (1.05,) * 7), baseline=Timing((1.0,) * 15))
    assert (speed.ratio, speed.interval[1] < 1.1, speed.interval[1] > 1) == (0.9, True, True)
    assert _int8_result(CLASSES, speed, Int8Config(max_drop=max_drop, max_latency=max_latency)) == said


def test_int8_that_export_refuses_is_a_row_without_figures(
    students: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--data", students / "data", "--out", tmp_path / "report", "--min-sqnr", "90", "--no-search")
    (row,) = report(capsys, students / "plain", *arguments)["rows"]
    assert row["verdict"].startswith("rejected: INT8 is rejected: ")
    assert "int8_top1" not in row
    assert "| rejected: INT8 is rejected: " in (tmp_path / "report" / "report.md").read_text()


@pytest.mark.parametrize(
    ("learned", "settings", "calibrated"),
    [
        ("none", {}, True),
        ("static", {}, True),
        ("dynamic", {}, False),
        ("dynamic", {"int8": Int8Config(max_drop=0.5, quantization="static")}, True),
        ("dynamic", {"engine": "openvino"}, True),
    ],
)
def test_int8_is_what_the_student_learned_with(
    students: Path, tmp_path: Path, learned: str, settings: dict[str, Any], calibrated: bool
) -> None:
    """With ranges found at run time it was smoothed by its weights alone, as an export without calibration does it."""
    shutil.copytree(students / "data", tmp_path / "data")
    write_blots(tmp_path / "data" / "train", CALIBRATION_IMAGES)
    write_checkpoint(
        tmp_path / "run",
        robust_classifier(),
        licence="own",
        class_names=CLASS_NAMES,
        provenance={"config": {"edge": {"quantize": learned}}},
    )
    config = ReportConfig(runs=(tmp_path / "run",), data=tmp_path / "data", out=tmp_path / "report", **settings)
    asked = replace(config, int8=replace(config.int8, calib_data=tmp_path / "data" / "train"))
    student, told = (Student(tmp_path / "run", tmp_path / "report", settings) for settings in (config, asked))
    assert told._exports["int8"].int8.calib_data is not None
    assert {part: export.int8.calib_data is not None for part, export in student._exports.items()} == {
        "fp32": False,
        "int8": calibrated,
        "int8-mix": calibrated,
    }


def test_images_in_shards_or_at_the_top_of_the_folder(students: Path, tmp_path: Path) -> None:
    """Shards are judged on, and nothing is taken of them as files; the classes' own folder has the samples of the
    exports too.
    """

    def exports(data: Path) -> list[tuple[Path | None, Path | None]]:
        config = ReportConfig(runs=(students / "plain",), data=data, out=tmp_path / "report")
        found = Student(students / "plain", tmp_path / "report", config)._exports.values()
        return [(export.samples, export.int8.calib_data) for export in found]

    val = students / "data" / "val"
    for split in ("train", "val"):
        shutil.copytree(val, tmp_path / "classes" / split)
    assert main(["data", "pack", str(tmp_path / "classes"), str(tmp_path / "shards"), "--num-workers", "0"]) == 0
    assert exports(tmp_path / "shards") == [(None, None)] * 3
    assert exports(val) == exports(val.parent) == [(val, None)] * 3


def test_what_is_just_allowed_is_allowed() -> None:
    fp32, int8 = 100 * 644 / 1000, 100 * 639 / 1000
    assert fp32 - int8 > 0.5  # by a rounding error
    assert drop(fp32, int8) == 0.5


# --- going on --------------------------------------------------------------------------------------------------------


def test_after_a_kill_only_what_is_missing_is_done(
    students: Path, tmp_path: Path, work: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (students / "plain", students / "elastic", "--data", students / "data", "--out", tmp_path / "report")
    with monkeypatch.context() as patch:
        real = evaluate.count_right

        def killed(config: Any) -> Any:
            if config.model.parts[-2:] == ("plain", "int8"):
                raise RuntimeError("killed")
            return real(config)

        patch.setattr(evaluate, "count_right", killed)
        assert main(["report", *map(str, arguments), *QUICK]) == 1
    assert work == ["export plain/fp32", "eval plain/fp32", "export plain/int8"]
    work.clear()
    capsys.readouterr()
    found = report(capsys, *arguments)
    assert work == [
        "eval plain/int8",
        *(f"{what} elastic/{part}" for part in ("fp32", "int8") for what in ("export", "eval")),
    ]
    work.clear()
    again = report(capsys, *arguments)
    assert work == []
    timed = {"fp32_ms", "fp32_min_ms", "int8_ms", "int8_min_ms", "int8_ratio", "int8_ratio_interval", "verdict"}
    assert [{key: row[key] for key in row.keys() - timed} for row in again["rows"]] == [
        {key: row[key] for key in row.keys() - timed} for row in found["rows"]
    ]


def test_other_images_or_weights_are_judged_anew(
    students: Path, tmp_path: Path, work: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    data, run, out = tmp_path / "data", tmp_path / "run", tmp_path / "report"
    shutil.copytree(students / "data", data)
    shutil.copytree(students / "plain", run)
    everything = [f"{what} run/{part}" for part in ("fp32", "int8") for what in ("export", "eval")]
    report(capsys, run, "--data", data, "--out", out)
    work.clear()
    write_blots(data / "val" / CLASS_NAMES[2], 1)
    assert report(capsys, run, "--data", data, "--out", out)["images"] == IMAGES + 1
    assert work == everything
    work.clear()
    model = robust_classifier()
    model.head.bias.data[2] += 1000
    shutil.rmtree(run)
    write_checkpoint(run, model, licence="own", class_names=CLASS_NAMES)
    (row,) = report(capsys, run, "--data", data, "--out", out)["rows"]
    assert row["top1"] == pytest.approx(100 / (IMAGES + 1))
    assert work == everything


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["encoder"], "is a encoder without a head"),
        (["plain", "plain"], "a run is named twice"),
        (["plain", "--engine", "openvino"], "--precision int8 with static ranges needs --calib-data"),
        (["plain", "--keep-ratio", "1.5"], "each of --keep-ratio must be above 0 and at most 1, got 1.5"),
        (["plain", "--calib-data", "nowhere"], "--calib-data nowhere has not the 128 images"),
        (["nothing"], "no checkpoint at"),
    ],
)
def test_what_cannot_be_reported(
    students: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    given = [str(students / word) if (students / word).exists() or word == "nothing" else word for word in arguments]
    assert main(["report", *given, "--data", str(students / "data"), "--out", str(tmp_path / "report")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


def test_a_folder_of_something_else_is_left_alone(
    students: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "letter.txt").write_text("mine")
    assert main(["report", str(students / "plain"), "--data", str(students / "data"), "--out", str(tmp_path)]) == 2
    assert "holds something else" in capsys.readouterr().err


def test_a_busy_machine_is_told() -> None:
    calm, busy = Timing((1.0, 1.4, 1.4, 9.0)), Timing((1.0, 1.6, 1.6, 1.6))
    assert not was_disturbed([calm])
    assert was_disturbed([calm, busy])


def test_a_folder_for_each_run() -> None:
    assert folder_names([Path("/a/b/run")]) == ["run"]
    assert folder_names([Path("/a/x/seed-0"), Path("/a/x/seed-1"), Path("/a/y/seed-0")]) == [
        "x-seed-0",
        "x-seed-1",
        "y-seed-0",
    ]
    with pytest.raises(ConfigError, match="named twice"):
        folder_names([Path("/a/x"), Path("/a/b/../x")])
