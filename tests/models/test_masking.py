"""Random masking: how many patches stay, which ones, and that the three index tensors agree."""

from __future__ import annotations

import pytest
import torch

from mae_deploy.models.masking import num_keep, random_masking


@pytest.mark.parametrize(
    ("num_patches", "mask_ratio", "kept"),
    [
        (196, 0.75, 49),
        (49, 0.75, 12),
        (64, 0.0, 64),
        (10, 0.55, 4),
        (16, 0.85, 2),
        # Floating point: 10 * (1 - 0.7) is 3.0000000000000004, but 10 * (1 - 0.9) is 0.9999999999999998, and 100 * (1 - 0.8) is 19.999999999999996.
        (10, 0.7, 3),
        (10, 0.9, 0),
        (10, 0.8, 1),
        (100, 0.8, 19),
        (100, 0.85, 15),
        (100, 0.9, 9),
        (196, 0.9, 19),
        (256, 0.95, 12),
    ],
)
def test_number_kept_is_the_originals(num_patches: int, mask_ratio: float, kept: int) -> None:
    assert num_keep(num_patches, mask_ratio) == kept
    assert random_masking(torch.rand(1, num_patches), mask_ratio).ids_keep.shape == (1, kept)


def test_by_hand() -> None:
    masking = random_masking(torch.tensor([[0.5, 0.1, 0.9, 0.3, 0.7], [0.1, 0.2, 0.3, 0.4, 0.5]]), 0.6)
    assert masking.ids_keep.tolist() == [[1, 3], [0, 1]]
    assert masking.ids_restore.tolist() == [[2, 0, 4, 1, 3], [0, 1, 2, 3, 4]]
    assert masking.mask.tolist() == [[1, 0, 1, 0, 1], [0, 0, 1, 1, 1]]


def test_the_three_agree() -> None:
    B, N, K = 7, 23, 11
    masking = random_masking(torch.rand(B, N, generator=torch.Generator().manual_seed(3)), 0.5)
    assert masking.ids_keep.shape == (B, K)
    assert masking.ids_keep.dtype == torch.int64
    assert torch.equal(masking.ids_restore.sort(dim=1).values, torch.arange(N).expand(B, N))
    assert torch.equal(masking.mask.sum(dim=1), torch.full((B,), float(N - K)))
    assert masking.mask.gather(1, masking.ids_keep).sum() == 0
    # Where a kept patch stands in the shuffled order is its place in ids_keep.
    assert torch.equal(masking.ids_restore.gather(1, masking.ids_keep), torch.arange(K).expand(B, K))
    assert len({tuple(row) for row in masking.ids_keep.tolist()}) == B, "samples share a mask"


def test_shuffled_order_is_restored() -> None:
    patches = torch.arange(13).expand(2, 13)
    noise = torch.rand(2, 13, generator=torch.Generator().manual_seed(5))
    shuffled = patches.gather(1, noise.argsort(dim=1))
    assert not torch.equal(shuffled, patches)
    assert torch.equal(shuffled.gather(1, random_masking(noise, 0.5).ids_restore), patches)
