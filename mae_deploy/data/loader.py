"""Batches for a whole run as one stream that can start at any step, so that resuming and epochs cost nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from mae_deploy.data.dataset import ImageDataset, Key, Sample, collate
from mae_deploy.seeding import derive_seed


class StreamSampler(Sampler[list[Key]]):
    """Micro-batches of shuffled epochs, one after the other, for one of `world_size` processes.

    Each epoch is a fresh permutation; its last, incomplete batch is dropped, as in the original.

    Args:
        start: micro-batches already consumed by each process.
        stop: micro-batches at which the run ends.
        batches_per_epoch: micro-batches of an epoch in each process, at most as many as the samples fill.
    """

    def __init__(
        self, num_samples: int, batch_size: int, *, batches_per_epoch: int, seed: int, start: int, stop: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.start = start
        self.stop = stop
        self.rank = rank
        self.world_size = world_size
        self.batches_per_epoch = batches_per_epoch

    def __len__(self) -> int:
        """Micro-batches left."""
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[Key]]:
        """Yield the keys of each micro-batch."""
        shuffled_epoch, order = -1, torch.empty(0, dtype=torch.int64)
        for position in range(self.start, self.stop):
            epoch, batch = divmod(position, self.batches_per_epoch)
            if epoch != shuffled_epoch:
                generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", epoch))
                shuffled_epoch, order = epoch, torch.randperm(self.num_samples, generator=generator)
            first = (batch * self.world_size + self.rank) * self.batch_size
            yield [Key(epoch, index) for index in order[first : first + self.batch_size].tolist()]


def train_loader(dataset: ImageDataset, sampler: StreamSampler, *, num_workers: int, pin_memory: bool) -> DataLoader[Sample]:
    """A loader over the rest of the run."""
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, pin_memory=pin_memory, **_workers(num_workers))


def eval_loader(dataset: ImageDataset, *, batch_size: int, num_workers: int, rank: int = 0, world_size: int = 1) -> DataLoader[Sample]:
    """Every image once, in order; each process takes its share."""
    keys = [Key(0, index) for index in range(rank, len(dataset), world_size)]
    batches = [keys[first : first + batch_size] for first in range(0, len(keys), batch_size)]
    return DataLoader(dataset, batch_sampler=batches, collate_fn=collate, **_workers(num_workers))


def _workers(num_workers: int) -> dict[str, Any]:
    # Python 3.14 no longer forks by default; each worker would spend seconds on importing torch, for each evaluation anew.
    return {"num_workers": num_workers, "multiprocessing_context": "fork" if num_workers > 0 and sys.platform == "linux" else None}
