"""The step's time is split among its parts; what no loss times is not shown."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mae_deploy.training.monitor.timing import StepTimer, StepTimes
from mae_deploy.training.state.run_folder import read_metrics
from mae_deploy.training.step import StepBatch
from tests.training.linear_runs import squared_error, train
from tests.training.tiny_runs import optim

TAKEN = StepTimes(images=118, seconds=0.4, waited=0.016, parts={"teacher": 0.1, "other": 0.12})


def test_parts_are_added_up() -> None:
    timer = StepTimer(torch.device("cpu"))
    assert timer.seconds() == {}
    for _ in range(2):
        with timer.part("teacher"):
            time.sleep(0.01)
    with timer.part("other"):
        pass
    seconds = timer.seconds()
    assert 0.02 <= seconds["teacher"] < 1
    assert 0 <= seconds["other"] < 0.01
    assert timer.seconds() == seconds


def test_numbers_of_a_step() -> None:
    assert TAKEN.student == pytest.approx(0.4 - 0.016 - 0.22)
    assert TAKEN.metrics() == {
        "images_per_second": 295.0,
        "data_wait": 0.04,
        "teacher_seconds": 0.1,
        "other_seconds": 0.12,
        "student_seconds": 0.164,
    }
    assert StepTimes(118, 0.4, 0.016, {}).metrics() == {"images_per_second": 295.0, "data_wait": 0.04}


def test_words_beside_the_bar() -> None:
    assert TAKEN.note() == "295 img/s  teacher 25% (1180 img/s)  other 30% (983 img/s)  student 720 img/s  wait 4%"
    assert StepTimes(118, 0.4, 0.016, {}).note() == "295 img/s  wait 4%"
    # On a GPU, the first launches take the host next to nothing.
    hurried = StepTimes(118, 0.01, 0.0, {"teacher": 0.1})
    assert hurried.student == 0
    assert hurried.note() == "11800 img/s  teacher 1000% (1180 img/s)  wait 0%"


def test_a_loss_that_times_a_part_has_it_in_the_metrics(images: Path, tmp_path: Path) -> None:
    def loss(model: nn.Module, batch: StepBatch) -> dict[str, Tensor]:
        with batch.timed("teacher"):
            time.sleep(0.01)
        return squared_error(model, batch)

    lines = read_metrics(
        train(images, tmp_path / "run", optim(epochs=1, batch_size=2, accum_iter=2), loss=loss).folder.path
    )
    assert list(lines[0])[-4:] == ["images_per_second", "data_wait", "teacher_seconds", "student_seconds"]
    for line in lines:
        seconds = 4 / line["images_per_second"]
        assert 0.02 <= line["teacher_seconds"] < seconds
        total = line["teacher_seconds"] + line["student_seconds"] + line["data_wait"] * seconds
        assert total == pytest.approx(seconds, rel=0.01)  # the rate has two decimals, the share four


def test_a_loss_is_told_what_it_sees_and_how_far_the_run_is(images: Path, tmp_path: Path) -> None:
    told: list[tuple[float, list[int], list[int]]] = []

    def loss(model: nn.Module, batch: StepBatch) -> dict[str, Tensor]:
        told.append((batch.done, batch.items.tolist(), batch.view.tolist()))
        return squared_error(model, batch)

    train(images, tmp_path / "run", optim(epochs=2), loss=loss)
    assert [done for done, _, _ in told] == [0.0, 0.25, 0.5, 0.75, 0.75]  # the last batch again, at the end
    for first, second in (told[:2], told[2:4]):
        assert len({*first[1], *second[1]} & set(range(11))) == 10
    assert all(views == [0] * 5 for _, _, views in told)
