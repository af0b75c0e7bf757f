"""What is said of bits and ranges before a run."""

from __future__ import annotations

from pathlib import Path

import imagecodecs
import numpy as np
import pytest
from PIL import Image

from mae_deploy.data.sources.files import image_files
from mae_deploy.data.sources.pixels import _say, check_pixels
from mae_deploy.errors import ConfigError


@pytest.fixture(autouse=True)
def nothing_said_yet() -> None:
    _say.cache_clear()


def write(folder: Path, low: int, high: int, *, dtype: str = "uint16", channels: int = 1, count: int = 3) -> Path:
    folder.mkdir(exist_ok=True)
    for number in range(count):
        pixels = np.linspace(low, high, 35 * channels).astype(dtype).reshape(5, 7, channels)
        encoded = imagecodecs.png_encode(pixels[:, :, 0] if channels == 1 else pixels)
        (folder / f"{dtype}-{number}.png").write_bytes(encoded)
    return folder


def said(folder: Path, channels: int, pixel_max: float | None, capsys: pytest.CaptureFixture[str]) -> str:
    check_pixels(image_files(folder), channels, pixel_max)
    return capsys.readouterr().err.strip()


@pytest.mark.parametrize(("high", "suggested"), [(900, 1023), (3980, 4095), (16383, 16383), (250, 255)])
@pytest.mark.parametrize("pixel_max", [None, 65535.0])
def test_a_narrow_range_is_said(
    tmp_path: Path, high: int, suggested: int, pixel_max: float | None, capsys: pytest.CaptureFixture[str]
) -> None:
    line = said(write(tmp_path, 0, high), 1, pixel_max, capsys)
    assert line.startswith(f"pixels: {tmp_path}: of 3 images looked at, 3 have more than 8 bits and no value above")
    assert f" {high}," in line
    assert f"--pixel-max {suggested} " in line


@pytest.mark.parametrize("channels", [1, 3])
def test_bits_that_are_not_used_are_said(tmp_path: Path, channels: int, capsys: pytest.CaptureFixture[str]) -> None:
    line = said(write(tmp_path, 0, 65000, channels=channels), 3, None, capsys)
    also = " --in-chans 1" if channels == 1 else ""
    assert line.endswith(f"of which 8 are used; --pixel-max 65535{also} in training uses all")
    assert said(tmp_path, 3, None, capsys) == ""  # once is enough


def test_nothing_is_said_where_all_is_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(write(tmp_path / "wide", 0, 65000), 1, 65535, capsys) == ""
    assert said(tmp_path / "wide", 1, 40000, capsys) == ""
    assert said(write(tmp_path / "narrow", 0, 3980), 1, 4095, capsys) == ""
    assert said(write(tmp_path / "dark", 0, 0), 1, 65535, capsys) == ""
    assert said(write(tmp_path / "plain", 0, 255, dtype="uint8"), 1, None, capsys) == ""


def test_a_range_that_is_left_by_far_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = said(write(tmp_path, 0, 65000), 1, 1, capsys)
    assert line.endswith("values up to 65000, 6.5e+04 times --pixel-max 1")


def test_eight_bits_where_more_are_expected_end_the_run_before_it_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--pixel-max 65535: the pixels of .* have 8 bits, such as .*uint8-0\.png"):
        check_pixels(image_files(write(tmp_path, 0, 255, dtype="uint8")), 1, 65535)
    check_pixels(image_files(tmp_path), 1, 255)
    check_pixels(image_files(write(tmp_path, 0, 65000)), 1, 65535)  # mixed: each is refused where it is read


def test_what_cannot_be_read_is_left_to_whoever_reads_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    (tmp_path / "b.png").symlink_to(tmp_path / "nowhere.png")
    Image.new("F", (5, 7)).save(tmp_path / "c.tif")
    assert said(tmp_path, 1, None, capsys) == ""
    assert said(tmp_path, 1, 65535, capsys) == ""


def test_pictures_beyond_the_first_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pages = [Image.new("RGB", (5, 7), (grey,) * 3) for grey in (0, 99, 200)]
    for name in ("a.gif", "b.tif"):
        pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])
    pages[0].save(tmp_path / "c.png")
    line = said(tmp_path, 3, None, capsys)
    assert line.endswith(f"2 hold several pictures, such as {tmp_path}/a.gif with 3; the first is read")
    assert said(tmp_path, 5, None, capsys) == ""  # pages may be channels
