"""The learning rate by fractional epoch, against values that the original's `lr_sched.py` printed."""

from __future__ import annotations

import pytest

from mae_deploy.training.schedule import learning_rate, resolve_warmup

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
