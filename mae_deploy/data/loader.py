"""Loaders over one data set: every image once, in order; and the worker processes that decode."""

from __future__ import annotations

from torch.utils.data import DataLoader

from mae_deploy.data.dataset import ImageDataset, Sample, collate
from mae_deploy.data.order import Key
from mae_deploy.data.workers import worker_options


def eval_loader(
    dataset: ImageDataset, *, batch_size: int, num_workers: int, rank: int = 0, world_size: int = 1
) -> DataLoader[Sample]:
    """Every image once, in order; each process takes its share."""
    keys = [Key(0, index) for index in range(rank, len(dataset), world_size)]
    batches = [keys[first : first + batch_size] for first in range(0, len(keys), batch_size)]
    return DataLoader(dataset, batch_sampler=batches, collate_fn=collate, **worker_options(num_workers))
