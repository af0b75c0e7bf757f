"""What a large object does to the context of all: the change of some patches, carried over to those that are not
computed.

Patches that are computed in turn show how much tokens and values have changed where no pixel did. The mean of it is
added to those of the others, the more the longer ago they were computed themselves, where it is clear that they have
changed alike. Not so of keys: what is added to all keys is added to all scores of a query, and the softmax does not see
it.
"""

from __future__ import annotations

import numpy as np

from mae_deploy.images.read import Array
from mae_deploy.runtime.cache import TokenCache

SHARE = 0.7
"""Of the change: what is shown by a few patches is not all true of the others."""


_CLEAR = 2.0
"""By how many times the mean of changes must be above what as many independent ones would have, in energy: else it is
chance, and to move all values by it would take a twentieth of a small encoder's time."""


def common(changes: Array) -> Array | None:
    """What `(R, D)` changes have in common, `(D,)`; None where that is not clear."""
    R = len(changes)
    if not R:
        return None
    mean: Array = changes.mean(axis=0)
    chance = energy(changes - mean) / max(1, R - 1) / R
    return mean if energy(mean) > _CLEAR * chance else None


def energy(values: Array) -> float:
    """The sum of squares of `(D,)` or `(N, D)`."""
    return float(np.einsum("...i,...i", values, values).sum())


class Shift:
    """One update of a stream, from before it to after it."""

    def __init__(self, cache: TokenCache, at: int, in_turn: Array) -> None:
        """Remember what the patches `in_turn (R,)` of stream `at` were."""
        self._cache, self._at, self._in_turn = cache, at, in_turn
        self._tokens = cache.tokens[at, in_turn]
        self._first = cache.shape.num_prefix
        self._values = cache.state[1::2, at]
        """Of all blocks, `(L, H, S, d)`: the cache's own memory."""
        self._before = self._values[:, :, self._first + in_turn]

    def apply(self, ids: Array, age: Array) -> None:
        """Move the patches that the update did not compute.

        Args:
            ids: `(K,)`, those that it did.
            age: `(N,)`, how many frames ago each was computed before.
        """
        cache, at, in_turn = self._cache, self._at, self._in_turn
        moved = common(cache.tokens[at, in_turn] - self._tokens)
        if moved is None:
            return
        shares = SHARE * np.minimum(1, age / age[in_turn].mean(), dtype=np.float32) * cache.computed[at]
        shares[ids] = 0
        cache.tokens[at] += shares[:, None] * moved
        now = self._values[:, :, self._first + in_turn]
        changes = (now - self._before).mean(axis=2, keepdims=True, dtype=np.float32)
        for rows, change in zip(self._values, changes, strict=True):
            rows[:, self._first :] += (shares[:, None] * change).astype(rows.dtype, copy=False)
