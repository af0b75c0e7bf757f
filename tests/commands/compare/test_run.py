"""Encoders at equal latency: what is timed is evaluated, what is slow is made faster, and nothing is done twice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from mae_deploy.cli import main
from mae_deploy.commands.compare import run
from mae_deploy.commands.compare.points import OperatingPoint
from mae_deploy.commands.compare.subjects import open_subject
from mae_deploy.errors import ConfigError
from mae_deploy.evaluation.compare import probe, read_entries
from mae_deploy.evaluation.config import CompareConfig, FeaturesConfig
from mae_deploy.export.config import ExportConfig
from mae_deploy.export.run import run_export
from mae_deploy.models.mask_config import keep_count
from mae_deploy.pretrain.config import FinetuneConfig
from tests.data.image_folders import write_noise
from tests.export.tiny_exports import write_checkpoint
from tests.models.tiny_models import tiny_classifier, tiny_encoder

TINY = 15
"""Patches of the tiny encoder: 3x5."""


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`encoder`, `classifier`, and `bundle`, of visible tokens."""
    root = tmp_path_factory.mktemp("encoders")
    write_noise(root / "photos", 2)
    write_checkpoint(root / "encoder", tiny_encoder(), licence="own")
    write_checkpoint(root / "classifier", tiny_classifier("avg"), licence="own")
    run_export(
        ExportConfig(
            checkpoint=root / "encoder",
            out=root / "bundle",
            tokens="visible",
            samples=root / "photos",
            outputs=("cls",),
        )
    )
    return root


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A patch takes a millisecond, in a bundle half of that."""

    def timed(graphs: Mapping[Any, Any], points: Mapping[Any, OperatingPoint], good: bool) -> dict[Any, float]:
        return {key: point.keep * (0.0005 if key[0] == "bundle" else 0.001) for key, point in points.items()}

    monkeypatch.setattr(run, "_timed", timed)


def compare(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    assert main(["compare", *map(str, arguments), "--linear", "ridge", "--num-workers", "0", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("name", ["encoder", "classifier", "bundle"])
def test_the_graph_that_is_timed_gives_the_features_that_are_probed(encoders: Path, name: str) -> None:
    config = CompareConfig(
        encoders=(str(encoders / name),), data=encoders, at_latency="1s", features=FeaturesConfig(threads=1)
    )
    (entry,) = read_entries(config.encoders)
    subject = open_subject(entry, config, None)
    graphs = subject.graphs()
    points = graphs.ladders["tokens"][3:4] + graphs.ladders["tokens"][-1:] + graphs.ladders.get("size", [])[1:2]
    for point in points:
        call: Any = graphs.call(point)
        (found,) = call().values()
        source: Any = subject.features(point, 0)
        images = call.args[0]["images"]
        if name == "bundle":
            (expected,) = source._backbone.engine.run({"images": images, "ids_keep": call.args[0]["ids_keep"]}).values()
        else:
            with torch.inference_mode():
                expected = source._pooled(torch.from_numpy(images)).numpy()
        assert found == pytest.approx(expected, abs=1e-5)  # FP32 on another engine
        source.close()
    graphs.close()


def test_slow_encoders_are_made_as_fast_and_fast_ones_run_as_they_are(
    encoders: Path, classes: Path, tmp_path: Path, clock: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "compared"
    given = (encoders / "encoder", encoders / "bundle", "random", "--data", classes, "--k", "1", "--seeds", "0,4")
    found = compare(capsys, *given, "--at-latency", "8.5ms", "--out", out)
    assert [(row["name"], row["fit"], row["patches"], row["size"], row["ms"]) for row in found["encoders"]] == [
        ("encoder", "tokens", "8 of 15", "6x10", 8.0),
        ("encoder", "size", "8", "4x8", 8.0),
        ("bundle", "whole", "15", "6x10", 7.5),
        ("random", "tokens", "8 of 15", "6x10", 8.0),
        ("random", "size", "8", "4x8", 8.0),
    ]
    for row in found["encoders"]:
        assert row["reached"]
        assert row["whole_ms"] == (7.5 if row["name"] == "bundle" else 15.0)
        assert len(row["knn1_top1_by_seed"]) == len(row["linear_top1_interval"]) == 2
        assert row["parameters"] == sum(parameter.numel() for parameter in tiny_encoder().parameters())
    assert found["encoders"] == json.loads((out / "compare.json").read_text())["encoders"]
    assert "| encoder | 8 of 15 | 6x10 | 8.00 | 15.00 |" in (out / "compare.md").read_text()
    assert (out / "compare.png").read_bytes()[:4] == b"\x89PNG"


def test_nothing_is_done_twice(
    encoders: Path,
    classes: Path,
    tmp_path: Path,
    clock: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = (
        encoders / "encoder",
        "--data",
        classes,
        "--at-latency",
        "0.0085s",
        "--fit",
        "size",
        "--out",
        tmp_path / "c",
    )
    first = compare(capsys, *given, "--seeds", "0")
    assert "linear_top1_interval" not in first["encoders"][0]
    probed: list[int] = []
    real = probe

    def watched(config: Any, known: Any, asked: Any, num_classes: int, seed: int) -> dict[str, float]:
        probed.append(seed)
        return real(config, known, asked, num_classes, seed)

    monkeypatch.setattr(run, "probe", watched)
    monkeypatch.setattr(run, "find_points", lambda *_: pytest.fail("it was measured again"))
    found = compare(capsys, *given, "--seeds", "0,1")
    assert probed == [1]
    assert found["encoders"][0]["linear_top1_by_seed"][0] == first["encoders"][0]["linear_top1"]
    assert main(["compare", *map(str, given), "--k", "3"]) == 2
    assert "k: 20 -> 3" in capsys.readouterr().err


def test_who_does_not_reach_the_latency_is_named(
    encoders: Path, classes: Path, clock: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "_features", lambda *_: pytest.fail("it was evaluated"))
    monkeypatch.setenv("COLUMNS", "120")
    given = ["compare", str(encoders / "encoder"), "--data", str(classes), "--at-latency", "900us", "--fit", "tokens"]
    assert main(given) == 0
    assert "encoder does not reach 0.9 ms: 1.00 ms with 1 of 15 patches at 6x10" in capsys.readouterr().out


def test_fine_tuning_is_at_the_point_too(
    encoders: Path,
    classes: Path,
    tmp_path: Path,
    clock: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tuned: list[FinetuneConfig] = []

    def tune(config: FinetuneConfig) -> dict[str, float]:
        tuned.append(config)
        return {"top1": 60.0 + config.seed}

    monkeypatch.setattr(run, "run_finetune", tune)
    given = (encoders / "encoder", encoders / "bundle", "random", "--data", classes, "--seeds", "0,2")
    found = compare(capsys, *given, "--at-latency", "7", "--finetune-epochs", "3", "--out", tmp_path / "c")
    assert [row.get("finetune_top1") for row in found["encoders"]] == [61.0, 61.0, None, 61.0, 61.0]
    assert [(config.from_scratch, config.image_size, config.seed) for config in tuned] == [
        (scratch, size, seed) for scratch in (False, True) for size in ((6, 10), (4, 6)) for seed in (0, 2)
    ]
    assert {config.optim.epochs for config in tuned} == {3}
    assert {config.keep_ratio and keep_count(TINY, config.keep_ratio[0]) for config in tuned} == {7, None}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--at-latency", "soon"), "--at-latency soon is no time"),
        (("--at-latency", "0ms"), "--at-latency 0ms is no time"),
        (("--fit", "size"), "--fit size needs --at-latency"),
        (("--finetune-epochs", "3"), "--finetune-epochs 3 needs --at-latency"),
        (("--finetune-recipe", "finetune-cifar10"), "--finetune-recipe finetune-cifar10 needs --finetune-epochs"),
    ],
)
def test_what_makes_no_sense(
    encoders: Path, classes: Path, options: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", str(encoders / "encoder"), "--data", str(classes), *options]) == 2
    assert said in capsys.readouterr().err


def test_a_streams_graph_has_no_features_of_single_images(encoders: Path, tmp_path: Path) -> None:
    run_export(
        ExportConfig(
            checkpoint=encoders / "encoder", out=tmp_path / "stream", tokens="cached", samples=encoders / "photos"
        )
    )
    config = CompareConfig(encoders=(str(tmp_path / "stream"),), data=encoders, at_latency="1s")
    with pytest.raises(ConfigError, match="--tokens cached"):
        open_subject(read_entries(config.encoders)[0], config, None).graphs()
