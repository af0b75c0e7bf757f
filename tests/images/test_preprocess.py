"""Real files of every kind in, 8-bit pixels of the right shape out; the crop is torchvision's; what cannot be read is
refused with a reason.
"""

from __future__ import annotations

import os
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from torchvision import transforms

from mae_deploy.errors import ConfigError
from mae_deploy.images.find import find_images
from mae_deploy.images.geometry import CropMode
from mae_deploy.images.limits import pixels_at_most
from mae_deploy.images.preprocess import Preprocess, default_preprocess
from mae_deploy.images.read import Array, UnreadableImage, from_array, is_image, read_image

SIZE = (13, 7)
"""Width and height."""
COLOUR = (200, 100, 50)
GREY = 124
"""0.299 · 200 + 0.587 · 100 + 0.114 · 50 = 124.2."""


def flat(mode: str) -> Image.Image:
    """One colour everywhere."""
    return Image.new("RGB", SIZE, COLOUR).convert(mode)


def with_alpha(mode: str, alpha: int) -> Image.Image:
    image = flat(mode)
    image.putalpha(Image.new("L", SIZE, alpha))
    return image


def palette(*, transparency: int | bytes | None = None) -> Image.Image:
    image = Image.new("P", SIZE, 1)
    image.putpalette([0, 0, 0, *COLOUR, 9, 9, 9])
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


def sixteen_bit(value: int = 200 * 257, mode: str = "I;16") -> Image.Image:
    return Image.new(mode, SIZE, value)


def noise(width: int, height: int, channels: int = 3, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)


# --- files -----------------------------------------------------------------------------------------------------------

WHITE = (255,) * 3
HALF = (227.6, 177.8, 152.9)
"""COLOUR on white, with 127/255 of it."""

JPEG = 2
"""Grey levels that JPEG's and WebP's colour transform and quantisation may change in a flat picture at quality 95."""

FILES: dict[str, tuple[Callable[[], Image.Image], str, dict[str, Any], tuple[float, ...], int]] = {
    "RGB PNG": (lambda: flat("RGB"), "a.png", {}, COLOUR, 0),
    "RGB BMP": (lambda: flat("RGB"), "a.bmp", {}, COLOUR, 0),
    "RGB PPM": (lambda: flat("RGB"), "a.ppm", {}, COLOUR, 0),
    "RGB TIFF": (lambda: flat("RGB"), "a.tif", {"compression": "tiff_lzw"}, COLOUR, 0),
    "RGB WebP": (lambda: flat("RGB"), "a.webp", {"quality": 95}, COLOUR, JPEG),
    "RGB WebP without loss": (lambda: flat("RGB"), "a.webp", {"lossless": True}, COLOUR, 0),
    "RGB JPEG": (lambda: flat("RGB"), "a.jpg", {"quality": 95}, COLOUR, JPEG),
    "progressive JPEG": (lambda: flat("RGB"), "a.jpeg", {"quality": 95, "progressive": True}, COLOUR, JPEG),
    "L PNG": (lambda: flat("L"), "a.png", {}, (GREY,) * 3, 0),
    "L JPEG": (lambda: flat("L"), "a.jpg", {"quality": 95}, (GREY,) * 3, JPEG),
    "LA PNG, all transparent": (lambda: with_alpha("L", 0), "a.png", {}, WHITE, 0),
    "LA PNG, opaque": (lambda: with_alpha("L", 255), "a.png", {}, (GREY,) * 3, 0),
    "L PNG, a transparent grey level": (lambda: flat("L"), "a.png", {"transparency": GREY}, WHITE, 0),
    "RGB PNG, a transparent colour": (lambda: flat("RGB"), "a.png", {"transparency": COLOUR}, WHITE, 0),
    "RGBA PNG, black and all transparent": (lambda: Image.new("RGBA", SIZE), "a.png", {}, WHITE, 0),
    "RGBA PNG, half transparent": (lambda: with_alpha("RGB", 127), "a.png", {}, HALF, 1),
    "RGBA WebP": (lambda: with_alpha("RGB", 255), "a.webp", {"lossless": True}, COLOUR, 0),
    "P PNG": (palette, "a.png", {}, COLOUR, 0),
    "P PNG, a transparent index": (lambda: palette(transparency=1), "a.png", {}, WHITE, 0),
    "P PNG, transparency in bytes": (lambda: palette(transparency=b"\x00\x7f"), "a.png", {}, HALF, 1),
    "GIF": (palette, "a.gif", {}, COLOUR, 0),
    "GIF with transparency": (lambda: palette(transparency=0), "a.gif", {}, COLOUR, 0),
    "1-bit PNG, white": (lambda: Image.new("1", SIZE, 1), "a.png", {}, (255,) * 3, 0),
    "1-bit TIFF, black": (lambda: Image.new("1", SIZE, 0), "a.tif", {"compression": "group4"}, (0,) * 3, 0),
    "CMYK JPEG": (lambda: flat("CMYK"), "a.jpg", {"quality": 95}, COLOUR, JPEG),
    "CMYK TIFF": (lambda: flat("CMYK"), "a.tif", {}, COLOUR, 0),
    "YCbCr TIFF": (lambda: flat("YCbCr"), "a.tif", {"compression": "tiff_lzw"}, COLOUR, JPEG),
    "16-bit PNG": (sixteen_bit, "a.png", {}, (200,) * 3, 0),
    "16-bit PNG, dark": (lambda: sixteen_bit(3 * 257), "a.png", {}, (3,) * 3, 0),
    "16-bit PNG between two grey levels": (
        lambda: sixteen_bit(51456),
        "a.png",
        {},
        (200,) * 3,
        0,
    ),  # 255/65535 of it is 200.2
    "16-bit TIFF": (sixteen_bit, "a.tiff", {}, (200,) * 3, 0),
    "16-bit TIFF, big-endian": (lambda: sixteen_bit(mode="I;16B"), "a.tiff", {}, (200,) * 3, 0),
    "16-bit PGM": (sixteen_bit, "a.pgm", {}, (200,) * 3, 0),
}


@pytest.mark.parametrize(("make", "name", "options", "colour", "tolerance"), FILES.values(), ids=FILES)
def test_every_kind_of_file(
    tmp_path: Path,
    make: Callable[[], Image.Image],
    name: str,
    options: dict[str, Any],
    colour: tuple[float, ...],
    tolerance: int,
) -> None:
    make().save(tmp_path / name, **options)
    image = read_image(tmp_path / name)
    assert is_image(image)
    assert (image.mode, image.size) == ("RGB", SIZE)
    np.testing.assert_allclose(
        np.asarray(image, np.int64), np.broadcast_to(colour, (*SIZE[::-1], 3)), rtol=0, atol=tolerance
    )


@pytest.mark.parametrize(
    ("channels", "mode", "pixel"), [(1, "L", (190,)), (3, "RGB", (228, 178, 153)), (4, "RGBA", (*COLOUR, 127))]
)
def test_channels(tmp_path: Path, channels: int, mode: str, pixel: tuple[int, ...]) -> None:
    with_alpha("RGB", 127).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png", channels)
    assert is_image(image)
    assert image.mode == mode
    found = np.asarray(image).reshape(*SIZE[::-1], channels)[2, 3]
    np.testing.assert_allclose(found.astype(int), pixel, rtol=0, atol=1)  # roundings of a share of 255


def test_black_on_transparent_does_not_vanish(tmp_path: Path) -> None:
    drawing = Image.new("RGBA", SIZE)
    drawing.putpixel((3, 2), (0, 0, 0, 255))
    drawing.save(tmp_path / "a.png")
    for channels, pixel_max in ((1, None), (3, None), (3, 255.0), (1, 255.0)):
        pixels = np.asarray(read_image(tmp_path / "a.png", channels, pixel_max)).reshape(*SIZE[::-1], channels)
        assert (pixels[2, 3] == 0).all()
        assert pixels.sum() == 255 * channels * (SIZE[0] * SIZE[1] - 1)


def test_transparency_of_a_palette_is_kept_where_there_is_a_channel_for_it(tmp_path: Path) -> None:
    palette(transparency=b"\x00\x7f").save(tmp_path / "a.png")
    assert tuple(np.asarray(read_image(tmp_path / "a.png", 4))[0, 0]) == (*COLOUR, 127)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 256).round().astype(np.uint16)
    Image.fromarray(values[None]).save(tmp_path / "a.png")
    assert np.asarray(read_image(tmp_path / "a.png", 1))[0].tolist() == list(range(256))


def test_the_first_frame_of_an_animation(tmp_path: Path) -> None:
    flat("RGB").save(tmp_path / "a.webp", save_all=True, append_images=[Image.new("RGB", SIZE)], lossless=True)
    assert tuple(np.asarray(read_image(tmp_path / "a.webp"))[0, 0]) == COLOUR


# What the EXIF standard says of the stored row 0 and column 0, as the change that makes the picture upright.
UPRIGHT: dict[int, Callable[[Array], Array]] = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: stored.swapaxes(0, 1)[:, ::-1],
    7: lambda stored: stored.swapaxes(0, 1)[::-1, ::-1],
    8: lambda stored: stored.swapaxes(0, 1)[::-1],
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation(tmp_path: Path, orientation: int) -> None:
    stored = np.asarray(noise(5, 3))
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "a.png")), UPRIGHT[orientation](stored))


def test_a_phone_photo_taken_upright(tmp_path: Path) -> None:
    """Stored lying down with orientation 6: the stored left side is the top."""
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.new("RGB", (32, 16), (255, 0, 0))
    stored.paste((0, 0, 255), (16, 0, 32, 16))
    stored.save(tmp_path / "a.jpg", exif=exif, quality=95)
    image = np.asarray(read_image(tmp_path / "a.jpg"), np.int64)
    assert image.shape == (32, 16, 3)
    np.testing.assert_allclose(image[3, 8], (255, 0, 0), rtol=0, atol=JPEG)
    np.testing.assert_allclose(image[-3, 8], (0, 0, 255), rtol=0, atol=JPEG)


# --- refused ---------------------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def write_refused(kind: str, folder: Path) -> Path:
    path = folder / {"png": "a.png", "32-bit": "a.tif", "float": "a.tif"}.get(kind, "a.jpg")
    if kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("an image, honestly\n", encoding="utf-8")
    elif kind == "folder":
        path.mkdir()
    elif kind in ("jpeg", "png"):
        noise(97, 89).save(path)
        cut(path)
    elif kind == "32-bit":
        Image.fromarray(np.full((3, 5), 65536, np.int32)).save(path)
    elif kind == "float":
        Image.fromarray(np.full((3, 5), 0.5, np.float32)).save(path)
    return path


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("empty", "the file is empty"),
        ("text", "cannot identify image file"),
        ("missing", "No such file"),
        ("folder", "Is a directory"),
        ("jpeg", "truncated"),
        ("png", "truncated"),
        ("32-bit", "32-bit pixels have no fixed range"),
        ("float", "floating-point pixels have no fixed range"),
    ],
)
def test_unreadable_files_are_named_with_a_reason(tmp_path: Path, kind: str, reason: str) -> None:
    path = write_refused(kind, tmp_path)
    with pytest.raises(UnreadableImage) as caught:
        read_image(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert reason in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "error", [RuntimeError, NotImplementedError, KeyError, struct.error, ZeroDivisionError, MemoryError]
)
def test_whatever_a_plug_in_raises_is_an_unreadable_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """The first two were found by damaging AVIF and DDS files."""

    def load(_: Image.Image) -> None:
        raise error("odd")

    flat("RGB").save(tmp_path / "a.png")
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    with pytest.raises(UnreadableImage, match="odd"):
        read_image(tmp_path / "a.png")


def test_large_files_are_read_in_silence_and_bombs_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow warns above its limit and raises above twice its limit."""
    noise(13, 11).save(tmp_path / "large.png")
    noise(19, 17).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pixels_at_most(200):
        assert read_image(tmp_path / "large.png").size == (13, 11)
        with pytest.raises(UnreadableImage, match=r"bomb\.png: .*exceeds limit"):
            read_image(tmp_path / "bomb.png")


def test_damaged_metadata_costs_neither_the_image_nor_a_warning(tmp_path: Path) -> None:
    broken = b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01"
    flat("RGB").save(tmp_path / "a.png", exif=broken)
    with Image.open(tmp_path / "a.png") as image, pytest.warns(UserWarning, match="Corrupt EXIF"):
        image.getexif()
    assert read_image(tmp_path / "a.png").size == SIZE


def test_warnings_of_others_are_heard_again_afterwards(tmp_path: Path) -> None:
    flat("RGB").save(tmp_path / "a.png")
    read_image(tmp_path / "a.png")
    with pytest.warns(UserWarning, match="still here"):
        warnings.warn("still here", UserWarning, stacklevel=1)


def test_another_number_of_channels_than_an_image_has_is_no_conversion(tmp_path: Path) -> None:
    flat("RGB").save(tmp_path / "a.png")
    with pytest.raises(UnreadableImage, match=r"a\.png: the image has 3 channels, not 2$"):
        read_image(tmp_path / "a.png", 2)


# --- crop and normalisation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [32, 97, 224])
@pytest.mark.parametrize(
    "size", [(1, 1), (31, 47), (36, 36), (97, 97), (333, 500), (501, 373), (701, 13), (640, 480)], ids=str
)
def test_the_crop_is_torchvisions(side: int, size: tuple[int, int]) -> None:
    """To the pixel: both ask Pillow for the same resize. The original evaluates so (its `datasets.py`,
    `build_transform`).
    """
    image = noise(*size)
    expected = transforms.CenterCrop(side)(
        transforms.Resize(int(side / 0.875), transforms.InterpolationMode.BICUBIC)(image)
    )
    np.testing.assert_array_equal(Preprocess(image_size=(side, side)).crop(image), np.asarray(expected))


def test_an_image_that_fits_is_left_as_it_is() -> None:
    image = noise(7, 5)
    np.testing.assert_array_equal(Preprocess(image_size=(5, 7), crop_pct=1.0).crop(image), np.asarray(image))


def test_the_centre_is_cut_out_of_what_is_wider() -> None:
    image = noise(12, 5)
    np.testing.assert_array_equal(
        Preprocess(image_size=(5, 7), crop_pct=1.0).crop(image), np.asarray(image)[:, 2:9]
    )  # 2.5 to the even, as torchvision


def test_the_centre_is_cut_out_of_what_is_higher() -> None:
    image = noise(7, 11)
    np.testing.assert_array_equal(Preprocess(image_size=(5, 7), crop_pct=1.0).crop(image), np.asarray(image)[3:8])


@pytest.mark.parametrize("size", [(3, 20011), (20011, 3), (1, 65500)], ids=str)
def test_strips_are_cropped_without_resizing_all_of_them(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]
) -> None:
    asked: list[tuple[int, int]] = []
    resize = Image.Image.resize

    def spy(image: Image.Image, target: tuple[int, int], *arguments: Any) -> Image.Image:
        asked.append(target)
        return resize(image, target, *arguments)

    monkeypatch.setattr(Image.Image, "resize", spy)
    strip = Image.new("RGB", size, (255, 0, 0))
    middle = (size[0] // 2, size[1] // 2)
    strip.paste(COLOUR, (max(0, middle[0] - 9), max(0, middle[1] - 9), middle[0] + 9, middle[1] + 9))
    pixels = Preprocess(image_size=(35, 21)).crop(strip)
    assert pixels.shape == (35, 21, 3)
    assert (pixels == COLOUR).all()  # the middle of the strip
    assert max(asked[0]) <= 100 * min(asked[0])


@pytest.mark.parametrize(("channels", "pixels"), [(1, (5, 7)), (1, (5, 7, 1)), (3, (5, 7, 3)), (4, (5, 7, 4))], ids=str)
def test_arrays_as_input(channels: int, pixels: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 256, pixels, dtype=np.uint8)
    spec = Preprocess(
        image_size=(5, 7), channels=channels, crop_pct=1.0, mean=(0.5,) * channels, std=(0.25,) * channels
    )
    expected = array.reshape(5, 7, channels).transpose(2, 0, 1)[None] / 255 * 4 - 2
    np.testing.assert_allclose(spec([array]), expected, atol=1e-6)  # float32 beside float64, values up to 2


@pytest.mark.parametrize(
    "array",
    [np.zeros((5, 7, 3), np.float32), np.zeros((5, 7, 2), np.uint8), np.zeros(5, np.uint8)],
    ids=["float", "2 channels", "1-D"],
)
def test_arrays_that_are_no_images(array: Array) -> None:
    with pytest.raises(ConfigError, match=r"must be uint8 \(H, W\)"):
        from_array(array)


def test_normalise_by_hand() -> None:
    pixels = np.zeros((2, 1, 3, 3), np.uint8)
    pixels[1, 0, 2] = (255, 51, 102)
    spec = Preprocess(image_size=(1, 3), mean=(0.5, 0.2, 0.3), std=(0.25, 0.1, 0.5))
    found = spec.normalise(pixels)
    assert found.shape == (2, 3, 1, 3)
    assert found.dtype == np.float32
    assert found.flags.c_contiguous
    # Rounding of 51/255 and 0.2 to float32, divided by 0.1: 1e-6 is ten units in the last place of 1.
    np.testing.assert_allclose(found[0, :, 0, 0], (-2, -2, -0.6), atol=1e-6)
    np.testing.assert_allclose(found[1, :, 0, 2], (2, 0, 0.2), atol=1e-6)


def test_images_of_several_sizes_make_one_batch() -> None:
    spec = Preprocess(image_size=(10, 15))
    images = [noise(13, 17), noise(31, 11, seed=1)]
    batch = spec(images)
    assert batch.shape == (2, 3, 10, 15)
    np.testing.assert_array_equal(batch[1], spec.normalise(spec.crop(images[1])[None])[0])


def test_defaults_are_the_originals() -> None:
    assert default_preprocess((224, 224)) == Preprocess(
        image_size=(224, 224), crop_pct=0.875, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
    )
    assert default_preprocess((448, 224)).crop_pct == 1.0
    assert default_preprocess((32, 32), 1).mean == (0.5,)
    assert default_preprocess((32, 32), 4).std == (0.25,) * 4


def test_settings_that_do_not_go_together() -> None:
    with pytest.raises(ConfigError, match="one value for each of 1 channels, not 3 and 3"):
        Preprocess(image_size=(5, 5), channels=1)


def test_a_palette_image_of_the_callers_is_converted_without_a_warning() -> None:
    image = palette(transparency=b"\x00\x7f")
    found = Preprocess(image_size=(7, 13), crop_pct=1.0).crop(image)
    np.testing.assert_allclose(found, np.broadcast_to(HALF, (7, 13, 3)), rtol=0, atol=1)


# --- finding files ---------------------------------------------------------------------------------------------------


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def names_below(root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in find_images(root)]


def test_images_are_found_flat_and_nested_in_a_stable_order(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "b.png",
        "a/z.JPG",
        "a/b/c.Jpeg",
        "a.webp",
        "A.TIFF",
        "notes.txt",
        "model.pth",
        "no_suffix",
        "paper.pdf",
    )
    assert names_below(tmp_path) == ["A.TIFF", "a.webp", "a/b/c.Jpeg", "a/z.JPG", "b.png"]


def test_hidden_files_and_folders_are_left_out(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "._a.png", ".cache/b.png", "x/.y/c.png")
    assert names_below(tmp_path) == ["a.png"]


def test_one_file_is_itself(tmp_path: Path) -> None:
    touch(tmp_path, "photo.dat")
    assert find_images(tmp_path / "photo.dat") == [tmp_path / "photo.dat"]


def test_each_folder_is_entered_once_whatever_links_lead_to_it(tmp_path: Path) -> None:
    """Two links back up: without care, one of 2 to the power of 40 ways down ends after the other."""
    touch(tmp_path, "a/1.png", "b/2.png")
    (tmp_path / "a" / "up").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "b" / "up").symlink_to("..", target_is_directory=True)
    (tmp_path / "c").symlink_to("b", target_is_directory=True)
    assert names_below(tmp_path) == ["a/1.png", "b/2.png"]


def test_links_to_folders_elsewhere_are_followed(tmp_path: Path) -> None:
    touch(tmp_path, "elsewhere/1.png")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link").symlink_to("../elsewhere", target_is_directory=True)
    assert names_below(tmp_path / "data") == ["link/1.png"]


def test_a_broken_link_is_found_and_reported_when_read(tmp_path: Path) -> None:
    (tmp_path / "a.png").symlink_to("gone.png")
    assert find_images(tmp_path) == [tmp_path / "a.png"]
    with pytest.raises(UnreadableImage, match="No such file"):
        read_image(tmp_path / "a.png")


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    odd = os.fsdecode(b"\xff.png")
    flat("RGB").save(tmp_path / odd)
    assert find_images(tmp_path) == [tmp_path / odd]
    assert read_image(tmp_path / odd).size == SIZE


def test_nothing_to_find(tmp_path: Path) -> None:
    touch(tmp_path, "notes.txt")
    with pytest.raises(ConfigError, match=f"no images below {tmp_path}"):
        find_images(tmp_path)
    with pytest.raises(ConfigError, match="no such file or folder"):
        find_images(tmp_path / "missing")


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border", "letterbox"])
@pytest.mark.parametrize("size", [(97, 61), (400, 300), (48, 32), (20, 30)])
def test_patches_are_those_of_the_crop(crop_mode: CropMode, size: tuple[int, int]) -> None:
    preprocess = Preprocess(image_size=(32, 48), crop_mode=crop_mode, crop_pct=0.9 if crop_mode == "center" else 1.0)
    rng = np.random.default_rng(0)
    frame = rng.integers(0, 256, (size[1], size[0], 3), np.uint8)
    image = preprocess.converted(frame)
    whole = preprocess.crop(frame)
    grid = whole.reshape(4, 8, 6, 8, 3).transpose(0, 2, 1, 3, 4).reshape(24, 8, 8, 3)
    for ids in (np.array([5, 0, 23, 13]), np.arange(24)):
        found = preprocess.crop_patches(image, ids, 8)
        assert np.abs(found.astype(int) - grid[ids]).max() <= 1


def test_a_rough_crop_is_near() -> None:
    preprocess = default_preprocess((32, 48))
    smooth = np.linspace(0, 255, 200 * 300 * 3).reshape(200, 300, 3).astype(np.uint8)
    difference = preprocess.crop_roughly(preprocess.converted(smooth)).astype(int) - preprocess.crop(smooth)
    assert np.abs(difference).mean() < 2
