"""Large images are left out by name, with the option that reads them; the limit holds for a command and its workers."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mae_deploy.cli import main
from mae_deploy.errors import ConfigError
from mae_deploy.images.limits import MOST_PIXELS, most_pixels, pixels_at_most
from mae_deploy.images.read import UnreadableImage, read_image
from tests.runtime.tiny_bundle import write_bundle


def large(path: Path, width: int = 200, height: int = 100) -> Path:
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(path)
    return path


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif"])
def test_what_is_larger_is_refused_with_the_option(tmp_path: Path, name: str) -> None:
    file = large(tmp_path / name)
    with pixels_at_most(20000):
        read_image(file)
    with pixels_at_most(19999), pytest.raises(UnreadableImage, match=r"200x100 are 20000 pixels.*--max-pixels 20000"):
        read_image(file)


def test_a_tiff_of_many_channels(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(
        tmp_path / "a.tif", np.zeros((100, 200, 5), np.uint8), photometric="minisblack", planarconfig="contig"
    )
    with pixels_at_most(20000):
        read_image(tmp_path / "a.tif", 5)
    with pixels_at_most(19999), pytest.raises(UnreadableImage, match="--max-pixels 20000"):
        read_image(tmp_path / "a.tif", 5)


def test_pillows_limit_is_ours_until_it_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow refuses what has twice its number; 19,998 pixels stand for 179 million."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9999)
    file = large(tmp_path / "a.png")
    monkeypatch.setattr("mae_deploy.images.limits.MOST_PIXELS", 2 * 9999)
    with pytest.raises(
        UnreadableImage, match=r"20000 pixels\) exceeds limit of 19998 pixels: --max-pixels allows more"
    ):
        read_image(file)
    with pixels_at_most(20000):
        read_image(file)


def test_the_limit_ends_where_it_was_set() -> None:
    assert "MAE_DEPLOY_MAX_PIXELS" not in os.environ
    with pixels_at_most(7):
        with pixels_at_most(None):
            assert most_pixels() == 7
        with pixels_at_most(8):
            assert most_pixels() == 8
        assert most_pixels() == 7
    assert most_pixels() == MOST_PIXELS == 178956970
    assert "MAE_DEPLOY_MAX_PIXELS" not in os.environ


def test_predict_leaves_out_what_is_too_large(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = write_bundle(tmp_path / "bundle", token_mode="full")
    (tmp_path / "photos").mkdir()
    large(tmp_path / "photos" / "large.png")
    large(tmp_path / "photos" / "small.png", 20, 10)
    arguments = ["predict", str(bundle), str(tmp_path / "photos"), "--json"]
    assert main([*arguments, "--max-pixels", "19999"]) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed)["images"] == 1
    assert "200x100 are 20000 pixels, more than 19999: --max-pixels 20000 reads it" in printed
    assert main([*arguments, "--max-pixels", "20000"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 2


def test_workers_have_the_limit_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(3):
        large(tmp_path / "photos" / f"{number}.png", 200 if number == 1 else 20)
    arguments = ["data", "stats", str(tmp_path / "photos"), "--num-workers", "1", "--json"]
    assert main([*arguments, "--max-pixels", "19999"]) == 0
    assert "--max-pixels 20000 reads it" in capsys.readouterr().out


def test_a_file_of_more_bytes_than_so_many_pixels_have_is_not_read(tmp_path: Path) -> None:
    """Whatever its header says: the array lies in a file without content, which takes no place."""
    np.lib.format.open_memmap(tmp_path / "a.npy", "w+", np.uint8, (2, 3, 10**9)).flush()
    with pixels_at_most(20000), pytest.raises(UnreadableImage, match=r"6 GB are more than 160 kB: --max-pixels 75000"):
        read_image(tmp_path / "a.npy")


@pytest.mark.parametrize("value", ["", "x", "1e6", "-5", "\u0663"])
def test_a_limit_in_the_environment_that_is_none(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAE_DEPLOY_MAX_PIXELS", value)
    with pytest.raises(ConfigError, match=f"MAE_DEPLOY_MAX_PIXELS={value} in the environment is no number"):
        most_pixels()
