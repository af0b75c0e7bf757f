"""Masking: how many patches stay, which ones, and that the three index tensors agree."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mae_deploy.errors import ConfigError
from mae_deploy.models.mask_config import MaskSampling, check_masking, keep_count, mask_unit
from mae_deploy.models.masking import Masking, block_masking, grid_masking, masking_of, random_masking, unit_masking


@pytest.mark.parametrize(
    ("num_patches", "mask_ratio", "kept"),
    [
        (196, 0.75, 49),
        (49, 0.75, 12),
        (64, 0.0, 64),
        (10, 0.55, 4),
        (16, 0.85, 2),
        # Floating point: 10 * (1 - 0.7) is 3.0000000000000004, but 10 * (1 - 0.9) is 0.9999999999999998, and 100 * (1 -
        # 0.8) is 19.999999999999996.
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
    assert keep_count(num_patches, 1 - mask_ratio, least=0) == kept
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


# --- blocks, grids and squares ---------------------------------------------------------------------------------------


def uniform(*shape: int, seed: int = 3) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


KINDS: list[tuple[MaskSampling, float, tuple[int, int], int, int]] = [
    ("random", 0.6, (6, 10), 1, 24),
    ("random", 0.6, (6, 10), 2, 4 * 6),
    ("block", 0.5, (6, 10), 1, 30),
    ("block", 0.75, (14, 14), 1, 49),
    ("block", 0.9, (5, 7), 1, 3),
    ("grid", 0.75, (6, 10), 1, 15),
]


@pytest.mark.parametrize(("kind", "ratio", "grid", "unit", "kept"), KINDS)
@pytest.mark.parametrize("groups", [1, 3])
def test_every_kind_keeps_equally_many_in_every_sample_and_group(
    kind: MaskSampling, ratio: float, grid: tuple[int, int], unit: int, kept: int, groups: int
) -> None:
    B, N = 7, grid[0] * grid[1]
    noise = uniform(B, groups * N)
    masking = masking_of(kind, noise, ratio, grid, unit=unit)
    assert masking.ids_keep.shape == (B, groups * kept)
    assert_consistent(masking)
    if kind != "random":  # which is drawn over all groups at once
        assert torch.equal((1 - masking.mask).reshape(B, groups, N).sum(dim=2), torch.full((B, groups), float(kept)))
    # A row of noise gives the same mask in any batch.
    assert torch.equal(masking_of(kind, noise[2:3], ratio, grid, unit=unit).mask, masking.mask[2:3])
    assert len({tuple(row) for row in masking.mask.tolist()}) > 1, "all samples share a mask"


def assert_consistent(masking: Masking) -> None:
    B, N = masking.mask.shape
    K = masking.ids_keep.shape[1]
    assert torch.equal(masking.ids_restore.sort(dim=1).values, torch.arange(N).expand(B, N))
    assert torch.equal(masking.ids_restore.gather(1, masking.ids_keep), torch.arange(K).expand(B, K))
    assert torch.equal(masking.mask, (masking.ids_restore >= K).float())


def test_a_grid_by_hand() -> None:
    """The first number of each row, in quarters, says which of every four patches stays."""
    noise = torch.zeros(4, 4 * 6)
    noise[:, 0] = torch.tensor([0.0, 0.3, 0.5, 0.99])
    assert grid_masking(noise, (4, 6)).ids_keep.tolist() == [
        [0, 2, 4, 12, 14, 16],
        [1, 3, 5, 13, 15, 17],
        [6, 8, 10, 18, 20, 22],
        [7, 9, 11, 19, 21, 23],
    ]


def test_squares_by_hand() -> None:
    """A grid of 2x4 patches in two squares: the one whose first patch has less noise stays as a whole."""
    noise = torch.tensor([[0.9, 0.1, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1], [0.3, 0.9, 0.4, 0.9, 0.9, 0.9, 0.9, 0.9]])
    masking = unit_masking(noise, 0.5, (2, 4), 2)
    assert [sorted(row) for row in masking.ids_keep.tolist()] == [[2, 3, 6, 7], [0, 1, 4, 5]]


def test_a_block_by_hand() -> None:
    """4x4 patches, half of them hidden: a block of 8 patches by its noise, square within rounding, in the corner."""
    noise = torch.full((1, 16), 0.5)
    # Area: all of the eight that are left; aspect: the middle, 1; so 2.83 rounds to 3x3, cut to eight; place: the far
    # corner.
    noise[0, :4] = torch.tensor([0.999, 0.5, 0.999, 0.999])
    mask = block_masking(noise, 0.5, (4, 4)).mask.reshape(4, 4)
    # Of the nine patches, the centre comes first; of those around it, equally far, the first stays visible.
    assert mask.tolist() == [[0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 1, 1], [0, 1, 1, 1]]


def test_blocks_are_large() -> None:
    """Neighbours of hidden patches are hidden far more often than at random."""

    def together(mask: Tensor) -> float:
        rows = mask.reshape(-1, 14, 14)
        return float((rows[:, :, 1:] * rows[:, :, :-1]).sum() / rows[:, :, :-1].sum())

    noise = uniform(64, 196)
    # At random, the neighbour of a hidden patch is hidden in 97 of 195 cases.
    assert together(random_masking(noise, 0.5).mask) == pytest.approx(97 / 195, abs=0.03)
    assert together(block_masking(noise, 0.5, (14, 14)).mask) > 0.8


def test_blocks_that_fall_short_grow() -> None:
    """All twelve blocks in one corner, as small as they can be: what is missing is taken around them."""
    noise = torch.zeros(1, 196)
    noise[0, 1::4] = 0.5  # square
    hidden = block_masking(noise, 0.75, (14, 14)).mask.reshape(14, 14)
    assert hidden.sum() == 147
    assert hidden[:4, :4].sum() == 16
    # What is nearest to a square block in the corner is a larger square, here of 12x12 and a part of the next.
    assert hidden[:12, :12].sum() == 144


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "grid", "mask_ratio": 0.5}, r"keeps one of every four patches, not --mask-ratio 0\.5"),
        ({"kind": "grid", "grid_size": (6, 5)}, "even number of patches down and across, not 6x5"),
        ({"kind": "block", "grid_size": (3, 9)}, "at least 4x4 patches, not 3x9"),
        ({"kind": "block", "unit": 2}, "--mask-patch-size of . patches goes with --mask-sampling random, not block"),
        ({"unit": 4}, "of 4 patches does not divide a grid of 6x10"),
        ({"unit": 2, "grid_size": (2, 4)}, "of 2 squares of 2x2 patches leaves nothing"),
        ({"mask_ratio": 1.0}, "--mask-ratio must be above 0 and below 1, got 1"),
    ],
)
def test_masks_that_cannot_be(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_masking(**{"kind": "random", "mask_ratio": 0.75, "grid_size": (6, 10), **arguments})


def test_squares_in_pixels() -> None:
    assert [mask_unit(None, 16), mask_unit(16, 16), mask_unit(32, 16)] == [1, 1, 2]
    for size in (24, 0, -16):
        with pytest.raises(ConfigError, match=f"--mask-patch-size {size} is not a multiple of the patch size, 16"):
            mask_unit(size, 16)
