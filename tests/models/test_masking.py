"""Masking: how many patches stay, which ones, and that the three index tensors agree."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mae_deploy.errors import ConfigError
from mae_deploy.models.mask_config import GroupMasking, MaskSampling, check_masking, keep_count, mask_unit
from mae_deploy.models.masking import (
    Masking,
    block_masking,
    grid_masking,
    keep_random,
    masking_of,
    random_masking,
    repeat_masking,
    unit_masking,
)


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


# --- the same, patch by patch ----------------------------------------------------------------------------------------


def blocks_of(noise: list[float], ratio: float, rows: int, columns: int) -> list[int]:
    """BEiT's blocks on one grid, in Python's floats: all patches, those first that stay longest."""
    N = rows * columns
    hidden, least, laid = N - keep_count(N, 1 - ratio, least=0), 16 / 196 * N, list[tuple[float, ...]]()
    inside = [math.inf] * N
    for index in range(min(12, N // 4)):
        area, aspect, down, across = noise[4 * index : 4 * index + 4]
        left = max(hidden - sum(math.isfinite(value) for value in inside), least)
        patches, ratio_of_sides = least + area * (left - least), 0.3 ** (1 - 2 * aspect)
        height = min(max(round(math.sqrt(patches * ratio_of_sides)), 1), rows)
        width = min(max(round(math.sqrt(patches / ratio_of_sides)), 1), columns)
        laid.append((int(down * (rows - height + 1)), int(across * (columns - width + 1)), height, width))
        inside = [
            min(old, index + far) if (far := away(laid[-1:], n, columns)) < 1 else old for n, old in enumerate(inside)
        ]
    order = [v if math.isfinite(v) else len(laid) + away(laid, n, columns) for n, v in enumerate(inside)]
    return sorted(range(N), key=lambda n: -order[n])


def away(blocks: list[tuple[float, ...]], patch: int, columns: int) -> float:
    """How far the patch is from the centre of the nearest block, in halves of its sides; below 1 within it."""
    y, x = patch // columns + 0.5, patch % columns + 0.5
    return min(
        max(abs(y - top - height / 2) * 2 / height, abs(x - left - width / 2) * 2 / width)
        for top, left, height, width in blocks
    )


@pytest.mark.parametrize(
    ("ratio", "grid"), [(0.5, (4, 4)), (0.75, (7, 5)), (0.6, (4, 11)), (0.9, (14, 14)), (0.3, (6, 9))]
)
def test_blocks_patch_by_patch(ratio: float, grid: tuple[int, int]) -> None:
    """float64, in which no size or place of these is near enough to a half to be rounded otherwise."""
    B, G, N = 5, 2, grid[0] * grid[1]
    noise = torch.rand(B, G * N, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    masking = block_masking(noise, ratio, grid)
    assert_consistent(masking)
    kept = keep_count(N, 1 - ratio, least=0)
    for row, groups in zip(masking.ids_keep, noise.reshape(B, G, N), strict=True):
        orders = [blocks_of(group.tolist(), ratio, *grid) for group in groups]
        # What stays longest comes first, group by group in turns.
        assert row.tolist() == [index * N + orders[index][rank] for rank in range(kept) for index in range(G)]


def test_so_few_that_none_is_kept() -> None:
    """A tenth of four squares, of nine patches: what check_masking refuses is not rounded up here."""
    assert unit_masking(uniform(2, 16), 0.9, (4, 4), 2).ids_keep.shape == (2, 0)
    assert random_masking(uniform(2, 9), 0.9).ids_keep.shape == (2, 0)
    assert block_masking(uniform(2, 16), 0.95, (4, 4)).mask.all()


@pytest.mark.parametrize(("grid", "unit"), [((4, 6), 2), ((6, 3), 3), ((3, 5), 1), ((6, 12), 3)])
def test_squares_patch_by_patch(grid: tuple[int, int], unit: int) -> None:
    B, G, (rows, columns) = 5, 2, grid
    noise = uniform(B, G * rows * columns)
    masking = unit_masking(noise, 0.6, grid, unit)
    assert_consistent(masking)
    for kept, numbers in zip(masking.ids_keep, noise.reshape(B, G, rows, columns), strict=True):
        squares = [(g, y, x) for g in range(G) for y in range(0, rows, unit) for x in range(0, columns, unit)]
        squares.sort(key=lambda corner: float(numbers[corner]))
        assert kept.tolist() == [
            patch
            for group, top, left in squares[: keep_count(len(squares), 0.4, least=0)]
            for patch in sorted(
                (group * rows + y) * columns + x for y in range(top, top + unit) for x in range(left, left + unit)
            )
        ]


def test_grids_of_groups_are_drawn_apart() -> None:
    noise = torch.zeros(1, 2 * 4 * 6)
    noise[0, 0], noise[0, 24] = 0.3, 0.5
    noise[0, 23] = noise[0, 47] = 0.9  # only the first number of a group counts
    kept = grid_masking(noise, (4, 6)).ids_keep.tolist()
    assert kept == [[1, 3, 5, 13, 15, 17, *(24 + n for n in (6, 8, 10, 18, 20, 22))]]


def test_of_equal_numbers_the_first_stays() -> None:
    noise = torch.zeros(2, 64)
    assert (
        unit_masking(noise, 0.5, (8, 8), 2).ids_keep.tolist()
        == [[8 * (2 * y + dy) + 2 * x + dx for y in (0, 1) for x in range(4) for dy in (0, 1) for dx in (0, 1)]] * 2
    )


@pytest.mark.parametrize(("kind", "ratio", "grid", "unit", "kept"), KINDS)
def test_each_kind_by_its_name(kind: MaskSampling, ratio: float, grid: tuple[int, int], unit: int, kept: int) -> None:
    """In groups each for itself, consistent ones as the first; one group is no groups."""
    N = grid[0] * grid[1]
    noise = uniform(3, 3 * N)
    functions: dict[tuple[MaskSampling, bool], Callable[[Tensor], Masking]] = {
        ("random", True): lambda values: random_masking(values, ratio),
        ("random", False): lambda values: unit_masking(values, ratio, grid, unit),
        ("block", True): lambda values: block_masking(values, ratio, grid),
        ("grid", True): lambda values: grid_masking(values, grid),
    }
    by_name = functions[kind, unit == 1]
    assert same(masking_of(kind, noise, ratio, grid, unit=unit), by_name(noise))
    first = by_name(noise[:, :N])
    assert first.ids_keep.shape[1] == kept
    consistent: GroupMasking = "consistent"
    assert same(masking_of(kind, noise, ratio, grid, unit=unit, group_masking=consistent), repeat_masking(first, 3))
    assert same(masking_of(kind, noise[:, :N], ratio, grid, unit=unit, group_masking=consistent), first)
    if unit == 1:
        assert same(masking_of(kind, noise, ratio, grid), by_name(noise))


def same(found: Masking, expected: Masking) -> bool:
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_repeated_places_by_hand() -> None:
    masking = repeat_masking(keep_random(torch.tensor([[0.5, 0.1, 0.9, 0.3, 0.7]]), 2), 3)
    assert masking.ids_keep.tolist() == [[1, 3, 6, 8, 11, 13]]
    # All that is kept, group by group, then what is hidden of each.
    assert masking.ids_restore.tolist() == [[6, 0, 8, 1, 7, 9, 2, 11, 3, 10, 12, 4, 14, 5, 13]]
    assert masking.mask.tolist() == [[1, 0, 1, 0, 1] * 3]
    assert masking.mask.dtype == torch.float32


@pytest.mark.parametrize(("kind", "ratio", "grid", "unit", "kept"), KINDS)
def test_nothing_waits_for_the_device(
    kind: MaskSampling, ratio: float, grid: tuple[int, int], unit: int, kept: int
) -> None:
    """PyTorch's `meta` has shapes and no numbers: what reads one, or mixes devices, fails."""
    noise = torch.empty(7, 2 * grid[0] * grid[1], device="meta")
    masking = masking_of(kind, noise, ratio, grid, unit=unit, group_masking="consistent")
    assert [tensor.device.type for tensor in masking] == ["meta"] * 3
    assert masking.ids_keep.shape == (7, 2 * kept)


class EqualsInReverse(TorchDispatchMode):
    """A sort that was not asked to be stable leaves equal numbers the other way round. A GPU may; a CPU never does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket is not torch.ops.aten.sort or kwargs.get("stable"):
            return func(*args, **kwargs)
        dim = {**dict(zip(("dim", "descending"), args[1:], strict=False)), **kwargs}.get("dim", -1)
        values, indices = func(args[0].flip(dim), *args[1:], **kwargs)
        return values, args[0].shape[dim] - 1 - indices


@pytest.mark.parametrize(("kind", "unit"), [("random", 2), ("block", 1), ("grid", 1)])
def test_sorts_of_equal_numbers_are_stable(kind: MaskSampling, unit: int) -> None:
    noise = uniform(3, 2 * 64).mul(16).floor() / 16
    expected = masking_of(kind, noise, 0.75, (8, 8), unit=unit)
    with EqualsInReverse():  # type: ignore[no-untyped-call]
        assert torch.tensor([0.5, 0.5]).argsort().tolist() == [1, 0]
        assert same(masking_of(kind, noise, 0.75, (8, 8), unit=unit), expected)


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
