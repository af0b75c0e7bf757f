"""The encoder on a stream, against the encoder on whole images and on visible patches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mae_deploy.models.cached import KeyValueCache, empty_cache, update
from mae_deploy.models.vit import gather_tokens, patchify
from tests.models.tiny_models import ENCODER, random_images, random_tensor, tiny_encoder

N, B = ENCODER.num_patches, 3
MODEL = tiny_encoder()
IMAGES = random_images(batch=B)
OTHERS = random_tensor(*IMAGES.shape, seed=7)


def ids_of(keep: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(N, generator=generator)[:keep] for _ in range(B)])


@torch.no_grad()
def run(images: Tensor, ids: Tensor, cache: KeyValueCache) -> tuple[Tensor, KeyValueCache]:
    tokens, after, inner = update(MODEL, gather_tokens(patchify(images, ENCODER.patch), ids), ids, cache)
    assert len(inner) == ENCODER.blocks
    assert torch.equal(MODEL.norm(inner[-1]), tokens)
    return tokens, after


def test_a_first_frame_is_the_whole_image_or_its_visible_patches() -> None:
    for keep in (N, 4):
        ids = ids_of(keep)
        tokens, after = run(IMAGES, ids, empty_cache(MODEL, B))
        torch.testing.assert_close(tokens, MODEL(IMAGES, ids), rtol=0, atol=2e-6)
        assert after.computed.sum(dim=1).tolist() == [1 + keep] * B


def test_what_did_not_change_gives_what_it_gave() -> None:
    everything, cache = run(IMAGES, ids_of(N), empty_cache(MODEL, B))
    ids = ids_of(5, seed=1)
    tokens, after = run(IMAGES, ids, cache)
    order = ids_of(N).argsort(dim=1)
    expected = gather_tokens(gather_tokens(everything[:, 1:], order), ids)
    torch.testing.assert_close(tokens[:, 1:], expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(tokens[:, 0], everything[:, 0], rtol=0, atol=2e-6)
    for old, new in zip((*cache.keys, *cache.values), (*after.keys, *after.values), strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=2e-6)


def test_the_last_block_sees_what_other_patches_left_behind() -> None:
    """The last block by hand: queries of the new tokens, on keys and values of which only their own rows are new."""
    _, cache = run(OTHERS, ids_of(N), empty_cache(MODEL, B))
    ids = ids_of(4, seed=2)
    tokens, after = run(IMAGES, ids, cache)
    with torch.no_grad():
        _, _, inner = update(MODEL, gather_tokens(patchify(IMAGES, ENCODER.patch), ids), ids, cache)
        block: Any = MODEL.blocks[-1]
        x, norm = inner[-2], block.norm1
        q, k, v = block.attn.qkv(norm(x)).unflatten(-1, (3, ENCODER.heads, -1)).unbind(2)
        expected = []
        for b in range(B):
            rows = [0, *(1 + ids[b]).tolist()]
            keys, values = cache.keys[-1][b].clone(), cache.values[-1][b].clone()
            keys[:, rows], values[:, rows] = k[b].transpose(0, 1), v[b].transpose(0, 1)
            assert torch.equal(after.keys[-1][b], keys)
            heads = []
            for h in range(ENCODER.heads):
                scores = q[b, :, h] @ keys[h].T / q.shape[-1] ** 0.5
                heads.append(scores.softmax(dim=-1) @ values[h])
            y = x[b] + block.attn.proj(torch.cat(heads, dim=-1))
            expected.append(y + block.mlp(block.norm2(y)))
        torch.testing.assert_close(tokens, MODEL.norm(torch.stack(expected)), rtol=0, atol=5e-6)


def test_a_cache_stays_as_it_was_and_gradients_reach_what_made_it() -> None:
    empty = empty_cache(MODEL, B)
    images = IMAGES.clone().requires_grad_()
    ids = ids_of(N)
    _, cache, _ = update(MODEL, gather_tokens(patchify(images, ENCODER.patch), ids), ids, empty)
    assert not empty.computed.any()
    assert not any(rows.any() for rows in empty.keys)
    few = ids_of(2)
    tokens, _, _ = update(MODEL, gather_tokens(patchify(OTHERS, ENCODER.patch), few), few, cache)
    (gradient,) = torch.autograd.grad(tokens.sum(), images)
    reached = patchify(gradient, ENCODER.patch).abs().sum(dim=2) > 0
    assert reached.all()  # those of `few` too: the others saw them, block by block


@pytest.mark.parametrize("ids", [[[0], [1], [2]], [[14, 3], [2, 1], [0, 14]]])
def test_patches_are_embedded_as_they_are_in_images(ids: list[list[int]]) -> None:
    kept = torch.tensor(ids)
    patches = gather_tokens(patchify(IMAGES, ENCODER.patch), kept)
    assert torch.equal(MODEL.embed_patches(patches, kept), MODEL.embed(IMAGES, kept))
