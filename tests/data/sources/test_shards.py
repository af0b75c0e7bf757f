"""Local shards are read at random: the stream is a folder's, to the pixel; what is broken or missing is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mae_deploy.data.config import CropConfig
from mae_deploy.data.dataset import Batch, ImageDataset
from mae_deploy.data.order import RunSlice
from mae_deploy.data.sources.base import ImageSource, Joined
from mae_deploy.data.sources.open import labelled_images, unlabelled_images
from mae_deploy.data.sources.patterns import is_shards, is_streamed, local_shards
from mae_deploy.data.sources.shards import INDEX, scan, shard_images
from mae_deploy.data.transforms import train_transform
from mae_deploy.errors import ConfigError
from mae_deploy.images.preprocess import default_preprocess
from mae_deploy.images.read import UnreadableImage
from tests.data.sources.tiny_shards import shards_of, write_shard


def batches(images: ImageSource, where: RunSlice) -> list[Batch]:
    dataset = ImageDataset(
        images, train_transform(default_preprocess((10, 15)), CropConfig()), seed=3, replace_unreadable=True
    )
    return list(dataset.stream(where, seed=5, num_workers=0, pin_memory=False))


def write_index(folder: Path) -> None:
    index = {"format": 1, "images": 11, "shards": [scan(path).entry() for path in sorted(folder.glob("*.tar"))]}
    (folder / INDEX).write_text(json.dumps(index))


def png(images: Path, number: int = 0) -> bytes:
    return sorted(images.rglob("*.png"))[number].read_bytes()


# --- the stream ------------------------------------------------------------------------------------------------------


def test_shards_give_what_the_folder_gives(images: Path, tmp_path: Path) -> None:
    shards = shards_of(images, tmp_path / "shards")
    whole = RunSlice(3, 3, 0, 6)
    folder, packed = batches(unlabelled_images(images), whole), batches(unlabelled_images(shards), whole)
    assert all(torch.equal(a.images, b.images) for a, b in zip(folder, packed, strict=True))
    assert packed[0].names[0].startswith(str(shards / "shard-"))
    resumed = batches(unlabelled_images(str(shards / "shard-{0..2}.tar")), RunSlice(3, 3, 4, 6))
    assert all(torch.equal(a.images, b.images) for a, b in zip(resumed, packed[4:], strict=True))


def test_two_processes_share_what_one_sees(images: Path, tmp_path: Path) -> None:
    found = unlabelled_images(shards_of(images, tmp_path / "shards"))
    alone = batches(found, RunSlice(4, 2, 1, 4))
    shares = [batches(found, RunSlice(2, 2, 1, 4, rank, 2)) for rank in range(2)]
    for batch, *halves in zip(alone, *shares, strict=True):
        assert torch.equal(batch.images, torch.cat([half.images for half in halves]))


def test_the_index_says_what_the_headers_say(images: Path, tmp_path: Path) -> None:
    shards = shards_of(images, tmp_path / "shards", labelled=True)
    scanned = shard_images(str(shards))
    write_index(shards)
    indexed = shard_images(str(shards))
    assert indexed.fingerprint() == scanned.fingerprint()
    assert (
        [indexed.raw(i) for i in range(11)]
        == [scanned.raw(i) for i in range(11)]
        == [png(images, i) for i in range(11)]
    )
    assert list(indexed.labels) == list(scanned.labels) == [number % 3 for number in range(11)]


def test_the_fingerprint_sees_every_member(images: Path, tmp_path: Path) -> None:
    before = shard_images(str(shards_of(images, tmp_path / "a"))).fingerprint()
    assert shard_images(str(shards_of(images, tmp_path / "b"))).fingerprint() == before
    assert shard_images(str(shards_of(images, tmp_path / "c", per_shard=5))).fingerprint() != before
    assert shard_images(str(shards_of(images, tmp_path / "d", labelled=True))).fingerprint() != before


def test_joined_sources_follow_one_another(images: Path, tmp_path: Path) -> None:
    shards = unlabelled_images(shards_of(images, tmp_path / "shards"))
    both = Joined(unlabelled_images(images), shards)
    assert len(both) == 22
    assert both.key(0).endswith("a/00.png")
    assert both.key(11) == shards.key(0)
    assert both.raw(21) == png(images, 10)
    assert both.fingerprint()["images"] == 22


# --- what is broken --------------------------------------------------------------------------------------------------


def test_a_broken_member_is_named_and_replaced(images: Path, tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", [("0.png", png(images)[:60]), ("1.png", b""), ("2.png", png(images, 2))])
    found = unlabelled_images(shard)
    (batch,) = batches(found, RunSlice(3, 1, 0, 1))
    assert len(batch.images) == 3
    assert {line.partition(": ")[0] for line in batch.unreadable} == {f"{shard}/0.png", f"{shard}/1.png"}
    assert f"{shard}/1.png: the file is empty" in batch.unreadable


def test_a_shard_that_is_cut_short(images: Path, tmp_path: Path) -> None:
    shards = shards_of(images, tmp_path / "shards")
    cut = shards / "shard-1.tar"
    with cut.open("r+b") as file:
        file.truncate(scan(cut).offsets[2] + 10)
    with pytest.raises(ConfigError, match=r"shard-1.tar ends after [23] images in the middle"):
        unlabelled_images(shards)
    cut.write_bytes(b"no tar at all" * 100)
    with pytest.raises(ConfigError, match=r"shard-1.tar ends in the middle, or is not a tar file"):
        unlabelled_images(shards)


def test_a_shard_that_changed_since_it_was_indexed(images: Path, tmp_path: Path) -> None:
    shards = shards_of(images, tmp_path / "shards")
    write_index(shards)
    found = shard_images(str(shards))
    with (shards / "shard-2.tar").open("r+b") as file:
        file.truncate(700)
    with pytest.raises(UnreadableImage, match=r"shard-2.tar/0008.png: the shard is cut short"):
        found.raw(8)
    with pytest.raises(ConfigError, match=r"shard-2.tar has 700 bytes, not the \d+ of index.json"):
        shard_images(str(shards))
    (shards / INDEX).write_text("{}")
    with pytest.raises(ConfigError, match="not an index of shards"):
        shard_images(str(shards))


def test_shards_without_images(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", [("0.txt", b"words")])
    with pytest.raises(ConfigError, match=r"no images in the 1 shard"):
        unlabelled_images(tmp_path)


# --- labels ----------------------------------------------------------------------------------------------------------


def test_labels_are_numbers_or_folders(images: Path, tmp_path: Path) -> None:
    shards_of(images, tmp_path / "numbers" / "train", labelled=True)
    numbers = labelled_images(tmp_path / "numbers", "train")
    assert (numbers.class_names, list(numbers.labels)[:4]) == (("0", "1", "2"), [0, 1, 2, 0])
    (tmp_path / "numbers" / "classes.json").write_text('["cat", "dog", "emu", "yak"]')
    named = labelled_images(tmp_path / "numbers", "train")
    assert named.class_names == ("cat", "dog", "emu", "yak")
    assert list(labelled_images(tmp_path / "numbers", "train", ("yak", "emu", "dog", "cat")).labels)[:4] == [3, 2, 1, 3]
    with pytest.raises(ConfigError, match=r"class dog of .* is not one of the 2 classes: cat, emu"):
        labelled_images(tmp_path / "numbers", "train", ("cat", "emu"))

    write_shard(tmp_path / "folders" / "val-0.tar", [("b/0.png", png(images)), ("a/0.png", png(images, 1))])
    folders = labelled_images(tmp_path / "folders", "val")
    assert (folders.class_names, list(folders.labels)) == (("a", "b"), [1, 0])


def test_labels_that_are_missing_or_wrong(images: Path, tmp_path: Path) -> None:
    shard = tmp_path / "train" / "a.tar"
    write_shard(shard, [("0.png", png(images))])
    with pytest.raises(ConfigError, match="have no labels"):
        labelled_images(tmp_path, "train")
    write_shard(shard, [("0.png", png(images)), ("0.cls", b"1"), ("1.png", png(images))])
    with pytest.raises(ConfigError, match=r"1 of the 2 images .* have no label"):
        labelled_images(tmp_path, "train")
    write_shard(shard, [("0.png", png(images)), ("0.cls", b"cat")])
    with pytest.raises(ConfigError, match="holds b'cat', not the number of a class"):
        labelled_images(tmp_path, "train")
    (tmp_path / "train" / "classes.json").write_text('["cat"]')
    write_shard(shard, [("0.png", png(images)), ("0.cls", b"1")])
    with pytest.raises(ConfigError, match="label 1, but there are 1 classes"):
        labelled_images(tmp_path, "train")


# --- names -----------------------------------------------------------------------------------------------------------


def test_patterns(tmp_path: Path) -> None:
    for number in range(3):
        write_shard(tmp_path / f"s-{number:02d}.tar", [])
    names = [f"s-{number:02d}.tar" for number in range(3)]
    for pattern in (
        f"{tmp_path}",
        f"{tmp_path}/s-{{00..02}}.tar",
        f"{tmp_path}/s-*.tar",
        f"{tmp_path}/{{s-00,s-0[12]}}.tar",
    ):
        assert is_shards(pattern)
        assert [path.name for path in local_shards(pattern)] == names
    with pytest.raises(ConfigError, match=r"no such shard: .*s-03.tar"):
        local_shards(f"{tmp_path}/s-{{00..03}}.tar")
    with pytest.raises(ConfigError, match=r"no such shard: .*t-\*.tar"):
        local_shards(f"{tmp_path}/t-*.tar")
    write_shard(tmp_path / ".partial-7-s-03.tar", [])
    assert [path.name for path in local_shards(str(tmp_path))] == names
    assert not is_shards(str(tmp_path.parent))


def test_shards_below_a_folder(images: Path, tmp_path: Path) -> None:
    shards_of(images, tmp_path / "set" / "train")
    shards_of(images, tmp_path / "set" / "val")
    assert len(unlabelled_images(tmp_path / "set")) == 22


@pytest.mark.parametrize("data", ["https://host/s-{000..099}.tar", "pipe:cat s.tar", "set.tar.gz", "s3://bucket/s.tar"])
def test_what_can_only_be_streamed(data: str) -> None:
    assert is_streamed(data)
    with pytest.raises(ConfigError, match="only be read from front to back"):
        unlabelled_images(data)


@pytest.mark.parametrize("data", ["photos", "C:/photos", "s-{0..1}.tar", "/data/a b/s.tar"])
def test_what_is_local(data: str) -> None:
    assert not is_streamed(data)
