"""The loop that every stage shares: what it writes, refuses and survives."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

from mae_deploy.checkpoint import open_checkpoint
from mae_deploy.cli import main
from mae_deploy.errors import CheckFailed, ConfigError, MaeDeployError, MissingDependency
from mae_deploy.training.config import LoopConfig, OptimConfig
from mae_deploy.training.loop import make_accelerator
from mae_deploy.training.state.run_folder import read_metrics
from tests.data.image_folders import spoil
from tests.training.linear_runs import train
from tests.training.tiny_runs import command_of, losses_of, optim, pretraining

# --- what a run leaves behind ----------------------------------------------------------------------------------------


def test_metrics_checkpoints_and_summary(images: Path, tmp_path: Path) -> None:
    done = train(images, tmp_path / "run", optim(epochs=3))
    lines = read_metrics(done.folder.path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["epoch"] for line in lines] == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]
    assert set(lines[0]) == {
        "step",
        "epoch",
        "loss",
        "bias",
        "grad_norm",
        "lr",
        "skipped",
        "images_per_second",
        "data_wait",
    }
    # Warm-up of half an epoch is one step of two.
    assert [line["lr"] for line in lines] == [0.0, *(0.0005 * (1 + math.cos(math.pi * k / 5)) for k in range(5))]
    assert all(0 <= line["data_wait"] <= 1 and line["images_per_second"] > 0 for line in lines)

    checkpoint = open_checkpoint(done.folder.path)
    assert (checkpoint.path.resolve().name, checkpoint.metadata.step) == ("step-6", 6)
    assert torch.equal(checkpoint.tensors()["weight"], done.model.weight)
    assert sorted(path.name for path in done.folder.checkpoints.iterdir()) == ["last", "step-6"]
    assert list((done.folder.path / "tensorboard").glob("events.out.tfevents.*")) != []
    assert done.summary == {
        "out": str(done.folder.path),
        "steps": 6,
        "unreadable": 0,
        "first_loss": lines[0]["loss"],
        "last_loss": pytest.approx((lines[4]["loss"] + lines[5]["loss"]) / 2),
        "images_per_second": sorted(line["images_per_second"] for line in lines)[3],
    }


def test_checkpoints_are_written_as_often_as_asked(images: Path, tmp_path: Path) -> None:
    done = train(images, tmp_path / "run", optim(epochs=5), LoopConfig(checkpoint_every=2, keep_checkpoints=9))
    assert {path.name for path in done.folder.checkpoints.glob("step-*")} == {"step-4", "step-8", "step-10"}


def test_checkpoints_within_an_epoch_by_the_clock(images: Path, tmp_path: Path) -> None:
    done = train(images, tmp_path / "run", optim(epochs=2), LoopConfig(checkpoint_minutes=1e-9, keep_checkpoints=9))
    assert {path.name for path in done.folder.checkpoints.glob("step-*")} == {"step-1", "step-2", "step-3", "step-4"}


def test_the_best_checkpoint_is_the_first_of_the_highest_top1(images: Path, tmp_path: Path) -> None:
    scores = iter([50.0, 75.0, 75.0, 25.0])

    def evaluate(_: Accelerator, model: nn.Module) -> dict[str, float]:
        assert isinstance(model, nn.Linear)
        return {"top1": next(scores)}

    done = train(images, tmp_path / "run", optim(epochs=4), evaluate=evaluate)
    assert [(line["step"], line["epoch"], line["top1"]) for line in read_metrics(done.folder.path, "eval.jsonl")] == [
        (2, 1, 50.0),
        (4, 2, 75.0),
        (6, 3, 75.0),
        (8, 4, 25.0),
    ]
    assert sorted(path.name for path in done.folder.checkpoints.iterdir()) == ["best", "last", "step-4", "step-8"]
    assert open_checkpoint(done.best).metadata.metrics == {"top1": 75.0}
    assert open_checkpoint(done.folder.path).metadata.step == 4  # a run folder means its best
    assert (done.summary["top1"], done.summary["best_top1"]) == (25.0, 75.0)


def test_a_log_has_a_line_an_epoch_with_top1(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = iter([50.0, 75.0, 25.0])
    done = train(images, tmp_path / "run", optim(epochs=3), evaluate=lambda *_: {"top1": next(scores)})
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train  epoch")]
    means = [sum(done.losses[first : first + 2]) / 2 for first in (0, 2, 4)]
    accuracies = ("top-1 50.00 %", "top-1 75.00 %", "top-1 25.00 % (best 75.00)")
    assert lines == [
        f"train  epoch {epoch}/3  mean loss {mean:.4f}  {accuracy}"
        for epoch, mean, accuracy in zip((1, 2, 3), means, accuracies, strict=True)
    ]


def test_an_evaluation_without_numbers_is_never_the_best(images: Path, tmp_path: Path) -> None:
    scores = iter([math.nan, 25.0, math.nan, 12.5])
    done = train(images, tmp_path / "run", optim(epochs=4), evaluate=lambda *_: {"top1": next(scores)})
    assert [line["top1"] for line in read_metrics(done.folder.path, "eval.jsonl")] == [None, 25.0, None, 12.5]
    assert done.best.resolve().name == "step-4"


def test_a_run_whose_weights_end_without_numbers_has_failed(images: Path, tmp_path: Path) -> None:
    """The last step's loss is that of the weights before it; what it made of them is looked at once."""
    with pytest.raises(CheckFailed, match=r"after the last step, 2, give no numbers \(loss inf\)"):
        train(images, tmp_path / "run", optim(epochs=1, lr=1e30))
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))
    scores = iter([25.0, math.nan])
    with pytest.raises(CheckFailed, match=r"give no numbers \(top1 nan\)"):
        train(images, tmp_path / "evaluated", optim(epochs=2), evaluate=lambda *_: {"top1": next(scores)})


def test_evaluation_as_often_as_asked_and_at_the_end(images: Path, tmp_path: Path) -> None:
    done = train(images, tmp_path / "run", optim(epochs=5), LoopConfig(eval_every=2), evaluate=lambda *_: {"top1": 1.0})
    assert [line["epoch"] for line in read_metrics(done.folder.path, "eval.jsonl")] == [2, 4, 5]


def test_the_end_of_each_epoch_is_told(images: Path, tmp_path: Path) -> None:
    told: list[tuple[int, bool]] = []
    train(images, tmp_path / "run", optim(epochs=3), epoch_end=lambda _, epochs, last: told.append((epochs, last)))
    assert told == [(1, False), (2, False), (3, True)]


# --- arithmetic ------------------------------------------------------------------------------------------------------


def test_accumulated_gradients_are_those_of_the_big_batch(images: Path, tmp_path: Path) -> None:
    whole = train(images, tmp_path / "whole", optim(epochs=3, batch_size=10))
    parts = train(images, tmp_path / "parts", optim(epochs=3, batch_size=5, accum_iter=2))
    # The same float32 sums in two halves; AdamW's division by the gradient's size keeps the difference relative.
    assert parts.losses == pytest.approx(whole.losses, rel=1e-5)
    torch.testing.assert_close(parts.model.weight, whole.model.weight, rtol=0, atol=1e-6)
    assert whole.losses != [whole.losses[0]] * 3
    # AdamW does not see the gradient's scale; clipping would.
    torch.testing.assert_close(parts.first_moment(), whole.first_moment(), rtol=1e-4, atol=1e-6)


def test_each_group_learns_at_its_scale_of_the_rate(images: Path, tmp_path: Path) -> None:
    """AdamW's first steps are as long as the learning rate; the very first one here has none."""
    torch.manual_seed(0)
    before = nn.Linear(105, 1)
    done = train(images, tmp_path / "run", optim(epochs=1, lr=1e-3), weight_scale=0.25)
    # The moments of two gradients make a step that is near the rate, and decay takes a 20,000th.
    with torch.no_grad():
        assert 0.9e-3 < float((done.model.bias - before.bias).abs()) < 1.1e-3
        assert 0.2e-3 < float((done.model.weight - before.weight).abs().median()) < 0.3e-3


def test_the_gradient_is_clipped_to_the_norm(images: Path, tmp_path: Path) -> None:
    """After one step, AdamW's first moment is a tenth of the gradient."""

    def norm(out: Path, clip: float | None) -> float:
        done = train(images, out, optim(epochs=1, batch_size=10, clip_grad=clip))
        state = load_file(done.folder.checkpoints / "last" / "state" / "optimizer.safetensors")
        return 10 * math.sqrt(sum(float(state[f"{name}/exp_avg"].square().sum()) for name in ("weight", "bias")))

    free = norm(tmp_path / "free", None)
    assert free > 1
    assert norm(tmp_path / "loose", 2 * free) == free
    # clip_grad_norm_ adds 1e-6 to the norm that it divides by.
    assert norm(tmp_path / "tight", free / 3) == pytest.approx(free / 3, rel=1e-5)


def test_a_run_repeats_itself(images: Path, tmp_path: Path) -> None:
    first, second = (train(images, tmp_path / name, optim(epochs=2)) for name in "ab")
    assert losses_of(first.folder.path) == losses_of(second.folder.path)
    assert torch.equal(first.model.weight, second.model.weight)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_on_the_command_line_losses_that_stay_non_finite_are_one_line_and_exit_code_1(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = pretraining(images, tmp_path / "run", optim=optim(lr=1e38, warmup_epochs=0.0))
    assert main(command_of(config)) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("error: ", "hint: "))]
    assert len(errors) == 2
    assert errors[0].startswith("error: the loss or its gradient was not finite in 3 step(s) in a row")
    assert errors[1].endswith("start a new run with a smaller --blr, --clip-grad 1, or --precision fp32")


def test_unreadable_images_are_replaced_and_listed_once(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = spoil(images / "02.png").rename(images / "[red].png")  # what rich would take for a colour
    other = spoil(images / "07.png")
    done = train(images, tmp_path / "run", optim(epochs=4))
    listed = (tmp_path / "run" / "unreadable.txt").read_text(encoding="utf-8").splitlines()
    assert sorted(line.partition(":")[0] for line in listed) == sorted(map(str, (odd, other)))
    assert done.summary["unreadable"] == 2
    assert len(done.losses) == 8
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("skipped ")]
    assert sorted(said) == sorted(f"skipped {line}" for line in listed)
    # A resumed run knows them.
    again = train(images, tmp_path / "run", optim(epochs=4), resume=True)
    assert again.summary["unreadable"] == 2
    assert "skipped" not in capsys.readouterr().err


def test_too_many_unreadable_images_end_the_run(images: Path, tmp_path: Path) -> None:
    for number in (1, 4, 5, 9):
        spoil(images / f"{number:02d}.png")
    with pytest.raises(CheckFailed, match=r"4 unreadable images, listed in .*unreadable\.txt") as caught:
        train(images, tmp_path / "run", optim(epochs=9))
    assert caught.value.hint is not None
    assert "--max-corrupt 3" in caught.value.hint
    assert len((tmp_path / "run" / "unreadable.txt").read_text(encoding="utf-8").splitlines()) == 4


def test_nothing_readable_at_all(images: Path, tmp_path: Path) -> None:
    for path in images.iterdir():
        path.write_text("no image", encoding="utf-8")
    for path in sorted(images.iterdir())[3:]:
        path.unlink()
    with pytest.raises(CheckFailed, match="no readable image found below") as caught:
        train(images, tmp_path / "run", optim(batch_size=3))
    assert caught.value.hint is not None
    assert "unreadable.txt" in caught.value.hint


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MissingDependency, match="no CUDA device") as caught:
        make_accelerator("cuda", "auto", tmp_path)
    assert isinstance(caught.value, MaeDeployError)
    assert caught.value.exit_code == 3


def test_shares_of_a_model_need_other_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConfigError, match="--sharding fsdp2 shares the model among several processes") as caught:
        make_accelerator("cpu", "fp32", tmp_path, sharding="fsdp2")
    assert "torchrun --nproc-per-node" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 0}, "--epochs must be at least 1 and at most 100000, got 0"),
        ({"batch_size": 0}, "--batch-size must be at least 1, got 0"),
        ({"accum_iter": 0}, "--accum-iter must be at least 1, got 0"),
        ({"lr": -1.0}, "--lr must be at least 0, got -1.0"),
        ({"weight_decay": -0.1}, "--weight-decay must be at least 0, got -0.1"),
        ({"clip_grad": 0.0}, "--clip-grad must be above 0, got 0.0"),
        ({"ema": 1.0}, "--ema must be above 0 and below 1, got 1.0"),
    ],
)
def test_impossible_settings(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OptimConfig(**values)


@pytest.mark.parametrize("name", ["checkpoint_every", "keep_checkpoints", "eval_every", "checkpoint_minutes"])
def test_impossible_intervals(name: str) -> None:
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} must be (at least 1|above 0), got 0"):
        LoopConfig(**{name: 0})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_skips": 0}, "--max-skips must be at least 1, got 0"),
        ({"max_rollbacks": -1}, "--max-rollbacks must be at least 0, got -1"),
        ({"tracker": ("wandb", "comet")}, "--tracker 'comet' is not one of wandb, mlflow"),
        ({"sharding": "fsdp2", "precision": "fp16"}, "fsdp2 does not work with --precision fp16"),
    ],
)
def test_impossible_runs(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoopConfig(**values)
