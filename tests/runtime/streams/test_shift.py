"""What in-turn patches show is carried over to the others, in proportion to their age, and to nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from mae_deploy.runtime.cache import CacheShape, TokenCache
from mae_deploy.runtime.streams.shift import Shift, common

N, D, H = 7, 6, 2
SHAPES = [CacheShape(num_patches=N, depth=2, num_heads=H, embed_dim=D, dtype=dtype) for dtype in ("float32", "float16")]


@pytest.mark.parametrize("shape", SHAPES, ids=["float32", "float16"])
def test_others_follow_by_their_age(shape: CacheShape) -> None:
    cache = TokenCache.empty(shape, 2)
    cache.computed[1] = True
    cache.computed[1, 6] = False
    in_turn, age = np.array([1, 4]), np.array([1, 4, 2, 8, 4, 4, 4])
    shift = Shift(cache, 1, in_turn)
    cache.tokens[1, in_turn] += np.array([[2.0], [4.0]])
    for rows in cache.rows.values():
        rows[1][:, 1 + in_turn] += np.array([[[1.0], [3.0]]])
    shift.apply(np.array([1, 4, 5]), age)
    # 0.7 of the mean change of 3, by age over 4, at most 1; nothing of those that were computed or never were
    expected = [0.7 * 3 / 4, 2, 0.7 * 3 / 2, 0.7 * 3, 4, 0, 0]
    np.testing.assert_allclose(cache.tokens[1], np.broadcast_to(np.array(expected)[:, None], (N, D)), rtol=1e-6)
    expected = [0, 0.7 * 2 / 4, 1, 0.7 * 2 / 2, 0.7 * 2, 3, 0, 0]
    for name, rows in cache.rows.items():
        if name.startswith("keys"):  # as the update has written them: a shift of all keys changes no attention
            np.testing.assert_array_equal(rows[1, 0, :, 0], [0, 0, 1, 0, 0, 3, 0, 0])
            continue
        np.testing.assert_allclose(rows[1], np.broadcast_to(np.array(expected)[:, None], (H, 1 + N, D // H)), rtol=1e-3)
    assert not cache.tokens[0].any()  # the other stream
    assert not any(rows[0].any() for rows in cache.rows.values())


def test_what_patches_do_not_have_in_common_moves_no_other() -> None:
    rng = np.random.default_rng(0)
    alike, changes = rng.normal(size=D), rng.normal(size=(5, D))
    changes -= changes.mean(axis=0)
    assert common(changes + 0.1 * alike) is None
    found = common(changes + 9 * alike)
    assert found is not None
    np.testing.assert_allclose(found, 9 * alike)
    assert common(changes[:0]) is None
    np.testing.assert_array_equal(common(changes[:1]), changes[0])  # nothing speaks against it
    cache = TokenCache.empty(SHAPES[0], 1)
    cache.computed[:] = True
    shift = Shift(cache, 0, np.arange(5))
    cache.tokens[0, :5] += changes
    cache.state += 1
    shift.apply(np.arange(5), np.ones(N))
    assert not cache.tokens[0, 5:].any()
    assert (cache.state == 1).all()


def test_without_a_sample_nothing_moves() -> None:
    cache = TokenCache.empty(SHAPES[0], 1)
    cache.computed[:] = True
    cache.tokens[:] = 1
    Shift(cache, 0, np.zeros(0, np.int64)).apply(np.array([2]), np.ones(N))
    assert (cache.tokens == 1).all()
