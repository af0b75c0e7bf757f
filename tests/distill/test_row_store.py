"""A row counts only where it is whole: whatever a kill, a disk or another process left of it."""

from __future__ import annotations

import os
import random
import shutil
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from mae_deploy.distill import row_store
from mae_deploy.distill.row_store import RowStore
from tests.training.tiny_runs import start_process

BYTES = 94
NUMBERS = np.array([3, 0, 11, 7, 29])


def rows_of(numbers: npt.NDArray[np.int64], length: int = BYTES) -> npt.NDArray[np.uint8]:
    """Rows that follow from their numbers."""
    return np.stack(
        [np.random.default_rng(number).integers(0, 256, length, dtype=np.uint8) for number in numbers.tolist()]
    )


def read(
    store: RowStore, numbers: npt.NDArray[np.int64], length: int = BYTES
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.uint8]]:
    rows = np.full((len(numbers), length), 255, dtype=np.uint8)
    return store.read(numbers, rows), rows


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RowStore:
    """Seven rows a file."""
    monkeypatch.setattr(row_store, "_SHARD_BYTES", 7 * (BYTES + 8) + 1)
    found = RowStore(tmp_path / "rows", BYTES)
    found.write(NUMBERS, rows_of(NUMBERS))
    return found


def test_rows_come_back_and_others_are_not_there(store: RowStore) -> None:
    asked = np.array([29, 1, 0, 3, 30, 1000, 11])
    found, rows = read(store, asked)
    assert found.tolist() == [True, False, True, True, False, False, True]
    assert np.array_equal(rows[found], rows_of(asked[found]))
    assert sorted(file.name for file in store.folder.iterdir()) == [
        "rows-00000.bin",
        "rows-00001.bin",
        "rows-00004.bin",
        "rows-00142.bin",
    ]
    assert 0 < store.on_disk() < 30 * 4096


def test_rows_of_another_process_are_seen(store: RowStore) -> None:
    """Both have the files open."""
    other = RowStore(store.folder, BYTES)
    other.write(np.array([30]), rows_of(np.array([30])))
    found, rows = read(store, np.array([30]))
    assert found.all()
    assert np.array_equal(rows, rows_of(np.array([30])))


def test_a_row_of_zeros_is_a_row_and_a_hole_is_none(store: RowStore) -> None:
    store.write(np.array([5]), np.zeros((1, BYTES), dtype=np.uint8))
    found, rows = read(store, np.array([5, 4]))
    assert found.tolist() == [True, False]
    assert not rows[0].any()


@pytest.mark.parametrize("length", range(0, BYTES + 8, 5))
def test_a_row_that_was_cut_short_does_not_count(store: RowStore, length: int) -> None:
    """Whether a kill, or the end of the disk, left the first bytes only, over what was there before; rows beside it
    stay.
    """
    file = store.folder / "rows-00000.bin"
    content = bytearray(file.read_bytes())
    row = content[3 * store.stride : 4 * store.stride]
    content[3 * store.stride : 4 * store.stride] = row[:length] + bytes(store.stride - length)
    file.write_bytes(content)
    assert read(store, np.array([3, 0]))[0].tolist() == [False, True]
    file.write_bytes(content[: 3 * store.stride + length])
    assert read(store, np.array([3, 0]))[0].tolist() == [False, True]


@pytest.mark.parametrize("place", [0, 7, 8, 60, BYTES + 7])
def test_a_damaged_row_does_not_count_until_it_is_written_again(store: RowStore, place: int) -> None:
    file = store.folder / "rows-00001.bin"
    content = bytearray(file.read_bytes())
    content[4 * store.stride + place] ^= 16
    file.write_bytes(content)
    assert read(store, NUMBERS)[0].tolist() == [True, True, False, True, True]
    store.write(np.array([11]), rows_of(np.array([11])))
    assert read(store, NUMBERS)[0].all()


def test_a_row_at_the_place_of_another_does_not_count(store: RowStore) -> None:
    shutil.copy(store.folder / "rows-00000.bin", store.folder / "rows-00002.bin")
    assert not read(store, np.array([14, 17]))[0].any()


def test_a_full_disk_is_an_error_and_no_row(store: RowStore) -> None:
    (store.folder / "rows-00003.bin").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        store.write(np.array([21]), rows_of(np.array([21])))
    assert not read(store, np.array([21]))[0].any()


# --- processes -------------------------------------------------------------------------------------------------------

LONG, MANY = 100_003, 40
"""Rows that take long enough to write for a kill to come in between."""


def write_for_ever(folder: Path, seed: int) -> None:
    store, order = RowStore(folder, LONG), random.Random(seed)
    rows = rows_of(np.arange(MANY), LONG)
    while True:
        numbers = np.array(order.sample(range(MANY), 5))
        store.write(numbers, rows[numbers])


def write_once(folder: Path, seed: int) -> None:
    numbers = np.random.default_rng(seed).permutation(MANY)
    RowStore(folder, LONG).write(numbers, rows_of(numbers, LONG))


def wait_for_a_row(folder: Path, process: ForkServerProcess) -> None:
    while not any(file.stat().st_size for file in folder.glob("*.bin")):
        assert process.is_alive()
        time.sleep(0.002)


def test_after_sigkill_at_any_moment_every_row_is_right_or_not_there(tmp_path: Path) -> None:
    store = RowStore(tmp_path, LONG)
    expected, counted = rows_of(np.arange(MANY), LONG), 0
    for seed in range(4):
        process = start_process(write_for_ever, tmp_path, seed)
        wait_for_a_row(tmp_path, process)
        time.sleep(0.004 * seed)
        process.kill()
        process.join()
        found, rows = read(store, np.arange(MANY), LONG)
        assert np.array_equal(rows[found], expected[found])
        assert found.sum() >= counted - 1  # of all rows, the kill may have spoilt the one that was being written again
        counted = int(found.sum())
    assert counted > 0
    store.write(np.arange(MANY), expected)
    assert read(store, np.arange(MANY), LONG)[0].all()


def test_two_processes_fill_the_same_files(tmp_path: Path) -> None:
    processes = [start_process(write_once, tmp_path, seed) for seed in (1, 2)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    found, rows = read(RowStore(tmp_path, LONG), np.arange(MANY), LONG)
    assert found.all()
    assert np.array_equal(rows, rows_of(np.arange(MANY), LONG))
    assert os.stat(tmp_path / "rows-00000.bin").st_size == MANY * (LONG + 8)
