"""`mae-deploy data`: statistics against hand-made images, shards against the files that they were packed from."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mae_deploy.cli import main
from mae_deploy.commands.data import pack as data_pack
from mae_deploy.commands.data.config import PackConfig, StatsConfig
from mae_deploy.commands.data.stats import run_stats
from mae_deploy.data.sources.open import labelled_images, unlabelled_images
from mae_deploy.data.sources.shards import scan
from mae_deploy.errors import CheckFailed, ConfigError
from mae_deploy.files import sha256, write_json
from tests.data.image_folders import SIZE, spoil, write_classes, write_noise
from tests.data.sources.test_tables import pa, pq


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Eleven readable images in two folders."""
    root = tmp_path / "images"
    write_noise(root / "a", 7)
    write_noise(root / "b", 4, first=7)
    return root


def pack(source: Path, out: Path, **settings: Any) -> dict[str, Any]:
    return data_pack.run_pack(
        PackConfig(source=str(source), out=out, **{"num_workers": 0, "shard_images": 4, **settings})
    )


def texture(seed: int) -> Image.Image:
    """Smooth enough to look the same when it is made smaller."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((70, 60), Image.Resampling.BICUBIC)


# --- stats -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
def test_statistics_of_every_channel(tmp_path: Path, num_workers: int) -> None:
    """Two images that count the same, though one is larger."""
    Image.fromarray(np.full((3, 5, 3), (0, 51, 255), np.uint8)).save(tmp_path / "a.png")
    Image.fromarray(np.full((7, 11, 3), (255, 51, 0), np.uint8)).save(tmp_path / "b.png")
    Image.fromarray(np.full((7, 11, 3), (255, 51, 0), np.uint8)).save(tmp_path / "c.bmp")
    Image.fromarray(np.full((3, 5, 3), (0, 51, 255), np.uint8)).save(tmp_path / "d.png")
    write_noise(tmp_path / "broken", 1)
    spoil(tmp_path / "broken" / "00.png")
    data = run_stats(StatsConfig(data=str(tmp_path), num_workers=num_workers)).data
    assert (data["mean"], data["std"]) == ([0.5, 0.2, 0.5], [0.5, 0.0, 0.5])
    assert (data["flags"], data["constant"]) == ("--mean 0.5,0.2,0.5 --std 0.5,1,0.5", [1])
    assert (data["images"], data["read"], data["formats"]) == (5, 5, {"PNG RGB": 3, "BMP RGB": 1})
    assert (data["width"], data["height"], data["short_side"]) == ([5, 8, 11], [3, 5, 7], [3, 5, 7])
    assert (data["duplicates"], data["unreadable"]) == (2, 1)
    assert data["duplicates_listed"] == [f"{tmp_path}/c.bmp = {tmp_path}/b.png", f"{tmp_path}/d.png = {tmp_path}/a.png"]
    assert data["unreadable_listed"][0].startswith(f"{tmp_path}/broken/00.png: ")


def test_statistics_of_a_sample_and_of_arrays(images: Path, tmp_path: Path) -> None:
    data = run_stats(StatsConfig(data=str(images), sample=3, num_workers=0)).data
    assert (data["images"], data["read"], sum(data["formats"].values())) == (11, 3, 3)
    np.save(
        tmp_path / "a.npy",
        np.stack([np.full((5, 3), value, np.uint16) for value in (0, 1000, 5000, 10000, 2500)], axis=2),
    )
    data = run_stats(StatsConfig(data=str(tmp_path / "a.npy"), in_chans=5, pixel_max=10000.0, num_workers=0)).data
    assert (data["mean"], data["formats"]) == ([0.0, 0.1, 0.5, 1.0, 0.25], {"NPY": 1})


def test_narrow_channels_keep_their_digits_and_constant_ones_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    pixels = np.stack([np.full((40, 50), 0.7), 0.3 + 1e-6 * rng.random((40, 50)), rng.random((40, 50))], axis=2)
    np.save(tmp_path / "a.npy", pixels)
    data = run_stats(StatsConfig(data=str(tmp_path), pixel_max=1.0, num_workers=0)).data
    np.testing.assert_allclose(data["std"], pixels.std(axis=(0, 1)) * (0, 1, 1), rtol=1e-5)  # six digits
    std = [float(value) for value in data["flags"].split("--std ")[1].split(",")]
    np.testing.assert_allclose(std, (1, *pixels.std(axis=(0, 1))[1:]), rtol=1e-3)  # four digits
    assert main(["data", "stats", str(tmp_path), "--pixel-max", "1", "--num-workers", "0"]) == 0
    assert "channel 0 (counted from 0) is constant: leave it out" in " ".join(capsys.readouterr().out.split())


def test_statistics_on_the_command_line(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "stats", str(images), "--num-workers", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 11
    assert main(["data", "stats", str(images), "--num-workers", "0"]) == 0
    assert "--mean 0." in capsys.readouterr().out
    for path in images.rglob("*.png"):
        spoil(path)
    assert main(["data", "stats", str(images), "--num-workers", "0"]) == 1
    assert "none of the 11 images" in capsys.readouterr().err


# --- pack ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
def test_packed_files_are_the_files(images: Path, tmp_path: Path, num_workers: int) -> None:
    found = pack(images, tmp_path / "out", num_workers=num_workers)
    assert (found["images"], found["shards"], found["classes"]) == (11, 3, None)
    packed, files = unlabelled_images(tmp_path / "out"), unlabelled_images(images)
    assert sorted(packed.raw(index) for index in range(11)) == sorted(files.raw(index) for index in range(11))
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert index["images"] == 11
    for entry in index["shards"]:
        path = tmp_path / "out" / entry["name"]
        assert entry["sha256"] == sha256(path)
        assert {name: entry[name] for name in scan(path).entry()} == scan(path).entry()
    assert not (tmp_path / "out" / ".pack").exists()
    with pytest.raises(ConfigError, match="already exists"):
        pack(images, tmp_path / "out")


def test_rows_without_a_name_are_packed_as_what_they_are(images: Path, tmp_path: Path) -> None:
    contents = [path.read_bytes() for path in sorted(images.rglob("*.png"))]
    buffer = io.BytesIO()
    texture(0).save(buffer, "JPEG")
    rows = [*contents, buffer.getvalue()]
    pq.write_table(pa.table({"image": pa.array(rows, pa.binary())}), tmp_path / "a.parquet")
    pack(tmp_path / "a.parquet", tmp_path / "out")
    found = [name for path in sorted((tmp_path / "out").glob("*.tar")) for name in scan(path).names]
    assert sorted(found) == [*(f"{number:08d}.png" for number in range(11)), "00000011.jpeg"]


def test_labelled_trees_keep_their_classes(tmp_path: Path) -> None:
    write_classes(tmp_path / "classes")
    assert pack(tmp_path / "classes", tmp_path / "out")["classes"] == 2
    for split in ("train", "val"):
        packed, files = labelled_images(tmp_path / "out", split), labelled_images(tmp_path / "classes", split)
        assert packed.class_names == files.class_names == ("dark", "light")
        assert sorted((packed.raw(i), packed.labels[i]) for i in range(len(packed))) == sorted(
            (files.raw(i), files.labels[i]) for i in range(len(files))
        )


def test_images_are_made_smaller(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    texture(0).save(tmp_path / "in" / "a.jpg")
    texture(1).save(tmp_path / "in" / "b.png")
    write_noise(tmp_path / "in", 1)
    pack(tmp_path / "in", tmp_path / "out", short_side=30)
    packed = unlabelled_images(tmp_path / "out")
    made = {Path(packed.key(index)).name: np.asarray(packed.read(index, 3)).shape[:2] for index in range(3)}
    assert made == {"00000000.png": SIZE, "00000001.jpg": (30, 35), "00000002.png": (30, 35)}
    pack(tmp_path / "in", tmp_path / "jpegs", encoding="jpeg")
    assert {Path(unlabelled_images(tmp_path / "jpegs").key(index)).suffix for index in range(3)} == {".jpg"}


def test_many_channels_are_packed_as_numpy(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 60000, (20, 30, 5), dtype=np.uint16)
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in" / "a.npy", pixels)
    pack(tmp_path / "in", tmp_path / "out", in_chans=5, pixel_max=65535.0)
    np.testing.assert_array_equal(unlabelled_images(tmp_path / "out").read(0, 5, 65535.0), pixels)
    pack(tmp_path / "in", tmp_path / "small", in_chans=5, pixel_max=65535.0, short_side=10)
    small = np.asarray(unlabelled_images(tmp_path / "small").read(0, 5, 65535.0))
    assert (small.shape, str(small.dtype)) == ((10, 15, 5), "uint16")
    assert abs(float(small.mean()) - float(pixels.mean())) < 600  # 1 % of the range


def test_duplicates_are_left_out_and_listed(tmp_path: Path) -> None:
    for folder in ("train/a", "val/a"):
        (tmp_path / "in" / folder).mkdir(parents=True)
    texture(0).save(tmp_path / "in/train/a/0.png")
    texture(0).save(tmp_path / "in/train/a/1.bmp")  # the same pixels
    texture(1).save(tmp_path / "in/train/a/2.png")
    texture(1).resize((35, 30)).save(tmp_path / "in/train/a/3.png")  # looks the same
    texture(2).save(tmp_path / "in/train/a/4.png")
    texture(2).save(tmp_path / "in/val/a/0.png")  # would be trained on
    exact = pack(tmp_path / "in", tmp_path / "exact", dedup="exact")
    assert (exact["images"], exact["duplicates"]) == (4, 2)
    near = pack(tmp_path / "in", tmp_path / "near", dedup="near")
    assert (near["images"], near["duplicates"]) == (3, 3)
    assert len(labelled_images(tmp_path / "near", "val")) == 1
    listed = (tmp_path / "near" / "left_out.txt").read_text()
    assert f"duplicate: {tmp_path}/in/train/a/4.png = {tmp_path}/in/val/a/0.png" in listed


@pytest.mark.parametrize("kill_at", [1, 2, 3, 4, 5])
def test_a_killed_pack_goes_on(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill_at: int) -> None:
    (images / "copy.png").write_bytes((images / "a" / "00.png").read_bytes())
    pack(images, tmp_path / "whole", dedup="exact")
    writes = 0

    def killed(path: Path, value: Any) -> None:
        nonlocal writes
        writes += 1
        if writes == kill_at:
            raise KeyboardInterrupt
        write_json(path, value)

    monkeypatch.setattr(data_pack, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        pack(images, tmp_path / "out", dedup="exact")
    monkeypatch.setattr(data_pack, "write_json", write_json)
    if kill_at > 1:
        with pytest.raises(ConfigError, match="was begun with other data or settings"):
            pack(images, tmp_path / "out", dedup="exact", short_side=5)
    assert pack(images, tmp_path / "out", dedup="exact")["duplicates"] == 1
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    assert len(list((tmp_path / "out").iterdir())) == len(list((tmp_path / "whole").iterdir()))


def test_too_many_broken_files(images: Path, tmp_path: Path) -> None:
    for name in ("a/00.png", "b/08.png"):
        spoil(images / name)
    with pytest.raises(CheckFailed, match="2 unreadable images"):
        pack(images, tmp_path / "out", max_corrupt=1)
    found = pack(images, tmp_path / "out", max_corrupt=2)
    assert (found["images"], found["unreadable"]) == (9, 2)
    assert "unreadable: " in (tmp_path / "out" / "left_out.txt").read_text()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"short_side": 0}, "--short-side must be at least 1, got 0"),
        ({"quality": 0}, "--quality must be at least 1 and at most 100, got 0"),
        ({"encoding": "jpeg", "in_chans": 5}, "--encoding jpeg holds 1 or 3 channels of 8 bits, not --in-chans 5"),
        (
            {"encoding": "png", "pixel_max": 1.0},
            "--encoding png holds 1 or 3 or 4 channels of 8 bits, not --pixel-max 1",
        ),
        ({"num_workers": -2}, "--num-workers must be at least -1, got -2"),
    ],
)
def test_impossible_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PackConfig(source="a", out=Path("b"), **settings)


def test_shards_among_the_images_are_refused(images: Path) -> None:
    for out in (images, images / "packed"):
        with pytest.raises(ConfigError, match=f"OUT {out} lies within {images}"):
            pack(images, out)
    assert not (images / "packed").exists()


def test_every_split_is_packed_or_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_classes(tmp_path / "set")
    (root / "val").rename(root / "valid")
    write_noise(root / "test" / "dark", 2)
    write_noise(root / "extra" / "dark", 2)
    assert pack(root, tmp_path / "out")["images"] == 20
    assert {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()} == {"train", "val", "test"}
    line = capsys.readouterr().err.splitlines()[0]
    assert line.startswith(f"data: {root}: val 6 images")
    assert line.endswith("not used: extra")
