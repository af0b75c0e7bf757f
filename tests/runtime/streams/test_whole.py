"""What a stream gives is of the whole frame, also of blocks, of which an update has the computed patches only."""

from __future__ import annotations

from typing import Any

import numpy as np

from mae_deploy.runtime.cache import CacheShape, TokenCache
from mae_deploy.runtime.streams.whole import whole_features

N, D = 5, 4
SHAPE = CacheShape(num_patches=N, depth=2, num_heads=2, embed_dim=D, dtype="float32")
MANIFEST: Any = {"model": {"pool": "avg"}}


def test_rows_of_blocks_stay_where_their_patches_were_not_computed() -> None:
    rng, cache = np.random.default_rng(0), TokenCache.empty(SHAPE, 1)
    first = {"block_0": rng.random((1, N, D), np.float32), "logits": np.ones((1, 3), np.float32)}
    before = whole_features(first, np.arange(N), {}, cache, MANIFEST)
    np.testing.assert_array_equal(before["block_0"], first["block_0"])
    ids, second = (
        np.array([3, 1]),
        {"block_0": rng.random((1, 2, D), np.float32), "logits": np.zeros((1, 3), np.float32)},
    )
    found = whole_features(second, ids, before, cache, MANIFEST)
    np.testing.assert_array_equal(found["block_0"][:, ids], second["block_0"])
    np.testing.assert_array_equal(found["block_0"][:, [0, 2, 4]], first["block_0"][:, [0, 2, 4]])
    assert not found["logits"].any()
    np.testing.assert_array_equal(before["block_0"], first["block_0"])  # as it was


def test_the_last_block_is_what_the_cache_holds_where_no_norm_follows() -> None:
    cache = TokenCache.empty(SHAPE, 1)
    cache.tokens[:] = np.arange(N * D).reshape(N, D)
    found = whole_features({"block_1": np.ones((1, 2, D), np.float32)}, np.array([0, 2]), {}, cache, MANIFEST)
    np.testing.assert_array_equal(found["block_1"], cache.tokens)
    found["block_1"][:] = 7
    assert cache.tokens[0, 0, 0] == 0
