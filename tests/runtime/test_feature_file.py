"""Outputs on disk as they come: a kill costs a batch, and the file is there whole or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mae_deploy.errors import ConfigError, MissingDependency
from mae_deploy.images.read import Array
from mae_deploy.runtime import feature_file
from mae_deploy.runtime.feature_file import FeatureFile, check_features

NAMES = ["a/ä.png", "b.png", os.fsdecode(b"\xff.png")]
CALL = {"images": "3 of them", "keep": [0, 1]}


def arrays() -> dict[str, Array]:
    rng = np.random.default_rng(0)
    return {
        "score": rng.normal(size=3),
        "cls": rng.normal(size=(3, 5)).astype(np.float32),
        "tokens": rng.normal(size=(3, 2, 7)).astype(np.float16),
    }


def add(file: FeatureFile, first: int, last: int, **more: Any) -> None:
    file.add(NAMES[first:last], {name: array[first:last] for name, array in arrays().items()}, done=last, **more)


def write(path: Path) -> None:
    with FeatureFile(path, CALL) as file:
        add(file, 0, 2)
        add(file, 2, 3)
        file.finish()


def assert_npz(path: Path) -> None:
    with np.load(path, allow_pickle=False) as archive:
        assert archive.files == ["paths", "score", "cls", "tokens"]
        assert archive["paths"].tolist() == NAMES
        for name, array in arrays().items():
            np.testing.assert_array_equal(archive[name], array, strict=True)


def test_npz(tmp_path: Path) -> None:
    write(tmp_path / "new" / "features.npz")
    assert_npz(tmp_path / "new" / "features.npz")
    assert os.listdir(tmp_path / "new") == ["features.npz"]


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 20])
def test_parquet(tmp_path: Path, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(feature_file, "_CHUNK_BYTES", chunk_bytes)
    write(tmp_path / "features.parquet")
    table = parquet.read_table(tmp_path / "features.parquet")
    assert table.column_names == ["paths", "score", "cls", "tokens"]
    assert table["paths"].to_pylist() == [*NAMES[:2], "\ufffd.png"]
    assert re.fullmatch(r"fixed_size_list<.*float.*>\[5\]", str(table.schema.field("cls").type))
    for name, array in arrays().items():
        np.testing.assert_array_equal(np.array(table[name].to_pylist(), dtype=array.dtype), array)
    assert os.listdir(tmp_path) == ["features.parquet"]


def test_a_killed_call_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "features.npz"
    with FeatureFile(path, CALL) as file:
        add(file, 0, 1, left_out=[("x.png", "empty")])
        add(file, 1, 2)
    assert os.listdir(tmp_path) == ["features.npz.partial"]
    # What a kill leaves: half a row, and half a line.
    for name in ("1.bin", "2.bin", "log.jsonl"):
        with (tmp_path / "features.npz.partial" / name).open("ab") as half:
            half.write(b"half")
    with FeatureFile(path, CALL) as file:
        assert (file.done, file.rows, file.left_out) == (2, 2, [("x.png", "empty")])
        assert list(file.names()) == NAMES[:2]
        np.testing.assert_array_equal(np.concatenate(list(file.chunks("cls"))), arrays()["cls"][:2])
        add(file, 2, 3)
        file.finish()
    assert_npz(path)
    assert os.listdir(tmp_path) == ["features.npz"]


def test_a_batch_that_is_not_whole_on_disk_is_computed_again(tmp_path: Path) -> None:
    path = tmp_path / "features.npz"
    with FeatureFile(path, CALL) as file:
        add(file, 0, 1)
        add(file, 1, 3)
    with (tmp_path / "features.npz.partial" / "3.bin").open("r+b") as cut:
        cut.truncate(30)
    with FeatureFile(path, CALL) as file:
        assert (file.done, file.rows) == (1, 1)
        add(file, 1, 3)
        file.finish()
    assert_npz(path)


def test_rows_of_another_call_are_not_taken_over(tmp_path: Path) -> None:
    with FeatureFile(tmp_path / "features.npz", CALL) as file:
        add(file, 0, 1)
    with pytest.raises(ConfigError, match=r"has rows of a call with other keep$") as caught:
        FeatureFile(tmp_path / "features.npz", {**CALL, "keep": [0]})
    assert caught.value.hint == "remove it, or choose another --out"


def test_two_calls_at_once(tmp_path: Path) -> None:
    with FeatureFile(tmp_path / "features.npz", CALL) as file:
        add(file, 0, 1)
        with pytest.raises(ConfigError, match="another process is writing"):
            FeatureFile(tmp_path / "features.npz", CALL)


def test_a_failed_write_keeps_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_off(*_: object) -> None:
        raise OSError("disk full")

    with FeatureFile(tmp_path / "features.npz", CALL) as file:
        add(file, 0, 3)
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "copyfileobj", break_off)
            with pytest.raises(OSError, match="disk full"):
                file.finish()
    assert os.listdir(tmp_path) == ["features.npz.partial"]
    with FeatureFile(tmp_path / "features.npz", CALL) as file:
        assert file.done == 3
        file.finish()
    assert_npz(tmp_path / "features.npz")


def test_memory_does_not_follow_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_file, "_CHUNK_BYTES", 1 << 16)
    row = np.zeros((8, 1000), np.float32)
    peaks = []
    for batches in (20, 200):  # 0.6 and 6 MB
        tracemalloc.start()
        with FeatureFile(tmp_path / f"{batches}.npz", {}) as file:
            for index in range(batches):
                file.add([f"{index}-{place}.png" for place in range(8)], {"cls": row}, done=8 * index + 8)
            file.finish()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 200_000, peaks  # of 5.8 MB more rows


def test_what_a_bundle_calls_its_outputs_is_no_path(tmp_path: Path) -> None:
    with FeatureFile(tmp_path / "in" / "features.npz", {}) as file:
        file.add(["a"], {"../../evil": np.zeros((1, 2))}, done=1)
        file.finish()
    assert os.listdir(tmp_path) == ["in"]
    assert os.listdir(tmp_path / "in") == ["features.npz"]


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingDependency, match="pyarrow") as caught:
        FeatureFile(tmp_path / "features.parquet", {})
    assert "mae-deploy[parquet]" in (caught.value.hint or "")


@pytest.mark.parametrize("name", ["features.csv", "features", "features.NPY"])
def test_other_suffixes(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=name) as caught:
        FeatureFile(tmp_path / name, {})
    assert caught.value.hint == "known suffixes: .npz, .parquet"


@pytest.mark.parametrize(("name", "shape"), [("cls", (2, 5)), ("cls", (3, 4)), ("paths", (3,))])
def test_arrays_that_do_not_fit(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    with FeatureFile(tmp_path / "features.npz", {}) as file:
        add(file, 0, 3)
        with pytest.raises(ConfigError, match=f"'{name}' of shape"):
            file.add(NAMES, {**arrays(), name: np.zeros(shape, np.float32)}, done=6)


def test_rows_that_a_kill_left_beside_a_whole_file_go(tmp_path: Path) -> None:
    path = tmp_path / "features.npz"
    path.touch()
    (tmp_path / "features.npz.partial").mkdir()
    with pytest.raises(ConfigError, match="already exists"):
        check_features(path)
    assert list(tmp_path.iterdir()) == [path]


def test_rows_count_once_they_are_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, now = tmp_path / "features.npz", [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    log, said = tmp_path / "features.npz.partial" / "log.jsonl", []
    with FeatureFile(path, CALL) as file:
        for first in range(3):
            add(file, first, first + 1)
            now[0] += 0.75
            said.append([json.loads(line)["done"] for line in log.read_text().splitlines()[2:]])
    assert said == [[1], [1], [1, 2, 3]], "at once, then after a second"
    with FeatureFile(path, CALL) as file:
        assert file.done == 3


def test_of_a_call_that_fails_before_its_first_row_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FeatureFile, "_place", full)
    with pytest.raises(OSError, match="No space"), FeatureFile(tmp_path / "features.npz", CALL) as file:
        add(file, 0, 1)
    assert os.listdir(tmp_path) == []
