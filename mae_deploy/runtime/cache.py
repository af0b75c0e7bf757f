"""Streams on a cached graph: what a camera's earlier frames left behind, and how a frame updates it.

A graph of `--tokens cached` recomputes K patches and CLS. They attend to the keys and values of all patches, which a
`TokenCache` holds; the new ones are written to it in place.
Shapes: B streams, N patches, K recomputed ones, F tokens before them (CLS, registers), S = F + N rows, L blocks, H
heads, d = D / H, P patch side.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mae_deploy.images.read import Array
from mae_deploy.runtime.engines.base import Engine, Runner, check_outputs, run_in_chunks
from mae_deploy.runtime.manifest import (
    CACHE_MASK,
    IDS_KEEP,
    NEW_ROWS,
    OLD_TOKENS,
    PATCHES,
    REST,
    UPDATES,
    Manifest,
    cache_names,
    num_prefix,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheShape:
    """What a graph keeps of a stream."""

    num_patches: int
    """N."""
    depth: int
    """L."""
    num_heads: int
    """H."""
    embed_dim: int
    """D."""
    dtype: str
    """float32 or float16, of keys and values."""
    num_prefix: int = 1
    """F."""
    fixed_rows: bool = False
    """Whether the graph takes all S rows at every call: where K is fixed, and on TensorRT."""

    @classmethod
    def of(cls, manifest: Manifest) -> CacheShape:
        """That of a bundle of token mode `cached`."""
        model = manifest["model"]
        keys = next(entry for entry in manifest["graph"]["inputs"] if entry["name"] == cache_names(1)[0])
        return cls(
            num_patches=manifest["num_patches"],
            depth=model["depth"],
            num_heads=model["num_heads"],
            embed_dim=model["embed_dim"],
            dtype=keys["dtype"],
            num_prefix=num_prefix(model),
            fixed_rows=isinstance(keys["shape"][2], int),
        )


class TokenCache:
    """What B streams remember: keys and values of every block, and the final tokens of the whole frame.

    The arrays are the caller's to read, and to write to between updates. One cache belongs to one thread at a time.
    """

    def __init__(self, shape: CacheShape, state: Array, tokens: Array, computed: Array) -> None:
        self.shape = shape
        self.state = state
        """Keys and values of all blocks, in the order of `cache_names`: `(2 L, B, H, S, d)`."""
        self.rows: Mapping[str, Array] = dict(zip(cache_names(shape.depth), state, strict=True))
        """The same memory under the graph's names, `keys_0` to `values_{L-1}`, each `(B, H, S, d)`."""
        self.tokens = tokens
        """float32 `(B, N, D)`: each patch's token when it was last recomputed, 0 where it never was. The `pooled` (and
        `logits` of the mean) of later updates are computed from it. All 0 where the graph gives no tokens."""
        self.computed = computed
        """bool `(B, N)`: which patches were ever computed; attention sees no others."""

    @classmethod
    def empty(cls, shape: CacheShape, batch: int) -> TokenCache:
        """Of streams of which nothing was computed yet."""
        N, H, F = shape.num_patches, shape.num_heads, shape.num_prefix
        return cls(
            shape,
            np.zeros((2 * shape.depth, batch, H, F + N, shape.embed_dim // H), shape.dtype),
            np.zeros((batch, N, shape.embed_dim), np.float32),
            np.zeros((batch, N), bool),
        )

    def token_output(self, outputs: Collection[str]) -> str | None:
        """The output whose rows `tokens` holds: a mean-pooled classifier has no norm after its last block."""
        return next((name for name in ("tokens", f"block_{self.shape.depth - 1}") if name in outputs), None)

    def __len__(self) -> int:
        """Number of streams, B."""
        return len(self.tokens)

    @property
    def nbytes(self) -> int:
        """Memory of the arrays."""
        return self.state.nbytes + self.tokens.nbytes + self.computed.nbytes

    def streams(self, first: int, last: int) -> TokenCache:
        """The streams from `first` up to, and without, `last`: the same memory, so an update of it is one of this."""
        part = slice(first, last)
        return TokenCache(self.shape, self.state[:, part], self.tokens[part], self.computed[part])

    def clear(self) -> None:
        """Forget everything."""
        self.computed[:] = False
        self.tokens[:] = 0


def take_patches(pixels: Array, ids_keep: Array, patch_size: int) -> Array:
    """The kept patches of images `(B, H, W, C)`, by `ids_keep (B, K)`: `(B, K, P, P, C)`; no other pixel is touched."""
    B, H, W, C = pixels.shape
    P = patch_size
    grid = pixels.reshape(B, H // P, P, W // P, P, C)
    row, column = np.divmod(ids_keep, W // P)
    return grid[np.arange(B)[:, None], row, :, column]


def update_cache(
    engine: Engine,
    cache: TokenCache,
    patches: Array,
    ids_keep: Array,
    outputs: Sequence[str] | None = None,
) -> dict[str, Array]:
    """Run one update, and write what it gives into the cache.

    Args:
        engine: of a cached graph of these sizes.
        patches: as the graph takes them, `(B, K, P * P * C)`.
        ids_keep: which they are, int64 `(B, K)`, each once.
        outputs: what to return; default: all but the new rows.

    Returns:
        The graph's outputs: `cls (B, D)`, `tokens (B, K, D)` of the recomputed patches in their order, `pooled` and
        `logits` of the whole frame.
    """
    own = [name for name in engine.output_names if name != NEW_ROWS]
    wanted = check_outputs(outputs, own)
    last = [name for name in [cache.token_output(own)] if name is not None]
    inputs = update_inputs(cache, patches, ids_keep, engine.input_names)
    # In chunks: an engine of TensorRT takes the batches that it was built for.
    found = run_in_chunks(engine, inputs, batch=None, outputs=tuple(dict.fromkeys([*wanted, *last, NEW_ROWS])))
    first = np.arange(cache.shape.num_prefix)
    for stream, ids in enumerate(ids_keep):
        state, new = cache.state[:, stream], found[NEW_ROWS][stream]
        state[:, :, np.concatenate([first, len(first) + ids])] = new.reshape(*state.shape[:2], *new.shape[1:])
        for name in last:
            cache.tokens[stream, ids] = found[name][stream]
        cache.computed[stream, ids] = True
    return {name: found[name] for name in wanted}


def update_inputs(cache: TokenCache, patches: Array, ids_keep: Array, names: Sequence[str]) -> dict[str, Array]:
    """What the graph takes for an update, by its names; keys and values are the cache's own memory."""
    shape, B = cache.shape, len(ids_keep)
    others = cache.computed.copy()
    others[np.arange(B)[:, None], ids_keep] = False
    # Where no old row counts, one that is masked stands for all: a whole frame costs what it costs without a cache.
    alone = not shape.fixed_rows and not others.any()
    inputs = {PATCHES: patches, IDS_KEEP: ids_keep}
    if alone:
        size = (B, shape.num_heads, 1, shape.embed_dim // shape.num_heads)
        inputs |= {CACHE_MASK: np.zeros((B, 1), np.float32)}
        inputs |= dict.fromkeys(cache.rows, np.zeros(size, shape.dtype))
    else:
        mask = np.zeros((B, shape.num_prefix + shape.num_patches), np.float32)
        mask[:, shape.num_prefix :] = others
        inputs |= {CACHE_MASK: mask, **cache.rows}
    if OLD_TOKENS in names:
        prefix = np.zeros((B, 1 if alone else shape.num_prefix, shape.embed_dim), np.float32)  # masked
        inputs[OLD_TOKENS] = prefix if alone else np.concatenate([prefix, cache.tokens], axis=1)
    if REST in names:
        inputs[REST] = np.matmul(others[:, None].astype(np.float32), cache.tokens)[:, 0]
    return inputs


def last_update(inputs: Mapping[str, Array], shape: CacheShape, names: Sequence[str]) -> dict[str, Array]:
    """Of the inputs of `Sequences`, what the graph takes at the last update, with a cache of which everything was
    computed: to be timed.
    """
    first = inputs[IDS_KEEP].shape[1] - int(inputs[UPDATES][0, -1])
    patches, ids = (np.ascontiguousarray(inputs[name][:, first:]) for name in (PATCHES, IDS_KEEP))
    cache = TokenCache.empty(shape, len(ids))
    cache.computed[:] = True
    return update_inputs(cache, patches, ids, names)


class Sequences(Runner):
    """A cached graph as a function: each sample is a stream that begins with nothing, is updated a few times, and gives
    what the last update gave.

    Its inputs are `patches (S, M, P * P * C)`, `ids_keep (S, M)` and `updates (S, U)`: how many of the M patches each
    update takes, the same of every sample.
    """

    def __init__(self, engine: Engine, shape: CacheShape) -> None:
        self.engine, self.shape = engine, shape
        self.profiles: Sequence[Mapping[str, Sequence[int]]] = ()

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Run all updates of these samples, side by side."""
        patches, ids_keep, updates = inputs[PATCHES], inputs[IDS_KEEP], inputs[UPDATES]
        cache = TokenCache.empty(self.shape, len(ids_keep))
        ends = np.cumsum(updates[0])
        found: dict[str, Array] = {}
        for first, last in zip([0, *ends[:-1]], ends, strict=True):
            part, ids = (np.ascontiguousarray(array[:, first:last]) for array in (patches, ids_keep))
            found = update_cache(self.engine, cache, part, ids, outputs)
        return found


def runner(engine: Engine, manifest: Manifest) -> Runner:
    """What runs golden samples: the engine, or for a cached graph sequences of its updates."""
    return Sequences(engine, CacheShape.of(manifest)) if manifest["token_mode"] == "cached" else engine
