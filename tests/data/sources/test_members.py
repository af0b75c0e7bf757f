"""Members of tar files as other programs call them: every image is one, whatever dots are in its name."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from mae_deploy.cli import main
from mae_deploy.commands.data.config import PackConfig
from mae_deploy.commands.data.pack import run_pack
from mae_deploy.data.config import CropConfig, DataConfig
from mae_deploy.data.order import RunSlice
from mae_deploy.data.sources.members import TWICE, arrays_beside, clean_name, kind_of, label_of
from mae_deploy.data.sources.open import labelled_images, unlabelled_images
from mae_deploy.data.sources.shards import scan
from mae_deploy.data.sources.streamed import _TWICE_USED
from mae_deploy.data.training_set import open_training
from mae_deploy.data.transforms import train_transform
from mae_deploy.images.left_out import LeftOut
from mae_deploy.images.preprocess import default_preprocess
from tests.data.sources.tiny_shards import Member, write_shard


def pngs(images: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(images.rglob("*.png"))]


def streamed(shard: Path, images: int) -> list[tuple[str, int]]:
    """Names and labels of one pass over a stream."""
    config = DataConfig(epoch_images=images, shuffle_buffer=1, num_workers=0)
    stream = open_training(
        f"pipe:cat {shard}", train_transform(default_preprocess((10, 15)), CropConfig()), config, seed=3
    )
    batches = stream.stream(RunSlice(1, images, 0, images), seed=5, num_workers=0, pin_memory=False)
    return [
        (name.partition(f"{shard}/")[2], label)
        for batch in batches
        for name, label in zip(batch.names, batch.labels.tolist(), strict=True)
    ]


def test_dots_in_names(images: Path, tmp_path: Path) -> None:
    """Eleven scans of one date, each with its label."""
    members: list[Member] = []
    for number, content in enumerate(pngs(images)):
        members += [(f"scan.2023.{number:03d}.png", content), (f"scan.2023.{number:03d}.cls", f"{number % 3}".encode())]
    shard = write_shard(tmp_path / "set" / "train" / "a.tar", members)
    names = [f"scan.2023.{number:03d}.png" for number in range(11)]
    assert scan(shard).names == names
    found = labelled_images(tmp_path / "set", "train")
    assert [found.raw(index) for index in range(11)] == pngs(images)
    assert list(found.labels) == [number % 3 for number in range(11)]
    assert streamed(shard, 11) == list(zip(names, found.labels, strict=True))
    packed = run_pack(PackConfig(source=str(shard), out=tmp_path / "packed", num_workers=0))
    assert packed["images"] == 11


def test_more_images_of_one_stem_than_a_stream_holds(images: Path, tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", [(f"scan.{number:03d}.png", pngs(images)[0]) for number in range(150)])
    assert [name for name, _ in streamed(shard, 150)] == scan(shard).names == [f"scan.{n:03d}.png" for n in range(150)]


def test_images_that_share_a_label(images: Path, tmp_path: Path) -> None:
    left, right, own, other = pngs(images)[:4]
    shard = write_shard(
        tmp_path / "train" / "a.tar",
        [
            ("a.left.png", left),
            ("a.right.png", right),
            ("a.cls", b"1"),
            ("a.right.cls", b"2"),
            ("b.png", own),
            ("b.png.cls", b"0"),
            ("c.x.y.png", other),
            ("c.cls", b"1"),
        ],
    )
    found = labelled_images(tmp_path, "train")
    assert list(found.labels) == [1, 2, 0, 1]
    assert streamed(shard, 4) == [("a.left.png", 1), ("a.right.png", 2), ("b.png", 0), ("c.x.y.png", 1)]


def test_hidden_members_of_macs_are_no_images(images: Path, tmp_path: Path) -> None:
    content = pngs(images)
    shard = write_shard(
        tmp_path / "train" / "a.tar",
        [
            ("./cat/._0.png", b"Mac OS X"),
            ("./cat/0.png", content[0]),
            ("__MACOSX/cat/._0.png", b""),
            ("./dog/0.png", content[1]),
            ("./dog/._0.cls", b"Mac OS X"),
            (".Trash/1.png", content[2]),
        ],
    )
    found = labelled_images(tmp_path, "train")
    assert (found.class_names, list(found.labels)) == (("cat", "dog"), [0, 1])
    assert found.left_out.counts == {"hidden": 4}
    assert [name for name, _ in streamed(shard, 2)] == ["cat/0.png", "dog/0.png"]


def test_of_a_name_that_comes_twice_the_last_counts(images: Path, tmp_path: Path) -> None:
    first, second, other = pngs(images)[:3]
    shard = write_shard(tmp_path / "a.tar", [("0.png", first), ("1.png", other), ("./0.png", second)])
    found = unlabelled_images(shard)
    assert [found.raw(index) for index in range(len(found))] == [second, other]
    assert found.left_out.counts == {"that came before under the same name": 1}
    unpacked = tmp_path / "unpacked"
    with tarfile.open(shard) as tar:
        tar.extractall(unpacked, filter="data")
    assert (unpacked / "0.png").read_bytes() == second


def test_what_is_no_image_is_counted(images: Path, tmp_path: Path) -> None:
    content = pngs(images)[0]
    path = write_shard(
        tmp_path / "a.tar",
        [("0.png", content), ("0.npy", b""), ("0.json", b"{}"), ("1.json", b"{}"), ("2.heic", b""), ("README", b"")],
    )
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("1.png")
        link.type, link.linkname = tarfile.SYMTYPE, "0.png"
        tar.addfile(link, io.BytesIO())
    found = unlabelled_images(path)
    assert len(found) == 1
    assert found.left_out.counts == {
        ".json": 2,
        ".heic (pip install pillow-heif)": 1,
        "without a suffix": 1,
        "links or sparse files": 1,
        "arrays beside images": 1,
    }


def test_a_stream_counts_what_it_leaves_out(images: Path, tmp_path: Path) -> None:
    content = pngs(images)[0]
    members = [("0.png", content), ("0.npy", b""), ("0.json", b"{}"), ("0.png", content), ("._0.png", b"")]
    path = write_shard(tmp_path / "a.tar", [*members, ("1.png", content), ("0.png", content), ("1.json", b"{}")])
    config = DataConfig(epoch_images=3, shuffle_buffer=1, num_workers=0)
    transform = train_transform(default_preprocess((10, 15)), CropConfig())
    stream = open_training(f"pipe:cat {path}", transform, config, seed=3)
    found = LeftOut()
    for batch in stream.stream(RunSlice(3, 1, 0, 2), seed=5, num_workers=0, pin_memory=False):
        assert batch.left_out is not None
        found.merge(batch.left_out)
    assert found.counts.keys() == {".json", "hidden", "arrays beside images", TWICE, _TWICE_USED}
    assert all(count >= 1 for count in found.counts.values())
    assert "such as 0.json" in str(found)


def test_what_a_stream_leaves_out_is_said_by_training(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    members = [(f"{number}.png", content) for number, content in enumerate(pngs(images))]
    path = write_shard(tmp_path / "a.tar", [*members, ("x.json", b"{}"), ("y.json", b"{}")])
    settings = ["--model", "vit_nano_patch4", "--image-size", "32", "--decoder-depth", "1", "--decoder-embed-dim", "32"]
    run = ["--epochs", "2", "--batch-size", "5", "--num-workers", "0", "--device", "cpu", "--epoch-images", "10"]
    command = ["pretrain", f"pipe:cat {path}", "--out", str(tmp_path / "run"), *settings, *run, "--shuffle-buffer", "1"]
    assert main([*command, "--json"]) == 0
    said = capsys.readouterr()
    assert said.err.count("left out") == 1
    assert ".json such as x.json" in said.err
    assert json.loads(said.out)["left_out"][".json"] >= 2


def test_the_fingerprint_of_ordinary_shards_is_that_of_the_first_version(images: Path, tmp_path: Path) -> None:
    """So that a run goes on: the names as they stand, of one image for each stem."""
    members = [(f"./{number}.png", f"{number}".encode()) for number in range(3)]
    found = unlabelled_images(write_shard(tmp_path / "a.tar", [*members, ("./0.txt", b"words")]))
    assert found.fingerprint() == {
        "images": 3,
        "sha256": "3090ee7a086490081c7710f305f24861796d0da6399817363f755157cc80a040",
    }


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a/0.JPG", "image"), ("a/0.CLS", "label"), ("a/.0.jpg", "hidden"), ("a/b.jpg/c", "other"), ("0.npy", "image")],
)
def test_kinds(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_names() -> None:
    assert [clean_name(name) for name in ("./a.jpg", "a//b.jpg", "a/./b.jpg")] == ["a.jpg", "a/b.jpg", "a/b.jpg"]
    labels = {"a.b/0": 1, "a.b/0.x": 2, "a": 3, "": 4}
    assert [label_of(name, labels) for name in ("a.b/0.x.jpg", "a.b/0.y.jpg", "a.b/1.jpg", "a.jpg")] == [2, 1, -1, 3]
    assert arrays_beside(["0.jpg", "0.npy", "0.seg.npy", "1.npy"]) == {"0.npy", "0.seg.npy"}
