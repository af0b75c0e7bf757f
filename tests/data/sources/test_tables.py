"""Hugging Face data sets on disk, written as the `datasets` library writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mae_deploy.data.config import Columns
from mae_deploy.data.sources.open import labelled_images, split_names, unlabelled_images
from mae_deploy.errors import ConfigError
from mae_deploy.images.read import UnreadableImage

pa = pytest.importorskip("pyarrow", reason="the hf extra is not installed")
pq = pytest.importorskip("pyarrow.parquet", reason="the hf extra is not installed")


def table_of(images: Path, *, label: str = "label", names: list[str] | None = None) -> Any:
    files = sorted(images.rglob("*.png"))
    pixels = pa.array(
        [{"bytes": file.read_bytes(), "path": file.name} for file in files],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    features = {
        "image": {"_type": "Image"},
        label: {"_type": "ClassLabel", "names": names} if names else {"_type": "Value", "dtype": "int64"},
    }
    schema = pa.schema(
        [("image", pixels.type), (label, pa.int64())], {"huggingface": json.dumps({"info": {"features": features}})}
    )
    return pa.table([pixels, pa.array([number % 2 for number in range(len(files))])], schema=schema)


def save_to_disk(table: Any, folder: Path) -> Path:
    """Two Arrow streams and their state, as `Dataset.save_to_disk` leaves them."""
    folder.mkdir(parents=True)
    files = [f"data-0000{part}-of-00002.arrow" for part in range(2)]
    for part, name in enumerate(files):
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table.slice(6 * part, 6), max_chunksize=4)
    (folder / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": name} for name in files], "_indices_files": []})
    )
    return folder


def test_arrow_rows_are_the_files(images: Path, tmp_path: Path) -> None:
    found = unlabelled_images(save_to_disk(table_of(images), tmp_path / "set"))
    files = sorted(images.rglob("*.png"))
    assert [found.raw(index) for index in range(len(found))] == [file.read_bytes() for file in files]
    assert found.key(7) == f"{tmp_path / 'set'}:7/{files[7].name}"
    np.testing.assert_array_equal(np.asarray(found.read(7, 3)), np.asarray(unlabelled_images(images).read(7, 3)))
    assert set(found.labels) == {-1}


def test_labels_have_the_names_of_the_set(images: Path, tmp_path: Path) -> None:
    save_to_disk(table_of(images, names=["cat", "dog"]), tmp_path / "set" / "train")
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    train = labelled_images(tmp_path / "set", "train")
    assert (train.class_names, list(train.labels)[:3]) == (("cat", "dog"), [0, 1, 0])
    assert list(labelled_images(tmp_path / "set", "train", ("dog", "cat")).labels)[:3] == [1, 0, 1]
    with pytest.raises(ConfigError, match="several splits: train"):
        unlabelled_images(tmp_path / "set")


def test_parquet_of_splits(images: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for split, count in (("train", 8), ("validation", 3)):
        pq.write_table(
            table_of(images, label="kind").slice(0, count), tmp_path / "data" / f"{split}-00000-of-00001.parquet"
        )
    assert split_names(tmp_path) == ["train", "val"]
    columns = Columns(label="kind")
    train, val = (labelled_images(tmp_path, split, ("0", "1"), columns) for split in ("train", "val"))
    assert (len(train), len(val), val.class_names) == (8, 3, ("0", "1"))
    assert val.raw(2) == sorted(images.rglob("*.png"))[2].read_bytes()
    assert train.fingerprint() != val.fingerprint()
    with pytest.raises(ConfigError, match="has the columns image, kind") as caught:
        labelled_images(tmp_path, "train")
    assert "--label-column" in str(caught.value.hint)


def test_columns_that_are_not_there_and_labels_in_words(images: Path, tmp_path: Path) -> None:
    pixels = [file.read_bytes() for file in sorted(images.rglob("*.png"))[:3]]
    (tmp_path / "train").mkdir()
    path = tmp_path / "train" / "a.parquet"
    pq.write_table(pa.table({"photo": pixels, "label": ["yak", "cat", None]}), path)
    with pytest.raises(ConfigError, match=r"--image-column picture: .* has the columns photo, label"):
        unlabelled_images(path, Columns("picture"))
    with pytest.raises(ConfigError, match="1 of the 3 images"):
        labelled_images(tmp_path, "train", columns=Columns("photo"))
    pq.write_table(pa.table({"photo": pixels, "label": ["yak", "cat", "cat"]}), path)
    found = labelled_images(tmp_path, "train", columns=Columns("photo"))
    assert (found.class_names, list(found.labels)) == (("cat", "yak"), [1, 0, 0])
    assert found.raw(0) == pixels[0]


def test_rows_that_name_a_file_or_nothing(images: Path, tmp_path: Path) -> None:
    file = sorted(images.rglob("*.png"))[0]
    rows = pa.array(
        [{"bytes": None, "path": str(file)}, {"bytes": None, "path": None}],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    pq.write_table(pa.table({"image": rows}), tmp_path / "a.parquet")
    found = unlabelled_images(tmp_path)
    assert found.raw(0) == file.read_bytes()
    with pytest.raises(UnreadableImage, match=":1: the row is empty"):
        found.raw(1)


def test_files_that_are_broken(images: Path, tmp_path: Path) -> None:
    folder = save_to_disk(table_of(images), tmp_path / "set")
    (folder / "data-00001-of-00002.arrow").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match=r"cannot read .*data-00001"):
        unlabelled_images(folder)
    (folder / "state.json").write_text('{"_data_files": [], "_indices_files": [{"filename": "x"}]}')
    with pytest.raises(ConfigError, match="a selection of rows"):
        unlabelled_images(folder)
