"""All bits of a pixel, by the kind of file: PNG, PGM, PPM, TIFF, JPEG 2000 and AVIF of more than 8 bits."""

from __future__ import annotations

import sys
import zlib
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from mae_deploy.errors import MissingDependency
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.images.read import Array, UnreadableImage, is_image, read_image
from tests.images.test_preprocess import UPRIGHT

SIZE = (13, 7)
"""Height and width."""


def values(channels: int, high: int = 65536, seed: int = 0) -> Array:
    """uint16 `(13, 7, channels)`, or `(13, 7)` of one channel."""
    shape = SIZE if channels == 1 else (*SIZE, channels)
    return np.random.default_rng(seed).integers(0, high, shape).astype(np.uint16)


def write_pnm(path: Path, pixels: Array, largest: int, *, plain: bool = False) -> Path:
    """`(H, W)` as PGM, `(H, W, 3)` as PPM."""
    kind = {(2, False): "P5", (3, False): "P6", (2, True): "P2", (3, True): "P3"}[pixels.ndim, plain]
    header = f"{kind}\n# a comment\n{pixels.shape[1]} {pixels.shape[0]}\n{largest}\n".encode()
    text = " ".join(map(str, pixels.reshape(-1).tolist())).encode()
    path.write_bytes(header + (text if plain else pixels.astype(">u2" if largest > 255 else "u1").tobytes()))
    return path


def whole(path: Path, channels: int, pixel_max: float = 65535) -> Array:
    found = read_image(path, channels, pixel_max)
    assert isinstance(found, np.ndarray)
    return found


def eight_bits(path: Path, channels: int = 1) -> Array:
    found = read_image(path, channels)
    assert is_image(found)
    return np.asarray(found)


# --- all bits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_png_of_16_bits(tmp_path: Path, channels: int) -> None:
    pixels = values(channels)
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(pixels))
    np.testing.assert_array_equal(whole(tmp_path / "a.png", channels), pixels.reshape(*SIZE, channels))


@pytest.mark.parametrize("name", ["a.jp2", "a.avif"])
def test_other_formats_of_more_than_8_bits(tmp_path: Path, name: str) -> None:
    pixels = values(3, 1024 if name == "a.avif" else 65536)
    encoded = (
        imagecodecs.avif_encode(pixels, level=100, bitspersample=10, pixelformat="444")
        if name == "a.avif"
        else imagecodecs.jpeg2k_encode(pixels, level=0, reversible=True, codecformat="jp2")
    )
    (tmp_path / name).write_bytes(encoded)
    np.testing.assert_array_equal(whole(tmp_path / name, 3, 1023), pixels)


@pytest.mark.parametrize("largest", [65535, 4095, 256])
@pytest.mark.parametrize(("channels", "plain"), [(1, False), (1, True), (3, False)])
def test_pnm_has_the_numbers_of_the_file(tmp_path: Path, largest: int, channels: int, plain: bool) -> None:
    pixels = values(channels, largest + 1)
    path = write_pnm(tmp_path / "a.pnm", pixels, largest, plain=plain)
    np.testing.assert_array_equal(whole(path, channels, largest), pixels.reshape(*SIZE, channels))


def test_a_kind_that_is_not_read_in_full_is_refused(tmp_path: Path) -> None:
    path = write_pnm(tmp_path / "a.ppm", values(3), 65535, plain=True)
    with pytest.raises(UnreadableImage, match=r"a\.ppm: a plain PPM of more than 8 bits; save it as"):
        whole(path, 3)


@pytest.mark.parametrize("channels", [1, 3])
def test_transparent_pixels_of_16_bits_lie_on_white(tmp_path: Path, channels: int) -> None:
    pixels = np.zeros((*SIZE, channels + 1), np.uint16)
    pixels[..., :channels], pixels[2, 3, -1], pixels[4, 5, -1] = 1000, 65535, 32768
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(pixels))
    found = whole(tmp_path / "a.png", channels)
    assert (found[0, 0] == 65535).all()
    assert (found[2, 3] == 1000).all()
    assert (found[4, 5] == 33267).all()  # 1000 · 32768/65535 + 65535 · 32767/65535


def test_a_transparent_grey_level_of_16_bits_is_white(tmp_path: Path) -> None:
    Image.fromarray(np.array([[300, 40000]], np.uint16)).save(tmp_path / "a.png", transparency=300)
    assert eight_bits(tmp_path / "a.png").tolist() == [[255, 155]]
    assert whole(tmp_path / "a.png", 1)[:, :, 0].tolist() == [[65535, 40000]]


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("name", ["a.png", "grey.png", "a.tif"])
def test_orientation(tmp_path: Path, name: str, orientation: int) -> None:
    pixels = values(1 if name == "grey.png" else 3)
    if name == "grey.png":
        exif = Image.Exif()
        exif[274] = orientation
        Image.fromarray(pixels).save(tmp_path / name, exif=exif)
    elif name == "a.png":
        exif = Image.Exif()
        exif[274] = orientation
        encoded, chunk = imagecodecs.png_encode(pixels), b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
        check = zlib.crc32(chunk).to_bytes(4, "big")
        inserted = (len(chunk) - 4).to_bytes(4, "big") + chunk + check  # behind the header of 33 bytes
        (tmp_path / name).write_bytes(encoded[:33] + inserted + encoded[33:])
    else:
        tifffile.imwrite(
            tmp_path / name, pixels, photometric="rgb", extratags=[(274, "H", 1, orientation, True)], metadata=None
        )
    expected = UPRIGHT[orientation](pixels)
    found = whole(tmp_path / name, 1 if name == "grey.png" else 3)
    np.testing.assert_array_equal(found.reshape(expected.shape), expected)


def test_colour_of_16_bits_without_its_reader_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(values(3)))
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    with pytest.raises(MissingDependency, match="'imagecodecs'") as caught:
        whole(tmp_path / "a.png", 3)
    assert caught.value.hint == "pip install 'mae-deploy[tiff]'"


# --- the kind of file decides, not what is in it ---------------------------------------------------------------------


@pytest.mark.parametrize("high", [200, 251, 261, 4096, 65536])
@pytest.mark.parametrize("name", ["a.png", "a.pgm", "plain.pgm", "a.tif"])
def test_grey_of_16_bits_is_divided_by_65535(tmp_path: Path, name: str, high: int) -> None:
    pixels = values(1, high)
    if name.endswith("pgm"):
        write_pnm(tmp_path / name, pixels, 65535, plain=name == "plain.pgm")
    elif name == "a.tif":
        tifffile.imwrite(tmp_path / name, pixels)
    else:
        Image.fromarray(pixels).save(tmp_path / name)
    np.testing.assert_array_equal(eight_bits(tmp_path / name), pixels // 257)


@pytest.mark.parametrize("largest", [15, 255, 256, 1023, 4095])
@pytest.mark.parametrize("plain", [False, True])
def test_pgm_is_divided_by_the_maximum_of_its_header(tmp_path: Path, largest: int, plain: bool) -> None:
    pixels = values(1, largest + 1)
    found = eight_bits(write_pnm(tmp_path / "a.pgm", pixels, largest, plain=plain))
    np.testing.assert_allclose(found, pixels * (255 / largest), atol=1.01)  # it is cut, once or twice


def test_tiff_of_12_bits_is_divided_by_4095(tmp_path: Path) -> None:
    pixels = np.array([[0, 2047, 4095, 250]], np.uint16)
    data = bytes(imagecodecs.packints_encode(pixels, 12))
    write_tiff_of_12_bits(tmp_path / "a.tif", data, pixels.shape)
    assert eight_bits(tmp_path / "a.tif").tolist() == [[0, 127, 255, 15]]
    np.testing.assert_array_equal(whole(tmp_path / "a.tif", 1, 4095)[:, :, 0], pixels)


def write_tiff_of_12_bits(path: Path, data: bytes, shape: tuple[int, int]) -> None:
    """Little-endian, one strip, four pixels in six bytes."""
    tags = {256: shape[1], 257: shape[0], 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: shape[0], 279: len(data)}
    offset = 8 + len(data)
    entries = b"".join(
        number.to_bytes(2, "little") + b"\x04\0\1\0\0\0" + value.to_bytes(4, "little") for number, value in tags.items()
    )
    directory = len(tags).to_bytes(2, "little") + entries + b"\0\0\0\0"
    path.write_bytes(b"II*\0" + offset.to_bytes(4, "little") + data + directory)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_white_is_zero_in_a_tiff_that_says_so(tmp_path: Path, dtype: str) -> None:
    white = np.iinfo(dtype).max
    pixels = np.array([[0, white // 5, white]], dtype)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="miniswhite")
    assert eight_bits(tmp_path / "a.tif").tolist() == [[255, 204, 0]]
    found = whole(tmp_path / "a.tif", 1, float(white))[:, :, 0]
    assert found.tolist() == [[white, white - white // 5, 0]]


def test_a_palette_is_no_brightness(tmp_path: Path) -> None:
    image = Image.new("P", (5, 3), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    for name in ("a.tif", "a.png"):
        image.save(tmp_path / name)
        assert (whole(tmp_path / name, 3, 255) == (200, 100, 50)).all()
    with pytest.raises(UnreadableImage, match="8 bits"):
        whole(tmp_path / "a.tif", 3)


def test_cmyk_is_no_rgb_with_a_fourth_channel(tmp_path: Path) -> None:
    Image.new("RGB", (5, 3), (200, 100, 50)).convert("CMYK").save(tmp_path / "a.jpg", quality=100)
    np.testing.assert_allclose(whole(tmp_path / "a.jpg", 3, 255)[0, 0], (200, 100, 50), atol=2)
    np.testing.assert_array_equal(whole(tmp_path / "a.jpg", 4, 255)[0, 0, 3], 255)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.pgm", "a.tif", "a.npy", "a.webp", "bits.png"])
def test_files_of_8_bits_are_refused_where_16_are_expected(tmp_path: Path, name: str) -> None:
    pixels = values(1, 256).astype(np.uint8)
    if name == "a.npy":
        np.save(tmp_path / name, pixels)
    else:
        Image.fromarray(pixels).convert("1" if name == "bits.png" else "L").save(tmp_path / name)
    assert whole(tmp_path / name, 3 if name == "a.webp" else 1, 255).max() <= 255
    for pixel_max in (65535, 4095):
        with pytest.raises(UnreadableImage, match=rf"{name}: the pixels have 8 bits, .*--pixel-max {pixel_max}"):
            whole(tmp_path / name, 3 if name == "a.webp" else 1, pixel_max)
    with pytest.raises(UnreadableImage, match="8 bits"):
        Preprocess(image_size=(3, 3), channels=1, mean=(0.5,), std=(0.2,), pixel_max=65535).crop(pixels)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_of_32_bits_have_no_fixed_range_whatever_is_in_them(tmp_path: Path, mode: str) -> None:
    Image.new(mode, SIZE, 3).save(tmp_path / "a.tif")
    with pytest.raises(UnreadableImage, match="no fixed range"):
        read_image(tmp_path / "a.tif", 1)
    with pytest.raises(UnreadableImage, match="no fixed range"):
        Preprocess(image_size=(3, 3)).crop(Image.new(mode, SIZE, 3))


def test_an_image_that_the_caller_has_opened_is_read_like_a_file(tmp_path: Path) -> None:
    write_pnm(tmp_path / "a.pgm", values(1, 4096), 4095)
    spec = Preprocess(image_size=SIZE, crop_pct=1.0)
    with Image.open(tmp_path / "a.pgm") as image:
        np.testing.assert_array_equal(spec.crop(image), spec.crop(spec.read(tmp_path / "a.pgm")))
