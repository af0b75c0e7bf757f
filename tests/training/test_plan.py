"""Steps, batches and learning rates, and the effective batch that a resumed run keeps."""

from __future__ import annotations

from typing import Any

import pytest

from mae_deploy.errors import ConfigError
from mae_deploy.training.config import OptimConfig
from mae_deploy.training.plan import RunPlan, learning_rate, make_plan, resolve_warmup, resume_plan
from mae_deploy.training.state.progress import Progress


def test_the_plan_of_the_paper() -> None:
    """ImageNet on 64 processes of 64 images: lr = blr · 4096 / 256."""
    config = OptimConfig(epochs=800, batch_size=64, blr=1.5e-4)
    peak: Any = pytest.approx(2.4e-3)
    assert make_plan(1_281_167, config, world_size=64, paper_warmup=40) == RunPlan(64, 1, 312, 249_600, peak, 40)


def test_accumulation_counts_as_batch() -> None:
    plan = make_plan(101, OptimConfig(epochs=20, batch_size=5, accum_iter=3, blr=0.256), world_size=2, paper_warmup=40)
    peak: Any = pytest.approx(0.03)
    assert plan == RunPlan(5, 3, 3, 60, peak, 2)


def test_a_set_smaller_than_a_batch_makes_the_batch_smaller_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    plan = make_plan(7, OptimConfig(epochs=3, batch_size=64, accum_iter=4), world_size=2, paper_warmup=1)
    assert (plan.batch_size, plan.accum_iter, plan.steps_per_epoch, plan.total_steps) == (3, 1, 1, 3)
    assert "7 images do not fill 64 on 2 process(es): using 3" in capsys.readouterr().err


def test_what_of_a_small_set_is_cut_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    plan = make_plan(24, OptimConfig(epochs=3, batch_size=8, accum_iter=5), world_size=2, paper_warmup=1)
    assert (plan.batch_size, plan.accum_iter, plan.steps_per_epoch) == (8, 1, 1)
    said = capsys.readouterr().err
    assert "--accum-iter: 24 images do not fill 5 batches a step: using 1\n" in said
    assert "epochs: each leaves out 8 of 24 images, others each time: what does not fill a step of 16\n" in said
    make_plan(101, OptimConfig(batch_size=4, accum_iter=5), world_size=1, paper_warmup=1)  # one of a hundred
    make_plan(24, OptimConfig(batch_size=8, accum_iter=5), world_size=2, paper_warmup=1, quiet=True)
    assert capsys.readouterr().err == ""


def test_fewer_images_than_processes() -> None:
    with pytest.raises(ConfigError, match=r"1 image\(s\) cannot be shared among 2 processes"):
        make_plan(1, OptimConfig(), world_size=2, paper_warmup=1)


def resumed(
    batch_size: int, accum_iter: int, processes: int, *, before: tuple[int, int, int], effective: int
) -> tuple[int, int]:
    """Batch size and accumulation of a run that was asked for `before`: batch size, accumulation, processes."""
    state = Progress(batch_size=before[0], accum_iter=before[1], processes=before[2], effective_batch=effective)
    plan = resume_plan(
        1009,
        OptimConfig(batch_size=batch_size, accum_iter=accum_iter, epochs=3),
        state,
        world_size=processes,
        paper_warmup=1,
    )
    assert plan.batch_size * plan.accum_iter * processes == effective
    assert plan.steps_per_epoch == 1009 // effective
    assert plan.peak_lr == 1.5e-4 * effective / 256
    return plan.batch_size, plan.accum_iter


@pytest.mark.parametrize(
    ("processes", "expected"),
    [(1, (6, 4)), (2, (6, 2)), (3, (4, 2)), (4, (6, 1)), (8, (3, 1)), (24, (1, 1))],
)
def test_another_number_of_processes_keeps_the_effective_batch(
    processes: int, expected: tuple[int, int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert resumed(6, 2, processes, before=(6, 2, 2), effective=24) == expected
    said = capsys.readouterr().err
    assert ("still 24 images a step: batch size" in said) == (processes != 2)


def test_a_run_that_was_reshaped_once_is_resumed_again() -> None:
    """On the processes that it was moved to, with the options of its start."""
    assert resumed(6, 2, 1, before=(6, 2, 1), effective=24) == (6, 4)


def test_another_batch_size_of_the_same_product_is_taken_as_it_is() -> None:
    assert resumed(3, 8, 1, before=(6, 2, 2), effective=24) == (3, 8)
    assert resumed(12, 1, 2, before=(6, 2, 2), effective=24) == (12, 1)


def test_another_effective_batch_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"batch size 5 x accumulation 2 x 2 process\(es\) of a run with 24 images a step"
    ):
        resumed(5, 2, 2, before=(6, 2, 2), effective=24)


def test_processes_that_cannot_share_the_batch_are_refused() -> None:
    with pytest.raises(ConfigError, match="cannot share the run's 24 images a step evenly") as caught:
        resumed(6, 2, 5, before=(6, 2, 2), effective=24)
    assert caught.value.hint is not None
    assert caught.value.hint.endswith("1, 2, 3, 4, 6, 8, 12")


PRETRAIN = {"peak": 0.0024, "min_lr": 0.0, "warmup_epochs": 40, "epochs": 800}
FINETUNE = {"peak": 0.002, "min_lr": 1e-6, "warmup_epochs": 5, "epochs": 100}
NO_WARMUP = {"peak": 0.001, "min_lr": 1e-5, "warmup_epochs": 0, "epochs": 10}


@pytest.mark.parametrize(
    ("settings", "epoch", "expected"),
    [
        (PRETRAIN, 0, 0.0),
        (PRETRAIN, 0.001, 6e-08),
        (PRETRAIN, 20.0, 0.0012),
        (PRETRAIN, 39.999, 0.00239994),
        (PRETRAIN, 40, 0.0024),
        (PRETRAIN, 40.25, 0.0023999993592276106),
        (PRETRAIN, 200.0, 0.0021469686112756724),
        (PRETRAIN, 799.999, 1.0252332316440515e-14),
        (PRETRAIN, 800, 0.0),
        (FINETUNE, 2.5, 0.001),
        (FINETUNE, 5.25, 0.0019999658427513425),
        (FINETUNE, 50.0, 0.0010830380557995962),
        (FINETUNE, 99, 1.546469287744414e-06),
        (FINETUNE, 100, 1e-06),
        (NO_WARMUP, 0, 0.001),
        (NO_WARMUP, 2.5, 0.000855017856687341),
        (NO_WARMUP, 9.999, 1.0000024427270673e-05),
    ],
)
def test_values_of_the_original(settings: dict[str, float], epoch: float, expected: float) -> None:
    # The order of the same float64 operations: a few units in the last place of the peak.
    assert learning_rate(epoch, **settings) == pytest.approx(expected, rel=1e-12, abs=1e-18)  # type: ignore[arg-type]


def test_a_run_that_is_all_warm_up_ends_at_the_peak() -> None:
    assert learning_rate(3, peak=0.7, min_lr=0.1, warmup_epochs=3, epochs=3) == 0.7


def test_warm_up_is_the_papers_but_at_most_a_tenth() -> None:
    assert resolve_warmup(None, paper=40, epochs=800) == 40
    assert resolve_warmup(None, paper=40, epochs=30) == 3
    assert resolve_warmup(7, paper=40, epochs=30) == 7
    assert resolve_warmup(0, paper=40, epochs=30) == 0
