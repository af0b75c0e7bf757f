"""What holds of masks, patches and positions of every size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from mae_deploy.errors import ConfigError
from mae_deploy.models.config import EncoderConfig
from mae_deploy.models.mask_config import MaskSampling, check_masking
from mae_deploy.models.masking import keep_random, masking_of, repeat_masking
from mae_deploy.models.position import interpolate_position_embedding, sincos_position_embedding
from mae_deploy.models.vit import Encoder, gather_tokens, patchify, unpatchify

SIDES = st.integers(1, 9)
GRIDS = st.tuples(SIDES, SIDES)
SEEDS = st.integers(0, 2**32 - 1)


def uniform(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@given(
    kind=st.sampled_from(["random", "block", "grid"]),
    grid=GRIDS,
    ratio=st.floats(0.05, 0.95),
    unit=st.integers(1, 3),
    groups=st.integers(1, 3),
    consistent=st.booleans(),
    seed=SEEDS,
)
def test_every_mask_that_is_allowed_is_whole(
    kind: MaskSampling, grid: tuple[int, int], ratio: float, unit: int, groups: int, consistent: bool, seed: int
) -> None:
    """Each patch is kept or hidden, each sample keeps equally many, and the order can be undone."""
    ratio = 0.75 if kind == "grid" else ratio
    try:
        check_masking(kind, ratio, grid, unit=unit)
    except ConfigError:
        assume(False)
    B, N = 3, groups * grid[0] * grid[1]
    masking = masking_of(
        kind,
        uniform(seed, B, N),
        ratio,
        grid,
        unit=unit,
        group_masking="consistent" if consistent else "independent",
    )
    K = masking.ids_keep.shape[1]
    assert 0 < K < N
    assert torch.equal(masking.ids_restore.sort(dim=1).values, torch.arange(N).expand(B, N))
    assert torch.equal(masking.mask, (masking.ids_restore >= K).float())
    assert torch.equal(masking.ids_restore.gather(1, masking.ids_keep), torch.arange(K).expand(B, K))
    if consistent:
        assert (masking.mask.reshape(B, groups, -1) == masking.mask.reshape(B, groups, -1)[:, :1]).all()


@given(size=st.integers(2, 60), seed=SEEDS, counts=st.tuples(st.integers(1, 60), st.integers(1, 60)))
def test_fewer_patches_are_among_more(size: int, seed: int, counts: tuple[int, int]) -> None:
    fewer, more = sorted(min(count, size) for count in counts)
    noise = uniform(seed, 1, size)
    assert set(keep_random(noise, fewer).ids_keep[0].tolist()) <= set(keep_random(noise, more).ids_keep[0].tolist())


@given(size=st.integers(2, 30), groups=st.integers(1, 4), seed=SEEDS, data=st.data())
def test_repeated_masks_restore_tokens(size: int, groups: int, seed: int, data: st.DataObject) -> None:
    """Kept tokens, followed by the hidden ones, come back in their places in every group."""
    kept = data.draw(st.integers(1, size))
    masking = repeat_masking(keep_random(uniform(seed, 1, size), kept), groups)
    values = torch.arange(groups * size).expand(1, -1)
    hidden = masking.mask[0].bool()
    shuffled = torch.empty_like(values)
    shuffled.scatter_(1, masking.ids_restore, values)
    assert torch.equal(shuffled[:, : groups * kept], masking.ids_keep)
    assert set(shuffled[0, groups * kept :].tolist()) == set(values[0, hidden].tolist())
    assert torch.equal(gather_tokens(shuffled.unsqueeze(-1), masking.ids_restore).squeeze(-1), values)


@given(grid=GRIDS, patch=st.integers(1, 5), channels=st.integers(1, 5), seed=SEEDS)
def test_patches_are_the_image(grid: tuple[int, int], patch: int, channels: int, seed: int) -> None:
    height, width = (side * patch for side in grid)
    images = uniform(seed, 2, channels, height, width)
    patches = patchify(images, patch)
    assert patches.shape == (2, grid[0] * grid[1], patch * patch * channels)
    assert torch.equal(unpatchify(patches, patch, grid), images)
    row, column = grid[0] - 1, grid[1] // 2
    cut = images[1, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
    assert torch.equal(patches[1, row * grid[1] + column], cut.permute(1, 2, 0).flatten())


@given(source=GRIDS, target=GRIDS, rule=st.sampled_from(["bicubic", "timm", "timm-flexivit", "torchvision"]))
def test_what_is_the_same_everywhere_stays_so_on_every_grid(
    source: tuple[int, int], target: tuple[int, int], rule: str
) -> None:
    """Interpolation keeps a constant, CLS and the channels. 1e-5: sixteen float32 weights that add up to 1."""
    table = torch.full((1, 1 + source[0] * source[1], 8), 0.7)
    table[:, 0] = -3
    moved = interpolate_position_embedding(table, source, target, rule)
    assert moved.shape == (1, 1 + target[0] * target[1], 8)
    assert torch.equal(moved[:, 0], table[:, 0])
    torch.testing.assert_close(moved[:, 1:], torch.full_like(moved[:, 1:], 0.7), rtol=0, atol=1e-5)


@given(grid=st.tuples(st.integers(2, 9), st.integers(2, 9)))
def test_every_place_has_a_position_of_its_own(grid: tuple[int, int]) -> None:
    table = sincos_position_embedding(16, grid)[0]
    distances = torch.cdist(table, table) + torch.eye(len(table)) * 9
    assert distances.min() > 1e-3
    assert torch.equal(table[1 :: grid[1], 8:][: grid[0]], table[grid[1] :: grid[1], 8:]), "a row has one code"


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    torch.manual_seed(0)
    config = EncoderConfig(name="tiny", image_size=(15, 10), patch_size=5, embed_dim=12, depth=2, num_heads=3)
    return Encoder(config).eval()


@given(data=st.data(), seed=SEEDS)
def test_the_order_of_patches_is_the_order_of_tokens(encoder: Encoder, data: st.DataObject, seed: int) -> None:
    """1e-5: attention sums the same numbers in another order."""
    ids = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=6, unique=True))
    images = uniform(seed, 1, 3, 15, 10)
    with torch.no_grad():
        ordered = encoder(images, torch.tensor([sorted(ids)]))
        given_ = encoder(images, torch.tensor([ids]))
    places = [sorted(ids).index(index) for index in ids]
    torch.testing.assert_close(given_[:, 1:], ordered[:, 1:][:, places], rtol=0, atol=1e-5)
    torch.testing.assert_close(given_[:, 0], ordered[:, 0], rtol=0, atol=1e-5)
