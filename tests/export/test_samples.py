"""Which images parity is proven on: those that were asked for, those of the checkpoint, and a stand-in that is said
aloud.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mae_deploy.checkpoint import Metadata
from mae_deploy.errors import ConfigError
from mae_deploy.export.samples import Samples, read_samples, spread_first, token_inputs
from mae_deploy.images.find import find_images
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.images.read import Array, read_image
from mae_deploy.runtime.profiles import Range
from tests.data.image_folders import spoil, write_noise
from tests.models.tiny_models import metadata_of, tiny_encoder

SPEC = Preprocess(image_size=(6, 10))


def trained_on(data: Path | None) -> Metadata:
    """A checkpoint's metadata, as a run writes it or, for None, as an import does."""
    provenance: dict[str, Any] = (
        {"stage": "import"} if data is None else {"stage": "pretrain", "config": {"data": str(data)}}
    )
    return metadata_of(tiny_encoder(), provenance=provenance)


def pixels_of(*paths: Path) -> Array:
    return np.stack([SPEC.crop(read_image(path)) for path in paths])


def samples(folder: Path | None, data: Path | None = None, count: int = 4) -> Samples:
    return read_samples(folder, trained_on(data), SPEC, count)


def test_a_small_folder_is_taken_whole(tmp_path: Path) -> None:
    write_noise(tmp_path / "images", 3)
    found = samples(tmp_path / "images")
    np.testing.assert_array_equal(found.pixels, pixels_of(*find_images(tmp_path / "images")))
    assert (found.pixels.shape, found.pixels.dtype.name) == ((3, 6, 10, 3), "uint8")
    assert found.paths == tuple(find_images(tmp_path / "images"))
    assert found.source == f"3 images of {tmp_path / 'images'}"


def test_one_image_will_do(tmp_path: Path) -> None:
    write_noise(tmp_path, 2)
    found = samples(tmp_path / "01.png")
    np.testing.assert_array_equal(found.pixels, pixels_of(tmp_path / "01.png"))


@pytest.mark.parametrize(
    ("count", "chosen"), [(1, [0]), (2, [0, 10]), (4, [0, 3, 7, 10]), (10, [0, 1, 2, 3, 4, 6, 7, 8, 9, 10])]
)
def test_of_a_large_folder_some_from_first_to_last(tmp_path: Path, count: int, chosen: list[int]) -> None:
    write_noise(tmp_path, 11)
    found = samples(tmp_path, count=count)
    np.testing.assert_array_equal(found.pixels, pixels_of(*(tmp_path / f"{index:02d}.png" for index in chosen)))


def test_other_images_stand_in_for_broken_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_noise(tmp_path, 11)
    spoil(tmp_path / "03.png")
    spoil(tmp_path / "10.png")
    found = samples(tmp_path)
    np.testing.assert_array_equal(
        found.pixels, pixels_of(*(tmp_path / name for name in ("00.png", "07.png", "01.png", "02.png")))
    )
    assert found.source == f"4 images of {tmp_path}"
    assert [path.name for path in found.paths] == ["00.png", "07.png", "01.png", "02.png"]
    assert [line.split(": ")[0] for line in capsys.readouterr().err.splitlines()] == [
        "data",
        *(f"skipped {tmp_path / name}" for name in ("03.png", "10.png")),
    ]


def test_a_folder_that_was_asked_for_must_have_a_readable_image(tmp_path: Path) -> None:
    write_noise(tmp_path / "images", 2)
    write_noise(tmp_path / "data", 2)
    for path in find_images(tmp_path / "images"):
        spoil(path)
    with pytest.raises(ConfigError, match=f"no readable image below --samples {tmp_path / 'images'}"):
        samples(tmp_path / "images", tmp_path / "data")
    with pytest.raises(ConfigError, match="no such file or folder"):
        samples(tmp_path / "nowhere", tmp_path / "data")


@pytest.mark.parametrize("split", ["val", ""])
def test_the_data_of_the_checkpoint(tmp_path: Path, split: str) -> None:
    write_noise(tmp_path / "train", 2)
    write_noise(tmp_path / split, 3, first=5)
    found = samples(None, tmp_path)
    assert found.source == (f"3 images of {tmp_path / 'val'}" if split else f"4 images of {tmp_path}")
    assert len(found.pixels) == (3 if split else 4)


def test_a_val_folder_without_images_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    write_noise(tmp_path / "train", 2)
    assert samples(None, tmp_path).source == f"2 images of {tmp_path}"


@pytest.mark.parametrize("data", ["moved away", "emptied", None])
def test_a_stand_in_is_said_aloud(tmp_path: Path, data: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "emptied").mkdir()
    found = samples(None, None if data is None else tmp_path / data, count=5)
    assert found.source == "5 synthetic images with a 1/f spectrum"
    assert (
        capsys.readouterr().err
        == "no images at hand: parity is checked on synthetic ones; pass --samples FOLDER for real ones\n"
    )
    assert (found.pixels.shape, found.pixels.dtype.name, found.paths) == ((5, 6, 10, 3), "uint8", ())


def test_the_stand_in_looks_like_images() -> None:
    spec = Preprocess(image_size=(64, 96), channels=1, mean=(0.0,), std=(1.0,))
    pixels = read_samples(None, trained_on(None), spec, 3).pixels
    assert pixels.shape == (3, 64, 96, 1)
    assert pixels.min(axis=(1, 2, 3)).tolist() == [0, 0, 0]
    assert pixels.max(axis=(1, 2, 3)).tolist() == [255, 255, 255]
    values = pixels.astype(float)
    assert np.abs(values[0] - values[1]).max() > 25
    # Smooth, as noise is not: neighbours differ by far less than pixels anywhere (for white noise the ratio is 1.4).
    assert np.diff(values, axis=2).std() < 0.7 * values.std()
    again = read_samples(None, trained_on(None), spec, 3).pixels
    np.testing.assert_array_equal(again, pixels)


# --- which of many images --------------------------------------------------------------------------------------------


def test_those_spread_over_all_come_first_and_then_the_others() -> None:
    paths = [Path(str(index)) for index in range(11)]
    assert [int(path.name) for path in spread_first(paths, 4)] == [0, 3, 7, 10, 1, 2, 4, 5, 6, 8, 9]
    assert spread_first(paths, 1)[0] == paths[0]
    assert spread_first(paths, 11) == spread_first(paths, 99) == paths


# --- which patches ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["visible", "reconstruct"])
@pytest.mark.parametrize(("keep", "length"), [((1, 3, 15), 3), ((1, 1, 1), 1), ((7, 7, 7), 7), ((15, 15, 15), 15)])
def test_the_usual_number_of_patches(mode: str, keep: Range, length: int) -> None:
    found = token_inputs(mode, 15, keep, 11, seed=0)
    assert list(found) == ["ids_keep"]
    ids = found["ids_keep"]
    assert (ids.shape, ids.dtype.name) == ((11, length), "int64")
    assert all(len(set(row)) == length and 0 <= min(row) and max(row) < 15 for row in ids.tolist())
    assert len({tuple(row) for row in ids.tolist()}) > 1
    np.testing.assert_array_equal(ids, token_inputs(mode, 15, keep, 11, seed=0)["ids_keep"])
    assert (ids != token_inputs(mode, 15, keep, 11, seed=1)["ids_keep"]).any()


@pytest.mark.parametrize(
    ("keep", "shortest"),
    [((1, 3, 15), 1), ((4, 5, 9), 4), ((7, 7, 7), 1), ((1, 1, 1), 1)],
    ids=["open", "from 4 to 9", "padded to 7", "padded to 1"],
)
def test_a_ragged_batch_has_all_lengths(keep: Range, shortest: int) -> None:
    """Its rows are as long as the longest; a fixed K is the rows' length, and the images have from one patch to all of
    them.
    """
    found = token_inputs("ragged", 15, keep, 150, seed=0)
    ids, lengths = found["ids_keep"], found["num_keep"]
    assert (ids.shape, ids.dtype.name, lengths.shape, lengths.dtype.name) == ((150, keep[2]), "int64", (150,), "int64")
    assert (lengths.min(), lengths.max()) == (shortest, keep[2])
    assert set(lengths.tolist()) == set(range(shortest, keep[2] + 1))
    for row, length in zip(ids.tolist(), lengths.tolist(), strict=True):
        assert len(set(row[:length])) == length
        assert 0 <= min(row[:length]) <= max(row[:length]) < 15
        assert all(not 0 <= garbage < 15 for garbage in row[length:])
    assert (token_inputs("ragged", 15, keep, 150, seed=1)["ids_keep"] != ids).any()


def test_the_longest_comes_first_and_the_shortest_last() -> None:
    """However few the images are, both are among them; one alone is the shortest, in rows that are padded."""
    for seed in range(5):
        first, _, last = token_inputs("ragged", 15, (4, 5, 9), 3, seed)["num_keep"].tolist()
        assert (first, last) == (9, 4)
        assert token_inputs("ragged", 15, (4, 5, 9), 1, seed)["num_keep"].tolist() == [4]
        assert token_inputs("ragged", 15, (7, 7, 7), 1, seed)["num_keep"].tolist() == [7]
