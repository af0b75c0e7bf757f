"""Planted losses and gradients that are no numbers: skipped, then rolled back, then the end; the same after a kill and
on two processes.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mae_deploy.data.dataset import Batch
from mae_deploy.errors import CheckFailed
from mae_deploy.images.preprocess import default_preprocess
from mae_deploy.training.config import LoopConfig
from mae_deploy.training.monitor.guard import Guard, StepOutcome, input_fault
from mae_deploy.training.state.progress import Progress, load_progress
from mae_deploy.training.state.run_folder import read_metrics
from tests.training.linear_runs import Planted, Trained, train
from tests.training.tiny_runs import optim, run_processes

SPEC = default_preprocess((2, 2))


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [{key: line[key] for key in ("step", "loss", "lr", "skipped")} for line in read_metrics(run)]


def saved(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "nonfinite").iterdir())


def state_of(done: Trained | Path) -> Progress:
    return load_progress((done if isinstance(done, Path) else done.folder.path) / "checkpoints" / "last" / "state")


@pytest.mark.parametrize("planted", [Planted([3]), Planted([3], value=math.inf), Planted([3], gradient=True)])
def test_a_step_is_skipped_counted_and_its_batch_saved(images: Path, tmp_path: Path, planted: Planted) -> None:
    one_epoch = train(images, tmp_path / "one", optim(lr=1e-3, min_lr=1e-3, warmup_epochs=0.0, epochs=1), loss=planted)
    done = train(
        images,
        tmp_path / "run",
        optim(lr=1e-3, min_lr=1e-3, warmup_epochs=0.0, epochs=3),
        LoopConfig(keep_checkpoints=9),
        loss=planted,
    )
    lines = read_metrics(tmp_path / "run")
    assert [line["skipped"] for line in lines] == [0, 0, 1, 1, 1, 1]
    finite = [line["loss"] is not None for line in lines]
    assert finite == ([True] * 6 if planted.gradient else [True, True, False, True, True, True])
    assert lines[2]["grad_norm"] is None
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    assert done.summary["skipped"] == 1

    # AdamW has taken one step less, and weights of step 3 are those of step 2.
    optimizer = load_file(done.folder.checkpoints / "last" / "state" / "optimizer.safetensors")
    assert float(optimizer["weight/step"]) == 5
    assert torch.isfinite(done.model.weight).all()
    assert not torch.equal(done.model.weight, one_epoch.model.weight)

    assert saved(tmp_path / "run") == ["step-3.json", "step-3.safetensors"]
    about = json.loads((tmp_path / "run" / "nonfinite" / "step-3.json").read_text(encoding="utf-8"))
    assert about["step"] == 3
    assert len(set(about["names"])) == 5
    assert all(Path(name).parent == images for name in about["names"])
    assert not math.isfinite(float(about["grad_norm"]))
    batch = load_file(tmp_path / "run" / "nonfinite" / "step-3.safetensors")
    assert (batch["images"].shape, batch["images"].dtype) == ((5, 3, 5, 7), torch.uint8)


def test_a_skipped_step_leaves_the_weights_alone(images: Path, tmp_path: Path) -> None:
    loop = LoopConfig(checkpoint_minutes=1e-9, keep_checkpoints=9)
    done = train(images, tmp_path / "run", optim(epochs=2, warmup_epochs=0.0), loop, loss=Planted([2]))
    weights = [
        load_file(done.folder.checkpoints / f"step-{step}" / "model.safetensors")["weight"] for step in (1, 2, 3)
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])


def test_only_the_batch_whose_loss_it_was_is_saved(images: Path, tmp_path: Path) -> None:
    """Of two that are accumulated."""
    calls: list[int] = []

    def loss(model: Any, batch: Any) -> Any:
        calls.append(1)
        return Planted([1] if len(calls) == 2 else [])(model, batch)

    train(images, tmp_path / "run", optim(batch_size=3, accum_iter=2, epochs=2), loss=loss)
    batch = load_file(tmp_path / "run" / "nonfinite" / "step-1.safetensors")
    assert len(batch["images"]) == 3
    about = json.loads((tmp_path / "run" / "nonfinite" / "step-1.json").read_text(encoding="utf-8"))
    assert [math.isfinite(float(value)) for value in about["own_losses"]] == [True, False]


def test_too_many_in_a_row_go_back_to_the_last_good_checkpoint_at_half_the_rate(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = optim(epochs=6, lr=1e-3, min_lr=1e-3, warmup_epochs=0.0)
    loop = LoopConfig(keep_checkpoints=99, max_skips=3)
    done = train(images, tmp_path / "run", settings, loop, loss=Planted([6, 7, 8]))
    lines = read_metrics(tmp_path / "run")
    assert [line["skipped"] for line in lines] == [0] * 5 + [1, 2, 3] + [3] * 4
    assert [line["lr"] for line in lines] == [1e-3] * 8 + [5e-4] * 4
    # Step 6 ended an epoch, but its checkpoint was not good: nothing finite came after it.
    assert "rolled back after step 8 to step-4; the learning rate is now 0.5 times" in capsys.readouterr().err
    weights = {
        step: load_file(done.folder.checkpoints / f"step-{step}" / "model.safetensors")["weight"] for step in (4, 6, 8)
    }
    assert torch.equal(weights[8], weights[4])
    assert not torch.equal(weights[6], weights[4])
    assert (
        float(load_file(done.folder.checkpoints / "last" / "state" / "optimizer.safetensors")["weight/step"]) == 4 + 4
    )
    state = state_of(done)
    assert (state.rollbacks, state.lr_factor, state.rollback_at, state.skipped) == (1, 0.5, None, 3)


def test_without_a_good_checkpoint_it_goes_back_to_the_start(images: Path, tmp_path: Path) -> None:
    loop = LoopConfig(checkpoint_minutes=1e-9, keep_checkpoints=99, max_skips=2)
    done = train(images, tmp_path / "run", optim(epochs=2, warmup_epochs=0.0), loop, loss=Planted([1, 2]))
    torch.manual_seed(0)
    start = torch.nn.Linear(105, 1)
    assert torch.equal(load_file(done.folder.checkpoints / "step-2" / "model.safetensors")["weight"], start.weight)
    assert done.summary["rollbacks"] == 1


def test_after_the_last_rollback_it_stops_and_names_the_batch(images: Path, tmp_path: Path) -> None:
    loop = LoopConfig(max_skips=2, max_rollbacks=2)
    with pytest.raises(
        CheckFailed, match=r"2 step\(s\) in a row, after going back 2 time\(s\); step 8: loss nan.*step-8\.safetensors"
    ) as caught:
        train(images, tmp_path / "run", optim(epochs=9), loop, loss=Planted(range(3, 99)))
    assert caught.value.hint is not None
    assert "--clip-grad 1" in caught.value.hint
    lines = read_metrics(tmp_path / "run")
    assert len(lines) == 8
    assert [line["skipped"] for line in lines] == [0, 0, 1, 2, 3, 4, 5, 6]


def test_a_run_does_not_end_well_in_skipped_steps(images: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckFailed, match="step 6"):
        train(images, tmp_path / "run", optim(epochs=3), loss=Planted([4, 5, 6]))


def test_killed_within_a_row_of_skips_it_decides_the_same(images: Path, tmp_path: Path) -> None:
    """A checkpoint at each step; a resumption after every one of them."""
    settings = optim(epochs=6)
    planted = Planted([4, 6, 7, 8, 9])
    whole = train(
        images, tmp_path / "whole", settings, LoopConfig(checkpoint_minutes=1e-9, keep_checkpoints=99), loss=planted
    )
    assert state_of(whole).rollbacks == 1
    for last in range(3, 11):
        copy = tmp_path / f"from-{last}"
        for name in ("config.yaml", "data.json", "metrics.jsonl"):
            (copy / "checkpoints").mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((tmp_path / "whole" / name).read_bytes())
        for step in range(1, last + 1):
            (copy / "checkpoints" / f"step-{step}").symlink_to(whole.folder.checkpoints / f"step-{step}")
        (copy / "checkpoints" / "last").symlink_to(f"step-{last}")
        again = train(
            images, copy, settings, LoopConfig(checkpoint_minutes=1e-9, keep_checkpoints=99), loss=planted, resume=True
        )
        assert lines_of(copy) == lines_of(tmp_path / "whole"), last
        assert torch.equal(again.model.weight, whole.model.weight)


def test_two_processes_where_one_has_it(images: Path, tmp_path: Path) -> None:
    settings = optim(batch_size=2, epochs=5)
    loop = LoopConfig(max_skips=2, keep_checkpoints=99)
    assert run_processes(2, train_planted, images, tmp_path / "run", settings, loop, Planted([5, 6], rank=1)) == [0, 0]
    lines = read_metrics(tmp_path / "run")
    assert [line["skipped"] for line in lines] == [0, 0, 0, 0, 1, 2, 2, 2, 2, 2]
    assert [line["loss"] is None for line in lines] == [False] * 4 + [True] * 2 + [False] * 4
    # Only the process that had it saves its share of the batch.
    assert saved(tmp_path / "run") == [
        f"step-{step}-rank-1.{ending}" for step in (5, 6) for ending in ("json", "safetensors")
    ]
    state = state_of(tmp_path / "run")
    assert (state.rollbacks, state.good) == (1, 8)

    # One process with the same global batch decides the same.
    train(images, tmp_path / "one", optim(batch_size=4, epochs=5), loop, loss=Planted([5, 6]))
    for one, two in zip(lines_of(tmp_path / "one"), lines_of(tmp_path / "run"), strict=True):
        ours, theirs = one.pop("loss"), two.pop("loss")
        assert one == two
        assert ours == theirs or ours == pytest.approx(theirs, rel=1e-5)  # sums in another order


def train_planted(images: Path, out: Path, settings: Any, loop: LoopConfig, planted: Planted) -> None:
    train(images, out, settings, loop, loss=planted)


# --- fp16 ------------------------------------------------------------------------------------------------------------


def outcome(step: int, loss: float, norm: float, scale: float | None) -> StepOutcome:
    numbers = torch.zeros(2, dtype=torch.int64)
    batch = Batch(torch.zeros(2, 3, 2, 2, dtype=torch.uint8), numbers, (), ("a", "b"), numbers, numbers)
    return StepOutcome(step, loss, norm, (loss,), (batch,), scale)


def test_an_overflow_of_the_loss_scale_is_counted_but_is_no_event_until_nothing_is_left_of_the_scale(
    tmp_path: Path,
) -> None:
    state = Progress()
    guard = Guard(state, LoopConfig(max_skips=2), tmp_path, SPEC, process=None, late=2, total_steps=99)
    for step in range(1, 8):
        assert guard.observe(outcome(step, 1.5, math.inf, 2.0 ** (7 - step + 1))) is None
    assert (state.skipped, state.consecutive_skips, state.rollback_at) == (7, 0, None)
    assert not (tmp_path / "nonfinite").exists()
    for step in (8, 9):
        guard.observe(outcome(step, 1.5, math.inf, 1.0))
    assert (state.skipped, state.consecutive_skips, state.rollback_at) == (9, 2, 9 + 2)
    # On a GPU two more steps are under way when that is known; they do not count twice.
    guard.observe(outcome(10, math.nan, math.nan, 1.0))
    assert (state.skipped, state.consecutive_skips, state.rollback_at) == (10, 2, 11)


def test_a_loss_that_is_no_number_is_an_event_at_any_scale(tmp_path: Path) -> None:
    state = Progress()
    Guard(state, LoopConfig(), tmp_path, SPEC, process=None, late=2, total_steps=99).observe(
        outcome(1, math.nan, math.nan, 65536.0)
    )
    assert state.consecutive_skips == 1


# --- the input -------------------------------------------------------------------------------------------------------


def batch_of(images: torch.Tensor) -> Batch:
    numbers = torch.zeros(len(images), dtype=torch.int64)
    return Batch(images, numbers, (), ("a",) * len(images), numbers, numbers)


def test_the_input_is_looked_at_first(tmp_path: Path) -> None:
    images = torch.zeros(2, 3, 2, 2)
    images[1, 2, 0, 1] = 0.5
    narrow = replace(SPEC, pixel_max=1.0, std=(0.2, 0.2, 1e-30))
    fault = input_fault([batch_of(torch.zeros(1, 3, 2, 2)), batch_of(images)], replace(narrow, mean=(0.4, 0.4, 0.0)))
    assert fault is not None
    assert "channel 2 (counted from 0) reaches 5e+29 deviations with --mean 0, --std 1e-30" in fault
    images[0, 1, 0, 0] = math.nan
    assert "channel 1 (counted from 0) reaches nan" in str(input_fault([batch_of(images)], narrow))
    state = Progress(rollbacks=99)
    guard = Guard(state, LoopConfig(max_skips=1), tmp_path, narrow, process=None, late=0, total_steps=9)
    error = guard.observe(replace(outcome(1, math.nan, math.nan, None), batches=(batch_of(images),)))
    assert error is not None
    assert str(error.hint).startswith("the input is at fault: channel 1")


def test_an_ordinary_input_is_not_to_blame(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (2, 3, 2, 2), dtype=torch.uint8)
    assert input_fault([batch_of(images)], SPEC) is None
    assert input_fault([batch_of(images)], replace(SPEC, mean=(0.0,) * 3, std=(1 / 255,) * 3)) is None
    guard = Guard(Progress(rollbacks=99), LoopConfig(max_skips=1), tmp_path, SPEC, process=None, late=0, total_steps=9)
    error = guard.observe(outcome(1, math.nan, math.nan, None))
    assert error is not None
    assert str(error.hint).startswith("look at the images of that batch")
