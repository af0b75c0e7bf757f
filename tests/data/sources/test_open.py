"""What DATA stands for: where it may be two things, nothing is guessed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mae_deploy.cli import main
from mae_deploy.data.config import ValidationConfig
from mae_deploy.data.sources.open import beside_splits, labelled_images, labelled_val, split_names, unlabelled_images
from mae_deploy.data.sources.splits import labelled_splits
from mae_deploy.errors import ConfigError
from tests.data.image_folders import write_classes, write_noise
from tests.data.sources.test_tables import pa, pq, table_of
from tests.data.sources.tiny_shards import shards_of, write_shard

# --- two kinds -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["x.tar", "a/x.tar"])
def test_archives_beside_images(images: Path, tmp_path: Path, place: str) -> None:
    shards_of(images, tmp_path / "shards")
    (tmp_path / "shards" / "shard-0.tar").rename(images / place)
    with pytest.raises(ConfigError, match=rf"two kinds .*: 11 images \(a/00.png, …\) and 1 tar archive \({place}, …\)"):
        unlabelled_images(images)
    assert len(unlabelled_images(images / place)) == len(unlabelled_images(f"{(images / place).parent}/*.tar")) == 4
    assert len(unlabelled_images(images / "b")) == 4


def test_a_table_beside_images(images: Path) -> None:
    pq.write_table(pa.table({"file_name": ["00.png"], "caption": ["noise"]}), images / "metadata.parquet")
    with pytest.raises(ConfigError, match=r"11 images \(a/00.png, …\) and 1 table \(metadata.parquet, …\)"):
        unlabelled_images(images)
    (images / "metadata.parquet").rename(images / ".metadata.parquet")
    assert len(unlabelled_images(images)) == 11


def test_a_table_that_names_the_images_beside_it(images: Path) -> None:
    rows = pa.array(
        [{"bytes": None, "path": f"a/{number:02d}.png"} for number in range(3)],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    pq.write_table(pa.table({"image": rows}), images / "some.parquet")
    found = unlabelled_images(images)
    assert (len(found), found.raw(2)) == (3, (images / "a" / "02.png").read_bytes())


def test_shards_beside_class_folders(images: Path, tmp_path: Path) -> None:
    root = write_classes(tmp_path / "set")
    shards_of(images, tmp_path / "shards", labelled=True)
    (tmp_path / "shards" / "shard-0.tar").rename(root / "train-0.tar")
    with pytest.raises(ConfigError, match=r"train twice: 1 tar archive in .*train-\*.tar and 12 images in the f"):
        labelled_images(root, "train")
    (root / "train-0.tar").rename(root / "train" / "0.tar")
    with pytest.raises(ConfigError, match="holds its train twice"):
        labelled_images(root, "train")
    (root / "train" / "0.tar").unlink()
    (root / "valid").mkdir()
    assert len(labelled_images(root, "val")) == 6  # an empty folder is none
    write_noise(root / "valid" / "dark", 1)
    with pytest.raises(ConfigError, match=r"holds its val twice: 6 images in the folders of .*val and 1 image in"):
        labelled_images(root, "val")
    assert len(labelled_images(root, "valid", exact=True)) == 1


# --- splits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["val", "validation", "valid"])
def test_names_of_the_validation_split(tmp_path: Path, name: str) -> None:
    write_classes(tmp_path)
    (tmp_path / "val").rename(tmp_path / name)
    assert len(labelled_images(tmp_path, "val", ("dark", "light"))) == 6
    assert len(labelled_val(tmp_path, None)) == len(labelled_val(tmp_path / name, None)) == 6
    assert split_names(tmp_path) == ["train", "val"]
    assert beside_splits(tmp_path, ["train", "val"]) == []


def test_the_folders_that_are_there_are_listed(tmp_path: Path) -> None:
    write_classes(tmp_path)
    (tmp_path / "val").rename(tmp_path / "test")
    (tmp_path / "README.md").touch()
    with pytest.raises(ConfigError, match=r"no val in .*, where there is: test/, train/, README.md$") as caught:
        labelled_images(tmp_path, "val")
    assert str(caught.value.hint).startswith("name it with --val-split")
    assert len(labelled_val(tmp_path, None, "test")) == 6
    with pytest.raises(ConfigError, match=r"no val in .*, where there is: test/"):
        labelled_val(tmp_path, None)
    assert beside_splits(tmp_path, ["train", "val"]) == ["test"]


@pytest.mark.parametrize("name", ["val-disere", "train", "val"])
def test_class_folders_that_are_called_like_a_split(tmp_path: Path, name: str) -> None:
    for known in ("aosta", name):
        write_noise(tmp_path / "val" / known, 2)
    found = labelled_val(tmp_path / "val", None)
    assert (found.class_names, list(found.labels)) == (("aosta", name), [0, 0, 1, 1])


# --- odd folders -----------------------------------------------------------------------------------------------------


def test_classes_without_images_are_left_out(tmp_path: Path) -> None:
    write_classes(tmp_path)
    for empty in ("train/empty", "train/__MACOSX", "val/only-text"):
        (tmp_path / empty).mkdir()
    (tmp_path / "train" / "__MACOSX" / "._dark").touch()
    (tmp_path / "val" / "only-text" / "notes.txt").touch()
    train = labelled_images(tmp_path, "train")
    assert train.class_names == ("dark", "light")
    assert train.left_out.counts == {"class folders without images": 2}
    val = labelled_images(tmp_path, "val", train.class_names)
    assert val.left_out.counts == {".txt": 1, "class folders without images": 1}


def test_a_class_in_two_spellings(tmp_path: Path) -> None:
    """é as one character, and as macOS writes it."""
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    write_noise(tmp_path / "train" / composed, 2)
    write_noise(tmp_path / "train" / "bar", 1)
    write_noise(tmp_path / "val" / decomposed, 2)
    train = labelled_images(tmp_path, "train")
    assert train.class_names == ("bar", composed)
    val = labelled_images(tmp_path, "val", train.class_names)
    assert (list(val.labels), val.class_names) == ([1, 1], train.class_names)
    write_noise(tmp_path / "train" / decomposed, 3)
    both = labelled_images(tmp_path, "train")
    assert both.class_names is not None
    assert (len(both.class_names), sorted(both.labels)) == (2, [0, 1, 1, 1, 1, 1])


def test_files_that_are_no_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, hint in (("photos.zip", "unpack it"), ("list.txt", "give the folder of images")):
        (tmp_path / name).write_text("a.jpg")
        assert main(["pretrain", str(tmp_path / name), "--out", str(tmp_path / "run")]) == 2
        error = capsys.readouterr().err
        assert f"{tmp_path / name} is no image, no tar file and no table: {name[-4:]}" in error
        assert hint in error
        assert not (tmp_path / "run").exists()


def test_the_layout_of_the_hugging_face_hub(images: Path, tmp_path: Path) -> None:
    root = tmp_path / "hub"
    (root / "data").mkdir(parents=True)
    (root / "README.md").touch()
    for split, first, count in (("train", 0, 8), ("test", 8, 3)):
        pq.write_table(table_of(images).slice(first, count), root / "data" / f"{split}-00000-of-00001.parquet")
    found = unlabelled_images(root)
    assert sorted(found.raw(index) for index in range(len(found))) == sorted(
        path.read_bytes() for path in images.rglob("*.png")
    )
    assert found.left_out.counts == {".md": 1}
    assert beside_splits(root, ["train", "val"]) == ["data/test-00000-of-00001.parquet"]
    with pytest.raises(ConfigError, match=r"no val in .*: data/test-00000-of-00001.parquet, data/train-.*, README.md"):
        labelled_images(root, "val")
    assert len(labelled_images(root, "train")) == 8
    assert len(labelled_val(root, None, "test")) == 3


def test_shards_below_shards_are_said(images: Path, tmp_path: Path) -> None:
    shards = shards_of(images, tmp_path / "shards")
    shards_of(images, shards / "more")
    found = unlabelled_images(shards)
    assert (len(found), found.left_out.counts) == (11, {".tar below": 3})


def test_a_split_may_be_one_file(images: Path, tmp_path: Path) -> None:
    for split, count in (("train", 7), ("val", 4)):
        pq.write_table(table_of(images).slice(0, count), tmp_path / f"{split}.parquet")
        assert len(labelled_images(tmp_path, split)) == count
    assert len(labelled_val(tmp_path / "val.parquet", None)) == len(labelled_val(tmp_path, None)) == 4
    tars, files = tmp_path / "tars", sorted(images.rglob("*.png"))
    for split in ("train", "val"):
        members = [(f"{number % 2}/{file.name}", file.read_bytes()) for number, file in enumerate(files)]
        write_shard(tars / f"{split}.tar", members)
    assert labelled_images(tars, "train").class_names == labelled_val(tars / "val.tar", None).class_names == ("0", "1")


@pytest.mark.parametrize("names", [("training", "validation"), ("training", "valid")])
def test_other_names_of_splits(tmp_path: Path, names: tuple[str, str]) -> None:
    for split, name in zip(("train", "val"), names, strict=True):
        write_noise(tmp_path / name / "a", 2)
        write_noise(tmp_path / name / "b", 2)
        assert len(labelled_images(tmp_path, split)) == 4
    write_noise(tmp_path / "testing" / "a", 2)
    assert split_names(tmp_path) == ["train", "val", "test"]


def test_splits_one_folder_deeper_are_pointed_at(tmp_path: Path) -> None:
    write_classes(tmp_path / "dataset")
    with pytest.raises(ConfigError, match="no train in") as caught:
        labelled_images(tmp_path, "train")
    assert caught.value.hint == f"there is a train in {tmp_path / 'dataset'}: give that folder"


@pytest.mark.parametrize(("name", "hint"), [("a.zip", "unpack it"), ("list.txt", "give the folder of images")])
def test_labelled_data_is_no_file(tmp_path: Path, name: str, hint: str) -> None:
    (tmp_path / name).touch()
    calls: list[Callable[[], object]] = [
        lambda: labelled_images(tmp_path / name, "train"),
        lambda: labelled_val(tmp_path / name, None),
    ]
    for call in calls:
        with pytest.raises(ConfigError, match=rf"{name} is a file; labelled data is a folder") as caught:
            call()
        assert hint in str(caught.value.hint)
    with pytest.raises(ConfigError, match="nowhere is not there"):
        labelled_images(tmp_path / "nowhere", "train")


def test_links_among_class_folders(tmp_path: Path) -> None:
    write_classes(tmp_path)
    (tmp_path / "train" / "up").symlink_to(tmp_path)
    (tmp_path / "train" / "here").symlink_to(tmp_path / "train")
    found = labelled_images(tmp_path, "train")
    assert (found.class_names, len(found)) == (("dark", "light"), 12)
    assert found.left_out.counts == {"links to folders above": 2}
    (tmp_path / "train" / "night").symlink_to(tmp_path / "train" / "dark")
    with pytest.raises(ConfigError, match=r"dark and .*night are the same folder, but two classes"):
        labelled_images(tmp_path, "train")


def test_files_beside_class_folders_are_counted(tmp_path: Path) -> None:
    write_classes(tmp_path)
    write_noise(tmp_path / "train", 2)
    (tmp_path / "train" / "labels.csv").touch()
    assert labelled_images(tmp_path, "train").left_out.counts == {"images in no class folder": 2, ".csv": 1}


@pytest.mark.parametrize("locked", [".", "train", "train/dark"])
def test_a_folder_that_may_not_be_read_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locked: str
) -> None:
    write_classes(tmp_path)
    stat, scandir, listdir = os.stat, os.scandir, os.listdir
    folder = tmp_path / locked

    def refusing(call: Callable[..., Any], *, itself: bool) -> Callable[..., Any]:
        """As for any user but root: a locked folder can be seen, and nothing in it."""

        def checked(path: Any = ".", *arguments: Any, **options: Any) -> Any:
            if isinstance(path, (str, Path)) and (folder in Path(path).parents or (itself and Path(path) == folder)):
                raise PermissionError(13, "Permission denied", str(path))
            return call(path, *arguments, **options)

        return checked

    monkeypatch.setattr(os, "stat", refusing(stat, itself=False))
    monkeypatch.setattr(os, "scandir", refusing(scandir, itself=True))
    monkeypatch.setattr(os, "listdir", refusing(listdir, itself=True))
    calls: list[Callable[[], object]] = [
        lambda: unlabelled_images(tmp_path),
        lambda: labelled_images(tmp_path, "train"),
        lambda: labelled_val(tmp_path / "train", None),
        lambda: labelled_splits(tmp_path, ValidationConfig(), seed=0),
    ]
    for call in calls:
        with pytest.raises(ConfigError, match=rf"^cannot read the folder {folder}: Permission denied"):
            call()


# --- files -----------------------------------------------------------------------------------------------------------


def test_parts_that_are_missing_are_said(images: Path, tmp_path: Path) -> None:
    for part in (0, 3):
        pq.write_table(table_of(images).slice(part, 2), tmp_path / f"train-0000{part}-of-00004.parquet")
    found = labelled_images(tmp_path, "train")
    assert (len(found), found.left_out.counts) == (4, {"missing parts": 2})
    assert "such as train-00001-of-00004.parquet" in str(found.left_out)
    members = [("0.png", next(images.rglob("*.png")).read_bytes())]
    write_shard(tmp_path / "tars" / "a-000-of-002.tar", members)
    assert unlabelled_images(tmp_path / "tars").left_out.counts == {"missing parts": 1}
    write_shard(tmp_path / "tars" / "a-001-of-002.tar", members)
    assert not unlabelled_images(tmp_path / "tars").left_out
    assert not unlabelled_images(tmp_path / "tars" / "a-000-of-002.tar").left_out  # chosen, and the other is there


def test_every_table_has_the_columns(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tables"
    folder.mkdir()
    pq.write_table(table_of(images), folder / "a.parquet")
    pq.write_table(table_of(images).rename_columns(["photo", "label"]), folder / "b.parquet")
    with pytest.raises(ConfigError, match=r"b.parquet has the columns photo, label, and not image, as a.parquet has"):
        unlabelled_images(folder)


def test_suffixes_in_capitals(images: Path, tmp_path: Path) -> None:
    members = [(f"{number % 2}/{number}.PNG", file.read_bytes()) for number, file in enumerate(images.rglob("*.png"))]
    write_shard(tmp_path / "tars" / "TRAIN.TAR", members)
    assert len(unlabelled_images(tmp_path / "tars" / "TRAIN.TAR")) == len(unlabelled_images(tmp_path / "tars")) == 11
    write_shard(tmp_path / "set" / "train" / "A.TAR", members)
    pq.write_table(table_of(images), tmp_path / "A.PARQUET")
    assert len(labelled_images(tmp_path / "set", "train")) == len(unlabelled_images(tmp_path / "A.PARQUET")) == 11


def test_what_lies_in_class_folders_beside_images_is_counted(images: Path, tmp_path: Path) -> None:
    write_classes(tmp_path)
    write_shard(tmp_path / "train" / "dark" / "more.tar", [("0.png", next(images.rglob("*.png")).read_bytes())])
    np.save(tmp_path / "train" / "light" / "mask.npy", np.zeros((2, 2), np.uint8))
    assert labelled_images(tmp_path, "train").left_out.counts == {".tar": 1, ".npy": 1}


def test_shards_without_images_are_said(images: Path, tmp_path: Path) -> None:
    write_shard(tmp_path / "tars" / "a.tar", [])
    write_shard(tmp_path / "tars" / "b.tar", [("0.png", next(images.rglob("*.png")).read_bytes())])
    assert unlabelled_images(tmp_path / "tars").left_out.counts == {"shards without images": 1}


@pytest.mark.parametrize("kind", ["folder", "shards", "tables", "tar", "table"])
def test_a_share_of_data_without_splits(images: Path, tmp_path: Path, kind: str) -> None:
    data = tmp_path / "set"
    data.mkdir()
    files = sorted(images.rglob("*.png"))
    for number, file in enumerate(files):
        if kind == "folder":
            (data / str(number % 2)).mkdir(exist_ok=True)
            (data / str(number % 2) / file.name).write_bytes(file.read_bytes())
    if kind in ("shards", "tar"):
        members = [(f"{number % 2}/{file.name}", file.read_bytes()) for number, file in enumerate(files)]
        write_shard(data / "a.tar", members)
    if kind in ("tables", "table"):
        pq.write_table(table_of(images), data / "a.parquet")
    given = {"tar": data / "a.tar", "table": data / "a.parquet"}.get(kind, data)
    train, val = labelled_splits(given, ValidationConfig(val_share=0.4), seed=0)
    assert (len(train), len(val), train.class_names) == (7, 4, ("0", "1"))
