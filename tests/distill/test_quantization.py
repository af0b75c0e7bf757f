"""A student that learned while it was rounded: plain weights, the INT8 export that it was trained for, and a run that
goes on as it was.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mae_deploy.checkpoint import WEIGHTS
from mae_deploy.cli import main
from mae_deploy.config import from_dict
from mae_deploy.distill.config import EdgeConfig
from mae_deploy.distill.quantization import student_quantizer
from mae_deploy.distill.run import run_distill
from mae_deploy.errors import ConfigError
from mae_deploy.files import point_link
from mae_deploy.models.vit import Classifier
from mae_deploy.runtime.backbone import Backbone
from mae_deploy.training.config import LoopConfig
from mae_deploy.training.state.run_folder import read_metrics
from mae_deploy.weights.load import load_model
from tests.distill.test_run import distilling
from tests.models.tiny_models import random_tensor, tiny_encoder
from tests.training.tiny_runs import losses_of, optim, progress_of

ANY: dict[str, Any] = {"min_sqnr": 0, "min_cosine": 0.001, "max_drop": 99, "max_latency": 1000}
"""Budgets that a student of 64 channels meets, however loaded the machine is."""


def test_the_student_is_what_its_export_computes(classes: Path, expert: Path, tmp_path: Path) -> None:
    edge = EdgeConfig(quantize="dynamic", quantize_from=0.3, outlier_weight=0.01)
    run_distill(distilling(classes, expert, tmp_path / "run", edge=edge, optim=optim(epochs=4)))
    evaluations = read_metrics(tmp_path / "run", "eval.jsonl")
    assert ["top1" in line for line in evaluations] == [
        False,
        True,
        True,
        True,
    ]  # the best checkpoint is one that was rounded
    assert all("top1_fp32" in line for line in evaluations)
    assert read_metrics(tmp_path / "run")[0]["outlier_loss"] > 0
    student, loaded = load_model(tmp_path / "run")
    assert isinstance(student, Classifier)
    assert loaded.tensors.keys() == student.state_dict().keys()
    options = [text for name, value in ANY.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    where = ["--out", str(tmp_path / "int8"), "--samples", str(classes / "val"), "--threads", "1"]
    assert main(["export", str(tmp_path / "run"), *where, "--precision", "int8", "--no-search", *options]) == 0
    images = random_tensor(4, 3, 12, 8)
    quantizer = student_quantizer(student, EdgeConfig(quantize="dynamic", quantize_from=0), sharding="ddp")
    assert quantizer is not None
    with torch.no_grad():
        plain = student(images)
        with quantizer.step(0, 0.0):
            expected = student(images)
    with Backbone.load(tmp_path / "int8", threads=1) as backbone:
        found = torch.from_numpy(backbone(images.numpy())["logits"])
    assert (found - expected).abs().max() < 0.1 * (plain - expected).abs().max()


def test_a_run_goes_on_with_its_ranges(classes: Path, teacher: Path, tmp_path: Path) -> None:
    """From its checkpoint after two of four epochs; the ranges of static are in none of the student's tensors."""
    edge = EdgeConfig(quantize="static", quantize_from=0.3, ranges_observed=4)
    settings: dict[str, Any] = {
        "edge": edge,
        "optim": optim(epochs=4, ema=0.9),
        "loop": LoopConfig(keep_checkpoints=4),
    }
    run_distill(distilling(classes / "train", teacher, tmp_path / "whole", **settings))
    steps = [progress_of(tmp_path / "whole") * epochs // 4 for epochs in (2, 3, 4)]
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed", symlinks=True)
    for step in steps[1:]:
        shutil.rmtree(tmp_path / "resumed" / "checkpoints" / f"step-{step}")
    point_link(tmp_path / "resumed" / "checkpoints" / "last", f"step-{steps[0]}")
    assert progress_of(tmp_path / "resumed") == steps[0]
    run_distill(distilling(classes / "train", teacher, tmp_path / "resumed", **settings, resume=True))
    assert losses_of(tmp_path / "resumed") == losses_of(tmp_path / "whole")
    last, expected = (load_file(tmp_path / name / "checkpoints" / "last" / WEIGHTS) for name in ("resumed", "whole"))
    assert last.keys() == load_model(tmp_path / "whole")[0].state_dict().keys()
    assert all(torch.equal(tensor, last[name]) for name, tensor in expected.items())


def test_nothing_to_do() -> None:
    assert student_quantizer(tiny_encoder(), EdgeConfig(), sharding="fsdp2") is None


@pytest.mark.parametrize(
    ("edge", "said"),
    [(EdgeConfig(quantize="static"), "--quantize static"), (EdgeConfig(outlier_weight=0.5), "--outlier-weight 0.5")],
)
def test_sharded_weights_are_refused(edge: EdgeConfig, said: str) -> None:
    with pytest.raises(ConfigError, match=f"{said} with --sharding fsdp2"):
        student_quantizer(tiny_encoder(), edge, sharding="fsdp2")


@pytest.mark.parametrize(
    "settings",
    [
        {"quantize_from": 1.0},
        {"outlier_weight": -1.0},
        {"ranges_observed": 0},
        {"smooth_alpha": 1.5},
        {"ranges_until": 2.0},
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any]) -> None:
    (name,) = settings
    with pytest.raises(ConfigError, match=f"^'?edge.{name} "):
        from_dict(EdgeConfig, settings, where="edge.")
