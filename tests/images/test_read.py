"""NumPy and TIFF files of any number of bands: read whole, cropped like any image, or refused with a reason."""

from __future__ import annotations

import sys
import threading
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import tifffile
from PIL import Image

from mae_deploy.errors import ConfigError, MissingDependency
from mae_deploy.images.find import find_images
from mae_deploy.images.geometry import Interpolation
from mae_deploy.images.preprocess import Preprocess, default_preprocess, require_readers
from mae_deploy.images.read import _SILENCE, Array, UnreadableImage, is_image, read_image, readable
from tests.data.band_files import BANDS, PIXEL_MAX, SIZE, bands_image, write_npy, write_tiff

SPEC = Preprocess(
    image_size=(7, 11),
    channels=BANDS,
    mean=(0.1, 0.2, 0.3, 0.4, 0.5),
    std=(0.2, 0.3, 0.4, 0.5, 0.6),
    pixel_max=PIXEL_MAX,
)


def read(path: Path, channels: int = BANDS, pixel_max: float | None = PIXEL_MAX) -> Array:
    found = read_image(path, channels, pixel_max)
    assert isinstance(found, np.ndarray)
    return found


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "int32", "float32", "float64", ">u2"])
def test_numpy_files_of_every_type_of_number(tmp_path: Path, dtype: str) -> None:
    pixels = (bands_image(0) // 50).astype(dtype)
    found = read(write_npy(tmp_path / "a.npy", pixels), pixel_max=255)
    np.testing.assert_array_equal(found, pixels)
    assert found.dtype == np.dtype(dtype).newbyteorder("=")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compression": "lzw"},
        {"compression": "deflate", "predictor": True},
        {"tile": (16, 16)},
        {"byteorder": ">"},
        {"bigtiff": True},
    ],
    ids=["plain", "lzw", "deflate", "tiled", "big-endian", "bigtiff"],
)
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_tiff_files_as_gis_programs_write_them(tmp_path: Path, dtype: str, options: dict[str, Any]) -> None:
    pixels = (bands_image(1) // 50).astype(dtype)
    np.testing.assert_array_equal(read(write_tiff(tmp_path / "a.TIF", pixels, **options), pixel_max=255), pixels)


def test_bands_may_stand_one_after_the_other_in_a_tiff(tmp_path: Path) -> None:
    pixels = bands_image(2)
    write_tiff(tmp_path / "planar.tif", pixels.transpose(2, 0, 1), planarconfig="separate")
    with tifffile.TiffWriter(tmp_path / "pages.tif") as file:
        for band in pixels.transpose(2, 0, 1):
            file.write(np.ascontiguousarray(band), photometric="minisblack", contiguous=True)
    for name in ("planar.tif", "pages.tif"):
        np.testing.assert_array_equal(read(tmp_path / name), pixels, err_msg=name)


def test_one_band_needs_no_third_axis(tmp_path: Path) -> None:
    band = bands_image(3)[:, :, 0]
    tifffile.imwrite(tmp_path / "a.tif", band)
    np.save(tmp_path / "a.npy", band)
    Image.fromarray(band).save(tmp_path / "a.png")
    for name in ("a.tif", "a.npy", "a.png"):
        np.testing.assert_array_equal(read(tmp_path / name, channels=1), band[:, :, None], err_msg=name)


def test_with_pixel_max_ordinary_counts_are_read_as_they_stand_too(tmp_path: Path) -> None:
    """Red, green, blue and near infrared of 16 bits: the usual satellite product, which Pillow does not read."""
    pixels = bands_image(4)[:, :, :4]
    np.testing.assert_array_equal(read(write_tiff(tmp_path / "a.tif", pixels), channels=4), pixels)


def test_without_pixel_max_eight_bits_stay_what_they_were(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    for path in (write_npy(tmp_path / "a.npy", pixels), write_tiff(tmp_path / "a.tif", pixels, photometric="rgb")):
        found = read_image(path)
        assert is_image(found)
        np.testing.assert_array_equal(np.asarray(found), pixels)


@pytest.mark.parametrize(
    ("pixels", "reason"),
    [
        (np.zeros((17, 13, 4), np.uint16), "the image has 4 channels, not 5$"),
        (np.zeros((17, 13), np.uint16), "the image has 1 channel, not 5$"),
        (np.zeros((5, 17, 13), np.uint16), r"the image has 13 channels, not 5; arrays are \(H, W, C\)$"),
        (np.zeros((1, 17, 13, 5), np.uint16), r"shape \(1, 17, 13, 5\) is not an image"),
        (np.zeros((0, 13, 5), np.uint16), "is not an image"),
        (np.full((17, 13, 5), np.nan, np.float32), "NaN or infinite"),
        (np.full((17, 13, 5), np.inf), "NaN or infinite"),
        (np.zeros((17, 13, 5), np.complex64), "complex64, not integers"),
        (np.zeros((17, 13, 5), bool), "bool, not integers"),
        (np.array([[None]]), "Python objects"),
    ],
    ids=str,
)
def test_what_is_no_such_image_is_named_with_the_reason(tmp_path: Path, pixels: Array, reason: str) -> None:
    np.save(tmp_path / "a.npy", pixels, allow_pickle=True)
    with pytest.raises(UnreadableImage, match=rf"^{tmp_path / 'a.npy'}: .*{reason}"):
        read(tmp_path / "a.npy")


def test_more_than_eight_bits_need_pixel_max(tmp_path: Path) -> None:
    with pytest.raises(
        UnreadableImage, match="the pixels are uint16; say what they are to be divided by with --pixel-max"
    ):
        read(write_npy(tmp_path / "a.npy", bands_image(0)), pixel_max=None)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "it is a Git LFS pointer"),
        (bytes(5000), "it is full of zeros"),
        (b"", "the file is empty"),
        (b"hello", "cannot identify image file"),
    ],
    ids=["pointer", "zeros", "empty", "text"],
)
def test_what_took_an_images_place_is_named_in_shards_too(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a.jpg").write_bytes(content)
    for given in (None, content):
        with pytest.raises(UnreadableImage, match=rf"a\.jpg: {reason}"):
            read_image(tmp_path / "a.jpg", content=given)


@pytest.mark.parametrize("suffix", [".npy", ".tif"])
@pytest.mark.parametrize("kept", [0, 3, 60, 500])
def test_files_that_are_cut_short_are_unreadable(tmp_path: Path, suffix: str, kept: int) -> None:
    path = tmp_path / f"a{suffix}"
    (write_npy if suffix == ".npy" else write_tiff)(path, bands_image(0))
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UnreadableImage, match=rf"^{path}: " + ("the file is empty" if kept == 0 else "")):
        read(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n",
            "it is a Git LFS pointer, not the file itself",
        ),
        (b"<!DOCTYPE html><html>", r"it is a web page \(HTML\)"),
    ],
)
def test_what_stands_in_for_an_image_is_said(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "photo.jpg").write_bytes(content)
    with pytest.raises(UnreadableImage, match=rf"photo\.jpg: {said}$"):
        read_image(tmp_path / "photo.jpg", 3)


def test_a_tiff_without_its_reader_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tiff(tmp_path / "a.tif", bands_image(0))
    monkeypatch.setitem(sys.modules, "tifffile", None)
    for call in (lambda: read(path), lambda: require_readers([str(path)], SPEC)):
        with pytest.raises(MissingDependency, match="'tifffile'") as caught:
            call()
        assert caught.value.hint == "pip install 'mae-deploy[tiff]'"
    require_readers(["a.npy", "b.png"], SPEC)
    require_readers([str(path)], default_preprocess((7, 11)))


def test_numpy_files_are_images_only_where_there_are_no_others(tmp_path: Path) -> None:
    arrays = [write_npy(tmp_path / name, bands_image(0)) for name in ("a/0.npy", "b.npy")]
    assert find_images(tmp_path) == arrays
    Image.new("RGB", (3, 2)).save(tmp_path / "photo.png")
    assert find_images(tmp_path) == [tmp_path / "photo.png"]


# --- crop and normalisation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interpolation", get_args(Interpolation))
@pytest.mark.parametrize("shape", [(17, 13), (13, 17), (7, 11), (8, 1000)], ids=str)
def test_bands_are_cropped_as_grey_images_are(shape: tuple[int, int], interpolation: Interpolation) -> None:
    """To the pixel for 8 bits, whose path is another; with `pixel_max`, to the rounding of 8 bits."""
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, BANDS), dtype=np.uint8)
    spec = Preprocess(
        image_size=(7, 11), channels=BANDS, mean=(0.0,) * BANDS, std=(1.0,) * BANDS, interpolation=interpolation
    )
    grey = Preprocess(image_size=(7, 11), channels=1, mean=(0.0,), std=(1.0,), interpolation=interpolation)
    expected = np.concatenate([grey.crop(Image.fromarray(pixels[:, :, band])) for band in range(BANDS)], axis=2)
    np.testing.assert_array_equal(spec.crop(pixels), expected)
    wide = Preprocess(
        image_size=(7, 11),
        channels=BANDS,
        mean=(0.0,) * BANDS,
        std=(1.0,) * BANDS,
        interpolation=interpolation,
        pixel_max=255,
    )
    found = wide.crop(pixels)
    assert (spec.dtype, wide.dtype, found.dtype.name) == ("uint8", "float32", "float32")
    # Pillow rounds after each of two passes, and clips what bicubic overshoots.
    np.testing.assert_allclose(found.clip(0, 255), expected, atol=1.5)


def test_nothing_is_lost_of_sixteen_bits() -> None:
    pixels = bands_image(0)[:7, :11]
    np.testing.assert_array_equal(
        Preprocess(**{**vars_of(SPEC), "crop_pct": 1.0}).crop(pixels), pixels.astype(np.float32)
    )


def test_pixels_are_divided_by_pixel_max() -> None:
    pixels = np.stack([SPEC.crop(bands_image(seed)) for seed in range(2)])
    expected = ((pixels.astype(np.float64) / PIXEL_MAX - np.array(SPEC.mean)) / np.array(SPEC.std)).transpose(
        0, 3, 1, 2
    )
    found = SPEC.normalise(pixels)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)  # FP32 of numbers up to 5
    np.testing.assert_array_equal(SPEC([bands_image(seed) for seed in range(2)]), found)


def test_pixel_max_must_be_positive() -> None:
    for value in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="must be above 0"):
            Preprocess(**{**vars_of(SPEC), "pixel_max": value})


def vars_of(spec: Preprocess) -> dict[str, Any]:
    return {name: getattr(spec, name) for name in Preprocess.__dataclass_fields__}


# --- ahead -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [0, 1, 3, 100])
def test_images_come_in_order_however_many_are_read_ahead(ahead: int) -> None:
    begun: list[int] = []
    left_out: list[tuple[int, str]] = []

    def read(item: int) -> int:
        begun.append(item)
        if item % 4 == 3:
            raise UnreadableImage(f"image {item}")
        return 10 * item

    found = readable(range(9), read, lambda item, reason: left_out.append((item, reason)), ahead=ahead)
    assert next(found) == (0, 0)
    assert len(begun) <= ahead + 1, "no more than that are held"
    assert left_out == []
    assert list(found) == [(item, 10 * item) for item in (1, 2, 4, 5, 6, 8)]
    assert left_out == [(3, "image 3"), (7, "image 7")]
    assert sorted(begun) == list(range(9))


def test_an_image_is_read_while_the_one_before_is_used() -> None:
    second = threading.Event()

    def read(item: int) -> int:
        if item == 1:
            second.set()
        return item

    for _ in readable(range(2), read, lambda *_: None, ahead=1):
        assert second.wait(30), "the second is not read before the first was taken"


def test_other_errors_end_what_is_read_ahead() -> None:
    def read(item: int) -> int:
        if item == 1:
            raise ConfigError("no such channel")
        return item

    found = readable(range(5), read, lambda *_: None, ahead=2)
    assert next(found) == (0, 0)
    with pytest.raises(ConfigError, match="no such channel"):
        next(found)
    abandoned = readable(iter(range(1000)), lambda item: item, lambda *_: None, ahead=2)
    next(abandoned)
    del abandoned
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("images")]


def test_threads_that_read_at_once_leave_the_warnings_as_they_were() -> None:
    """`warnings.catch_warnings` of two threads, entered and left in the same order, keeps the first one's filters."""
    before = list(warnings.filters)
    first, second = ExitStack(), ExitStack()
    first.enter_context(_SILENCE)
    second.enter_context(_SILENCE)
    warnings.warn("not shown", UserWarning, stacklevel=1)
    first.close()
    warnings.warn("not shown", UserWarning, stacklevel=1)
    second.close()
    assert list(warnings.filters) == before
    with pytest.warns(UserWarning, match="shown"):
        warnings.warn("shown", UserWarning, stacklevel=1)
