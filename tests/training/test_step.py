"""A step that is not finite changes nothing; random numbers depend on an image's place in the effective batch, not on
how the batch is split.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mae_deploy.data.dataset import Batch
from mae_deploy.training.loop import make_accelerator
from mae_deploy.training.optim.groups import ParamGroup, adamw, decay_groups
from mae_deploy.training.plan import RunPlan
from mae_deploy.training.state.sharding import Network
from mae_deploy.training.step import StepBatch, Stepper


def batch(first: int, size: int, *, step: int = 5) -> StepBatch:
    return StepBatch(
        torch.zeros(size, 3, 2, 2), torch.zeros(size, dtype=torch.int64), seed=7, step=step, first=first, effective=12
    )


def both(of: StepBatch) -> tuple[Tensor, Tensor]:
    """Two draws of one step."""
    return of.rand(11), of.rand(2, 3)


def test_any_split_draws_the_same() -> None:
    whole = both(batch(0, 12))
    for size in (1, 3, 5):
        parts = [both(batch(first, min(size, 12 - first))) for first in range(0, 12, size)]
        for index in range(2):
            assert torch.equal(torch.cat([part[index] for part in parts]), whole[index])


def test_rows_draws_and_steps_differ() -> None:
    first, second = both(batch(0, 12)), both(batch(0, 12, step=6))
    assert first[0].unique().numel() == 12 * 11
    assert not torch.equal(first[0][:, :6], first[1].flatten(1))
    assert not torch.equal(first[0], second[0])
    assert 0 <= float(first[0].min()) < 0.05 < 0.95 < float(first[0].max()) < 1


def test_drawing_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    batch(3, 2).rand(4)
    assert torch.equal(torch.get_rng_state(), before)


def image_batch(*images: tuple[int, int], seed: int = 7, step: int = 5) -> StepBatch:
    items, views = torch.tensor(images).unbind(1)
    return StepBatch(
        torch.zeros(len(images), 3, 2, 2), torch.zeros(len(images)), seed=seed, step=step, items=items, view=views
    )


def test_an_image_and_its_view_draw_the_same_in_any_batch_and_step() -> None:
    whole = image_batch((3, 0), (3, 1), (0, 0), (40_000, 0), (3, 0)).image_rand(2, 97)
    assert (whole.shape, whole.dtype) == ((5, 2, 97), torch.float32)
    assert torch.equal(whole[0], whole[4])
    other = image_batch((40_000, 0), (3, 1), step=6)
    assert torch.equal(other.image_rand(2, 97), whole[[3, 1]])
    assert torch.equal(other.image_rand(2, 97), whole[[3, 1]])
    assert torch.equal(
        other.image_rand(50), whole[[3, 1]].flatten(1)[:, :50]
    )  # the counter of a row, whatever its shape


def test_images_views_and_seeds_draw_numbers_of_their_own_evenly() -> None:
    whole = image_batch(*((item, view) for item in range(40) for view in range(4))).image_rand(196)
    values = whole.flatten().sort().values
    # Kolmogorov's distance of 31,360 uniform numbers is below 1.63 / sqrt(n) in 99 of 100 cases.
    assert float((values - torch.linspace(0, 1, len(values))).abs().max()) < 1.63 / math.sqrt(len(values))
    assert 0 <= float(values[0])
    assert float(values[-1]) < 1
    # Of 12,720 pairs of rows, correlations spread as those of independent numbers: by 1 / sqrt(196).
    correlations = torch.corrcoef(whole)[torch.triu(torch.ones(160, 160), diagonal=1) > 0]
    assert float(correlations.abs().max()) < 5 / math.sqrt(196)
    assert float(correlations.std()) == pytest.approx(1 / math.sqrt(196), rel=0.05)
    assert not torch.equal(image_batch((3, 0), seed=8).image_rand(196), image_batch((3, 0)).image_rand(196))


def test_numbers_of_older_caches_stay() -> None:
    """Written down: with others, every mask in a cache would be another than its name says."""
    torch.testing.assert_close(
        image_batch((5, 1)).image_rand(3),
        torch.tensor([[0.3073984980583191, 0.8402047753334045, 0.6067515015602112]]),
        rtol=0,
        atol=0,
    )


# --- a step ----------------------------------------------------------------------------------------------------------


def fused(groups: list[ParamGroup]) -> torch.optim.Optimizer:
    return adamw(groups, betas=(0.9, 0.95))


def momentum(groups: list[ParamGroup]) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.0, momentum=0.9)


@pytest.mark.parametrize("optimizer", [fused, momentum])
def test_a_step_that_is_not_finite_changes_nothing(
    tmp_path: Path, optimizer: Callable[[list[ParamGroup]], torch.optim.Optimizer]
) -> None:
    """Neither weights nor what the optimiser remembers, nor the statistics of BatchNorm."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12), nn.Linear(12, 1))
    network = Network(model, make_accelerator("cpu", "fp32", tmp_path), sharded=False, compiled=False)
    built = optimizer(network.groups(decay_groups(model, 0.05)))

    def loss(trained: nn.Module, batch: StepBatch) -> dict[str, Tensor]:
        return {"size": batch.images.abs().mean(), "loss": trained(batch.images).square().mean()}

    stepper = Stepper(loss, network, built, nn.Identity(), RunPlan(5, 2, 1, 3, 0.1, 0), clip_grad=1.0, seed=0)

    def take(scale: float) -> tuple[list[float], list[Tensor]]:
        zeros = torch.zeros(5, dtype=torch.int64)
        batches = [Batch(torch.randn(5, 3, 2, 2) * factor, zeros, (), ("",) * 5, zeros, zeros) for factor in (1, scale)]
        numbers = stepper.take(batches, 0, 0.1, lambda: (3.0,))
        assert (numbers.names, numbers.num_flags) == (("size", "loss"), 1)
        state = [value for state in built.state.values() for value in state.values() if isinstance(value, Tensor)]
        floats = [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]
        return numbers.values.tolist(), [tensor.clone() for tensor in (*floats, *state)]

    (size, mean, flag, norm, scale, *own), before = take(2.0)
    assert (flag, scale) == (3.0, 1.0)
    assert mean == pytest.approx(sum(own) / 2)
    assert min(size, norm, *own) > 0
    values, after = take(math.nan)
    assert [math.isfinite(value) for value in values] == [False, False, True, False, True, True, False]
    assert all(torch.equal(one, other) for one, other in zip(after, before, strict=True))
    _, after = take(2.0)
    assert not any(torch.equal(one, other) for one, other in zip(after, before, strict=True))
