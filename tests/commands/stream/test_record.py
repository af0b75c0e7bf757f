"""What a stream remembers: percentiles, curves and events, in memory that does not grow."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from mae_deploy.commands.stream.draw import Samples
from mae_deploy.commands.stream.record import Record, Times
from mae_deploy.runtime.streams.stream import Seen
from mae_deploy.runtime.video import Frame


def test_percentiles_are_right_to_one_percent() -> None:
    times, values = Times(), np.random.default_rng(0).lognormal(-4, 1, 999)
    assert times.milliseconds(0.5) is None
    for value in values:
        times.add(value)
    for share in (0.5, 0.95, 0.99):
        expected = 1000 * np.quantile(values, share, method="inverted_cdf")
        assert times.milliseconds(share) == pytest.approx(expected, rel=0.01)
    times.add(0)
    times.add(1e9)
    assert times.milliseconds(1) == pytest.approx(1e6)


def seen(count: int, snr: float | None = None) -> Seen:
    return Seen({}, keep=np.arange(count), age=np.zeros(7), cost=count / 7, event=None, grid=(1, 7), snr=snr)


def test_means_and_curves_are_those_of_all_frames() -> None:
    record = Record(7)
    for index in range(4100):
        record.add(Frame(index=index, time=None, image=None), seen(index % 7), 0.001 * (1 + index % 3))
    assert record.patches == pytest.approx(np.mean([index % 7 / 7 for index in range(4100)]))
    assert record.step == 4
    assert len(record.points) == 1025
    assert record.points[10].frame == 41.5
    assert record.points[10].patches == pytest.approx(np.mean([index % 7 / 7 for index in range(40, 44)]))
    assert record.points[10].milliseconds == pytest.approx(np.mean([1 + index % 3 for index in range(40, 44)]))


def test_memory_does_not_grow_with_the_frames() -> None:
    record, samples, sizes = Record(7), Samples(), []
    for index in range(12000):
        frame = Frame(index=index, time=0.1 * index, image=None, events=("lost and found again",))
        record.add(frame, seen(3, snr=float(index % 5)), 0.001)
        record.add_label(frame, f"class {index}", 0.5)
        if samples.wants(index):
            samples.add(index, np.zeros((4, 4, 3), np.uint8))
        if index in (4000, 11999):
            sizes.append(
                len(pickle.dumps([record.points, record.audits, record.labels, record.events, samples.frames]))
            )
    assert sizes[1] < 2 * sizes[0]
    assert len(record.points) < 2000
    assert len(samples.frames) <= 12
    assert [row["frame"] for row in record.labels[-2:]] == [11998, 11999]
    assert (record.num_labels, record.num_audits, record.worst) == (12000, 12000, 0.0)
