"""One stream of batches: every start gives the tail of the same stream, and processes share each batch out among
themselves.
"""

from __future__ import annotations

from itertools import chain

import pytest

from mae_deploy.data.order import RunSlice, StreamSampler

SAMPLES, BATCH, PER_EPOCH, EPOCHS = 23, 3, 7, 4
"""Two samples of each epoch do not fill a batch."""


def stream(
    start: int = 0,
    *,
    batch_size: int = BATCH,
    rank: int = 0,
    world_size: int = 1,
    per_epoch: int = PER_EPOCH,
    seed: int = 0,
) -> StreamSampler:
    return StreamSampler(
        SAMPLES, RunSlice(batch_size, per_epoch, start, EPOCHS * per_epoch, rank, world_size), seed=seed
    )


@pytest.mark.parametrize("start", range(EPOCHS * PER_EPOCH + 1))
def test_every_start_gives_the_tail_of_the_same_stream(start: int) -> None:
    whole = list(stream())
    assert len(whole) == EPOCHS * PER_EPOCH
    assert list(stream(start)) == whole[start:]
    assert len(stream(start)) == len(whole) - start


def test_an_epoch_has_each_sample_at_most_once_and_its_own_order() -> None:
    batches = list(stream())
    orders = []
    for epoch in range(EPOCHS):
        keys = list(chain.from_iterable(batches[epoch * PER_EPOCH : (epoch + 1) * PER_EPOCH]))
        assert {key.epoch for key in keys} == {epoch}
        orders.append([key.item for key in keys])
        assert len(set(orders[-1])) == len(keys) == PER_EPOCH * BATCH
        assert set(orders[-1]) <= set(range(SAMPLES))
    assert len({tuple(order) for order in orders}) == EPOCHS
    # The two left out are not the same in each epoch.
    assert len({frozenset(range(SAMPLES)) - frozenset(order) for order in orders}) > 1


def test_the_seed_changes_the_order() -> None:
    assert list(stream(seed=0)) == list(stream(seed=0)) != list(stream(seed=1))


def test_processes_share_out_each_global_batch() -> None:
    """Three processes with batches of 2 see together what one sees with batches of 6."""
    shares = [list(stream(batch_size=2, rank=rank, world_size=3, per_epoch=3)) for rank in range(3)]
    together = [list(chain.from_iterable(batches)) for batches in zip(*shares, strict=True)]
    assert together == list(stream(batch_size=6, per_epoch=3))
    assert all(len(set(batch)) == 6 for batch in together)
