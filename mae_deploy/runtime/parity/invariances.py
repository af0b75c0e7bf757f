"""Inputs that must leave a graph's outputs as they were, or only rearrange them: what holds for every right graph,
whatever its weights.

Shapes: S golden samples, K the length of their rows of patches, N patches of an image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from mae_deploy.images.read import Array
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.manifest import IDS_KEEP, IMAGES, NUM_KEEP, PATCHES, UPDATES, follows_keep

Arrays = dict[str, Array]

_GARBAGE = (-1, np.iinfo(np.int64).max, np.iinfo(np.int64).min, 1 << 31, -(1 << 31) - 1, 10**6, 0)
"""What a caller may leave behind in the padding of a row."""

_LARGEST = 32
"""Samples of the largest batch: more take long."""

_LONGER = 3
"""Entries by which the padding of every row grows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Variation:
    """The golden samples in another form."""

    name: str
    parts: tuple[Arrays, ...]
    """Inputs of one run each; the outputs are joined along the batch."""
    samples: Array | None = None
    """`(S,)`: which golden sample each is now; None: as they were."""
    tokens: Array | None = None
    """`(S, K)`: which token of its sample each is now; None: as they were."""

    def arranged(self, outputs: Arrays) -> Arrays:
        """What the outputs must be now, from the outputs of the golden samples as they were."""
        if self.samples is not None:
            outputs = {name: array[self.samples] for name, array in outputs.items()}
        if self.tokens is not None:
            places = self.tokens[..., None]
            outputs = {
                name: np.take_along_axis(array, places, axis=1) if follows_keep(name) else array
                for name, array in outputs.items()
            }
        return outputs


def variations(bundle: Bundle, inputs: Arrays) -> Iterator[Variation]:
    """Every form that the bundle's graph can take the samples in."""
    if UPDATES in inputs:
        yield from _other_updates(inputs)
    elif IDS_KEEP in inputs:
        yield from _permuted(inputs)
        yield from _sorted(inputs)
    if NUM_KEEP in inputs:
        yield from _other_padding(bundle, inputs)
    num_samples = _count(inputs)
    if bundle.fixed_batch is None and num_samples > 1:
        yield Variation(name="sample alone", parts=samples_alone(bundle, inputs))
        yield from _other_batches(bundle, inputs)
    elif bundle.fixed_batch is not None and bundle.fixed_batch > 1:
        # A sample cannot be run alone here; it gets another place in the batch and other neighbours.
        order = np.arange(1, num_samples + 1) % num_samples
        yield Variation(
            name="other neighbours", parts=({name: array[order] for name, array in inputs.items()},), samples=order
        )


def samples_alone(bundle: Bundle, inputs: Arrays) -> tuple[Arrays, ...]:
    """The inputs of each sample by itself; where K is dynamic, without its padding."""
    alone = []
    for index in range(_count(inputs)):
        sample = {name: array[index : index + 1] for name, array in inputs.items()}
        if NUM_KEEP in inputs and bundle.fixed_keep is None:
            sample[IDS_KEEP] = np.ascontiguousarray(sample[IDS_KEEP][:, : int(sample[NUM_KEEP][0])])
        alone.append(sample)
    return tuple(alone)


def other_lengths(bundle: Bundle, inputs: Arrays) -> Arrays:
    """The golden images of a ragged bundle with other patches: of the first as few as it takes, of the last as many,
    and what lies between.
    """
    (least, most), S = bundle.keep_range, len(inputs[IMAGES])
    lengths = np.linspace(least, most, S).round().astype(np.int64)
    rng = np.random.default_rng(0)
    ids = np.stack([rng.permutation(bundle.num_patches)[:most] for _ in range(S)]).astype(np.int64)
    return {**inputs, IDS_KEEP: _with_garbage(ids, lengths), NUM_KEEP: lengths}


def joined(parts: Sequence[Arrays]) -> Arrays:
    """The outputs of several runs along the batch."""
    even = even_rows(parts)
    return {name: np.concatenate([part[name] for part in even]) for name in parts[0]}


def even_rows(runs: Sequence[Arrays]) -> list[Arrays]:
    """The outputs of several runs with rows of tokens as long as the longest: what follows is zero, as a ragged graph
    has it.
    """
    longest = max((array.shape[1] for run in runs for name, array in run.items() if follows_keep(name)), default=0)

    def extended(array: Array) -> Array:
        return np.pad(array, ((0, 0), (0, longest - array.shape[1]), (0, 0)))

    return [{name: extended(array) if follows_keep(name) else array for name, array in run.items()} for run in runs]


def _permuted(inputs: Arrays) -> Iterator[Variation]:
    ids = inputs[IDS_KEEP]
    S, K = ids.shape
    lengths = inputs.get(NUM_KEEP, np.full(S, K))
    if lengths.max() > 1:
        rng = np.random.default_rng(0)
        tokens = np.stack([np.concatenate([_shuffled(int(length), rng), np.arange(length, K)]) for length in lengths])
        yield Variation(
            name="permuted ids_keep",
            parts=({**inputs, IDS_KEEP: np.take_along_axis(ids, tokens, axis=1)},),
            tokens=tokens,
        )


def _sorted(inputs: Arrays) -> Iterator[Variation]:
    """Patches in the order of the image, as most callers have them."""
    ids = inputs[IDS_KEEP]
    S, K = ids.shape
    real = np.arange(K) < inputs.get(NUM_KEEP, np.full(S, K))[:, None]
    order = np.argsort(np.where(real, ids, np.iinfo(np.int64).max), axis=1, kind="stable")
    if (order != np.arange(K)).any():
        sorted_ids = np.take_along_axis(ids, order, axis=1)
        yield Variation(name="sorted ids_keep", parts=({**inputs, IDS_KEEP: sorted_ids},), tokens=order)


def _other_batches(bundle: Bundle, inputs: Arrays) -> Iterator[Variation]:
    """Two samples, three, and what is left; and as many as the graph was checked for, over and over. Streams hold too
    much for that.
    """
    S, largest = _count(inputs), min(bundle.largest_batch, _LARGEST)
    ends = [0, *(end for end in (2, 5) if end < S), S]
    if len(ends) > 2:
        parts = tuple({name: array[first:last] for name, array in inputs.items()} for first, last in pairwise(ends))
        yield Variation(name="other batches", parts=parts)
    if largest > S and UPDATES not in inputs:
        order = np.arange(largest) % S
        many = {name: array[order] for name, array in inputs.items()}
        yield Variation(name="largest batch", parts=(many,), samples=order)


def _other_updates(inputs: Arrays) -> Iterator[Variation]:
    """A stream's last update with its patches in another order, and once more: nothing changes, so nothing may."""
    ids, patches, updates = inputs[IDS_KEEP], inputs[PATCHES], inputs[UPDATES]
    (S, M), K = ids.shape, int(updates[0, -1])
    rng = np.random.default_rng(0)
    orders = {
        "permuted ids_keep": np.stack([_shuffled(K, rng) for _ in range(S)]),
        "sorted ids_keep": np.argsort(ids[:, M - K :], axis=1),
    }
    for name, tokens in orders.items() if K > 1 else ():
        order = np.concatenate([np.broadcast_to(np.arange(M - K), (S, M - K)), M - K + tokens], axis=1)
        arranged = {
            IDS_KEEP: np.take_along_axis(ids, order, axis=1),
            PATCHES: np.take_along_axis(patches, order[..., None], axis=1),
        }
        yield Variation(name=name, parts=({**inputs, **arranged},), tokens=tokens)
    names = (IDS_KEEP, PATCHES)
    again = {name: np.concatenate([inputs[name], inputs[name][:, M - K :]], axis=1) for name in names}
    again[UPDATES] = np.concatenate([updates, updates[:, -1:]], axis=1)
    yield Variation(name="repeated update", parts=({**inputs, **again},))


def _count(inputs: Arrays) -> int:
    return len(next(iter(inputs.values())))


def _other_padding(bundle: Bundle, inputs: Arrays) -> Iterator[Variation]:
    ids, lengths = inputs[IDS_KEEP], inputs[NUM_KEEP]
    K = ids.shape[1]
    if lengths.min() < K:
        yield Variation(name="other padding", parts=({**inputs, IDS_KEEP: _with_garbage(ids, lengths)},))
    longer = min(K + _LONGER, bundle.keep_range[1])
    if bundle.fixed_keep is None and longer > K:
        padded = _with_garbage(np.pad(ids, ((0, 0), (0, longer - K))), lengths)
        yield Variation(name="longer padding", parts=({**inputs, IDS_KEEP: padded},))


def _with_garbage(ids: Array, lengths: Array) -> Array:
    """The same real patches; in their padding, what no caller should leave there."""
    padding = np.arange(ids.shape[1]) >= lengths[:, None]
    ids = ids.copy()
    ids[padding] = np.resize(np.array(_GARBAGE, np.int64), int(padding.sum()))
    return ids


def _shuffled(length: int, rng: np.random.Generator) -> Array:
    """A reordering of `length` items, never the order as it was unless there is no other."""
    order = rng.permutation(length)
    return order if (order != np.arange(length)).any() else order[::-1]
