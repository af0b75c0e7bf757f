"""How many patches a step draws, and which."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from mae_deploy.training.kept_patches import KeptPatches
from mae_deploy.training.step import StepBatch


def batch(first: int, size: int, *, step: int = 3, seed: int = 7) -> StepBatch:
    return StepBatch(
        torch.zeros(size, 3, 2, 2),
        torch.zeros(size, dtype=torch.int64),
        seed=seed,
        step=step,
        first=first,
        effective=10,
    )


def test_counts_lie_evenly_between_the_shares() -> None:
    assert KeptPatches(13, (0.25, 0.6)).counts == (3, 4, 5, 6, 7)
    assert KeptPatches(13, (0.5, 0.5)).counts == (6,)
    assert KeptPatches(5, (0.01, 0.1)).counts == (1,)
    many = KeptPatches(196, (0.15, 1.0))
    assert len(many.counts) == 16
    assert (many.least, many.most) == (29, 196)
    gaps = [after - before for before, after in zip(many.counts, many.counts[1:], strict=False)]
    assert set(gaps) == {11, 12}


def test_every_count_is_drawn_about_as_often() -> None:
    kept = KeptPatches(64, (0.15, 1.0))
    drawn = Counter(kept.count(0, step) for step in range(3200))
    assert set(drawn) == set(kept.counts)
    # 200 of each are expected; three standard deviations of a binomial are 41, and the largest of 16 stays below four.
    assert all(140 < number < 260 for number in drawn.values())
    assert [kept.count(1, step) for step in range(20)] != [kept.count(0, step) for step in range(20)]


def test_any_split_of_a_step_sees_the_same_patches() -> None:
    kept = KeptPatches(11, (0.2, 0.9))
    whole = kept(batch(0, 10))
    assert whole is not None
    assert whole.ids_keep.shape == (10, kept.count(7, 3))
    parts = [kept(batch(first, 5)) for first in (0, 5)]
    assert torch.equal(torch.cat([part.ids_keep for part in parts if part is not None]), whole.ids_keep)
    assert len({tuple(sorted(row)) for row in whole.ids_keep.tolist()}) > 1  # each image has its own


def test_a_step_with_every_patch_has_no_masking() -> None:
    assert KeptPatches(11, (1.0, 1.0))(batch(0, 2)) is None


def test_given_noise_decides() -> None:
    masking = KeptPatches(4, (0.5, 0.5))(batch(0, 1), torch.tensor([[0.3, 0.1, 0.9, 0.2]]))
    assert masking is not None
    assert masking.ids_keep.tolist() == [[1, 3]]
    assert masking.mask.tolist() == [[1, 0, 1, 0]]


@pytest.mark.parametrize("least", [0.1, 0.5])
def test_fewer_patches_are_among_more(least: float) -> None:
    noise = torch.rand(3, 17, generator=torch.Generator().manual_seed(0))
    few, many = (KeptPatches(17, (ratio, ratio))(batch(0, 3), noise) for ratio in (least, 0.8))
    assert few is not None
    assert many is not None
    for fewer, more in zip(few.ids_keep.tolist(), many.ids_keep.tolist(), strict=True):
        assert set(fewer) < set(more)
