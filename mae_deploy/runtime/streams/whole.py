"""Features of the whole frame, of what an update has computed and what was there before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mae_deploy.images.read import Array
from mae_deploy.runtime.cache import TokenCache
from mae_deploy.runtime.manifest import pools_mean

_OF_PATCHES = "block_"
"""Outputs that have a row for each patch, beside the tokens."""


def whole_features(
    outputs: Mapping[str, Array], ids: Array, before: Mapping[str, Array], cache: TokenCache, manifest: Any
) -> dict[str, Array]:
    """The outputs of an update of one stream, each `(1, …)` and of the whole frame: the cache's tokens, and their mean
    where that is what `pooled` is; the rows of before of what else has one for each patch. What attention pools, or is
    normalised, is as the graph gives it.

    Args:
        ids: the patches that were computed, `(K,)`.
        before: what this gave last, or nothing where all patches are computed.
        cache: of this stream alone, after the update.
    """
    found = dict(outputs)
    for name in found:
        if name.startswith(_OF_PATCHES):
            shape = (1, cache.shape.num_patches, found[name].shape[2])
            rows = before[name].copy() if name in before else np.zeros(shape, found[name].dtype)
            rows[:, ids] = found[name]
            found[name] = rows
    if (last := cache.token_output(found)) is not None:
        found[last] = cache.tokens.astype(found[last].dtype)  # a copy
    if "tokens" in found and "pooled" in found and pools_mean(manifest):
        found["pooled"] = cache.tokens.mean(axis=1).astype(found["pooled"].dtype)
    return found
