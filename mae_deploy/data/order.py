"""Which images each batch of a run holds: a function of the seed and the place in the run, so that a run starts
anywhere at no cost.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.utils.data import Sampler

from mae_deploy.seeding import derive_seed


class Key(NamedTuple):
    """One draw of one image: its augmentation depends on nothing else, so any worker gives the same sample."""

    epoch: int
    item: int
    view: int = 0
    """Number among the views of this image, with repeated augmentation."""


@dataclass(frozen=True, slots=True)
class RunSlice:
    """A part of a run: micro-batches of each process, counted over the whole run."""

    batch_size: int
    batches_per_epoch: int
    """Micro-batches of an epoch in each process, at most as many as the samples fill."""
    start: int
    """Micro-batches already consumed by each process."""
    stop: int
    """Micro-batches at which the run ends."""
    rank: int = 0
    world_size: int = 1


class StreamSampler(Sampler[list[Key]]):
    """Micro-batches of shuffled epochs, one after the other, for one of several processes.

    Each epoch is a fresh permutation; its last, incomplete batch is dropped, as in the original. Micro-batch m of
    process r holds the samples from `(m × world_size + r) × batch_size` on, so the effective batches of a run are the
    same on any number of processes.

    Args:
        views: take each image this many times in a row (repeated augmentation); the epoch keeps its length and has
            fewer images.
    """

    def __init__(self, num_samples: int, where: RunSlice, *, seed: int, views: int = 1) -> None:
        self.num_samples = num_samples
        self.where = where
        self.seed = seed
        self.views = views

    def __len__(self) -> int:
        """Micro-batches left."""
        return self.where.stop - self.where.start

    def __iter__(self) -> Iterator[list[Key]]:
        """Yield the keys of each micro-batch."""
        where, shuffled_epoch, order = self.where, -1, torch.empty(0, dtype=torch.int64)
        for position in range(where.start, where.stop):
            epoch, batch = divmod(position, where.batches_per_epoch)
            if epoch != shuffled_epoch:
                generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", epoch))
                shuffled_epoch, order = epoch, torch.randperm(self.num_samples, generator=generator)
            first = (batch * where.world_size + where.rank) * where.batch_size
            places = range(first, min(first + where.batch_size, self.num_samples))
            yield [Key(epoch, int(order[place // self.views]), place % self.views) for place in places]
