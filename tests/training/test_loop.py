"""The loop that every stage shares: what it plans, writes, refuses and survives."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn

from mae_deploy.checkpoint import Metadata, open_checkpoint
from mae_deploy.cli import main
from mae_deploy.data.config import CropConfig
from mae_deploy.data.dataset import ImageDataset, unlabelled_images
from mae_deploy.data.transforms import train_transform
from mae_deploy.errors import CheckFailed, ConfigError, MaeDeployError, MissingDependency
from mae_deploy.preprocess import Preprocess
from mae_deploy.training.config import LoopConfig, OptimConfig
from mae_deploy.training.loop import Job, Plan, fit, make_accelerator, make_plan
from mae_deploy.training.optim import decay_groups
from mae_deploy.training.run_folder import RunFolder, read_metrics
from tests.data.image_folders import spoil
from tests.training.tiny_runs import command_of, losses_of, optim, pretraining

SPEC = Preprocess(image_size=(5, 7))
Loss = Callable[[nn.Module, Tensor, Tensor], dict[str, Tensor]]


def squared_error(model: nn.Module, images: Tensor, _: Tensor) -> dict[str, Tensor]:
    error = model(images.flatten(1)) - 1
    return {"loss": error.square().mean(), "bias": error.mean()}


@dataclass
class Trained:
    """A finished run and the layer that it trained."""

    model: nn.Linear
    folder: RunFolder
    summary: dict[str, Any]

    @property
    def losses(self) -> list[float]:
        return [line["loss"] for line in read_metrics(self.folder.path)]

    def first_moment(self) -> Tensor:
        """Of the weights, as AdamW had it at the last checkpoint."""
        return load_file(self.folder.checkpoints / "last" / "state" / "optimizer.safetensors")["weight/exp_avg"]

    @property
    def best(self) -> Path:
        return self.folder.checkpoints / "best"


def train(
    images: Path,
    out: Path,
    settings: OptimConfig | None = None,
    loop: LoopConfig | None = None,
    *,
    loss: Loss = squared_error,
    resume: bool = False,
    weight_scale: float = 1.0,
    **more: Any,
) -> Trained:
    """Train one linear layer, its weight at a scale of the learning rate; `more` goes into the job."""
    torch.manual_seed(0)
    model = nn.Linear(105, 1)
    found = unlabelled_images(images)
    dataset = ImageDataset(found, train_transform(SPEC, CropConfig()), channels=3, seed=0, replace_unreadable=True)
    groups = decay_groups(model, 0.05)
    assert groups[0]["names"] == ["weight"]
    groups[0]["lr_scale"] = weight_scale
    job = Job(
        title="train",
        model=model,
        saved=model,
        groups=groups,
        dataset=dataset,
        spec=SPEC,
        loss=loss,
        metadata=lambda: Metadata(kind="encoder", encoder={}, preprocess={}),
        paper_warmup=1.0,
        **more,
    )
    settings = settings or optim()
    accelerator = make_accelerator("cpu", "fp32", out)
    folder = RunFolder.open(out, settings, found.fingerprint(), resume=resume)
    summary = fit(job, folder, accelerator, optim=settings, loop=loop or LoopConfig(), num_workers=0, max_corrupt=3, seed=0)
    return Trained(model, folder, summary)


# --- plan ------------------------------------------------------------------------------------------------------------


def test_the_plan_of_the_paper() -> None:
    """ImageNet on 64 processes of 64 images: lr = blr · 4096 / 256."""
    config = OptimConfig(epochs=800, batch_size=64, blr=1.5e-4)
    peak: Any = pytest.approx(2.4e-3)
    assert make_plan(1_281_167, config, world_size=64, paper_warmup=40) == Plan(64, 1, 312, 249_600, peak, 40)


def test_accumulation_counts_as_batch() -> None:
    plan = make_plan(101, OptimConfig(epochs=20, batch_size=5, accum_iter=3, blr=0.256), world_size=2, paper_warmup=40)
    peak: Any = pytest.approx(0.03)
    assert plan == Plan(5, 3, 3, 60, peak, 2)


def test_a_set_smaller_than_a_batch_makes_the_batch_smaller_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    plan = make_plan(7, OptimConfig(epochs=3, batch_size=64, accum_iter=4), world_size=2, paper_warmup=1)
    assert (plan.batch_size, plan.accum_iter, plan.steps_per_epoch, plan.total_steps) == (3, 1, 1, 3)
    assert "7 images do not fill 64 on 2 process(es): using 3" in capsys.readouterr().err


def test_fewer_images_than_processes() -> None:
    with pytest.raises(ConfigError, match=r"1 image\(s\) cannot be shared among 2 processes"):
        make_plan(1, OptimConfig(), world_size=2, paper_warmup=1)


# --- what a run leaves behind ----------------------------------------------------------------------------------------


def test_metrics_checkpoints_and_summary(images: Path, tmp_path: Path) -> None:
    done = train(images, tmp_path / "run", optim(epochs=3))
    lines = read_metrics(done.folder.path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["epoch"] for line in lines] == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]
    assert set(lines[0]) == {"step", "epoch", "loss", "bias", "lr", "images_per_second", "data_wait"}
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


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_the_run_at_once(images: Path, tmp_path: Path, bad: float) -> None:
    calls: list[int] = []

    def loss(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        calls.append(1)
        return {"loss": squared_error(model, images, labels)["loss"] * (bad if len(calls) == 4 else 1)}

    with pytest.raises(CheckFailed, match=f"the loss is {bad} at step 4"):
        train(images, tmp_path / "run", optim(epochs=3), loss=loss)
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3]
    # What the checkpoint holds was written before.
    assert open_checkpoint(tmp_path / "run").metadata.step == 2


def test_on_the_command_line_that_is_one_line_and_exit_code_1(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = pretraining(images, tmp_path / "run", optim=optim(lr=1e38, warmup_epochs=0.0))
    assert main(command_of(config)) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("pretrain ")]
    assert len(errors) == 2
    assert errors[0].startswith("error: the loss is ")
    assert errors[1].startswith("hint: start a new run with a smaller --blr")


def test_unreadable_images_are_replaced_and_listed_once(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_resume_on_another_number_of_processes(images: Path, tmp_path: Path) -> None:
    done = train(images, tmp_path / "run", optim(epochs=1))
    file = done.folder.checkpoints / "last" / "state" / "progress.json"
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), "processes": 2}), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"--resume on 1 process\(es\) of a run on 2"):
        train(images, tmp_path / "run", optim(epochs=1), resume=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MissingDependency, match="no CUDA device") as caught:
        make_accelerator("cuda", "auto", tmp_path)
    assert isinstance(caught.value, MaeDeployError)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 0}, "--epochs"),
        ({"batch_size": 0}, "--batch-size"),
        ({"accum_iter": 0}, "--accum-iter"),
        ({"lr": -1.0}, "--lr -1.0"),
        ({"weight_decay": -0.1}, "--weight-decay -0.1"),
        ({"clip_grad": 0.0}, "--clip-grad 0.0"),
    ],
)
def test_impossible_settings(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OptimConfig(**values)


@pytest.mark.parametrize("name", ["checkpoint_every", "keep_checkpoints", "eval_every", "checkpoint_minutes"])
def test_impossible_intervals(name: str) -> None:
    with pytest.raises(ConfigError, match="must be above 0"):
        LoopConfig(**{name: 0})  # type: ignore[arg-type]
