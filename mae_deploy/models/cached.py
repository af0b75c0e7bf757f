"""The encoder on a stream: some patches are recomputed, and attend to the keys and values that others left behind.

After Eventful Transformers (https://arxiv.org/abs/2308.13494): what a frame does not change is not computed again, but
stays in the context of what is. CLS and registers are recomputed each time, and keys are kept as they were turned by
rotary positions.
Shapes: B streams, N patches, K recomputed ones, P tokens before them, T = P + K, S = P + N, H heads, d = D / H.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mae_deploy.models.rotary import places_of
from mae_deploy.models.vit import BlockWithQKV, Encoder


@dataclass(frozen=True, slots=True)
class KeyValueCache:
    """What a stream remembers; an update gives another one and leaves this as it was, so gradients can flow."""

    keys: tuple[Tensor, ...]
    """Of each block, `(B, H, S, d)`, CLS and registers first; zero where nothing was computed."""
    values: tuple[Tensor, ...]
    computed: Tensor
    """Which rows were computed, bool `(B, S)`: attention sees no others."""


def empty_cache(encoder: Encoder, batch: int, depth: int | None = None) -> KeyValueCache:
    """Nothing computed yet, for this many streams; of the first `depth` blocks, and so updates run no more of them."""
    c, device = encoder.config, encoder.device
    S = c.num_prefix + c.num_patches
    rows = tuple(torch.zeros(batch, c.heads, S, c.width // c.heads, device=device) for _ in encoder.blocks[:depth])
    return KeyValueCache(rows, rows, torch.zeros(batch, S, dtype=torch.bool, device=device))


def update(
    encoder: Encoder, patches: Tensor, ids_keep: Tensor, cache: KeyValueCache
) -> tuple[Tensor, KeyValueCache, list[Tensor]]:
    """Recompute K patches, CLS and registers; for an encoder without groups of bands.

    Args:
        patches: `(B, K, P * P * C)`, normalised.
        ids_keep: which they are, int64 `(B, K)`, each once.

    Returns:
        CLS, registers and the recomputed tokens after the final norm, `(B, T, D)`; the new cache; the tokens after
        every block of the cache.
    """
    tokens = encoder.embed_patches(patches, ids_keep)
    rows, turns = places_of(ids_keep, encoder.config.num_prefix), encoder.turns(ids_keep)
    computed = cache.computed.scatter(1, rows, True)
    keys, values, inner = [], [], []
    for index, (old_keys, old_values) in enumerate(zip(cache.keys, cache.values, strict=True)):
        block = encoder.blocks[index]
        assert isinstance(block, BlockWithQKV)
        q, k, v = block(tokens, inner="only_qkv", turn=turns[index] if turns else None).unbind(1)
        places = rows[:, None, :, None].expand_as(k)
        keys.append(old_keys.scatter(2, places, k))
        values.append(old_values.scatter(2, places, v))
        mixed = F.scaled_dot_product_attention(q, keys[-1], values[-1], attn_mask=computed[:, None, None])
        tokens = block.behind_attention(tokens, mixed)
        inner.append(tokens)
    return encoder.norm(tokens), KeyValueCache(tuple(keys), tuple(values), computed), inner
