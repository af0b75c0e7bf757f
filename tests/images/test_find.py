"""Which files are images: nothing disappears unsaid, and nothing that is no regular file is opened."""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from mae_deploy.cli import main
from mae_deploy.errors import ConfigError
from mae_deploy.images import read
from mae_deploy.images.find import find_images, image_suffixes, survey
from mae_deploy.images.read import formats, read_image
from tests.data.image_folders import write_noise


def test_what_is_left_out_is_counted_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_noise(tmp_path, 3)
    for name in ("trip/a.heic", "trip/b.HEIC", "trip/IMG_1", "notes.txt", "._00.png", "a.npy", "b.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [path.name for path in find_images(tmp_path)] == ["00.png", "01.png", "02.png"]
    line = " ".join(capsys.readouterr().err.split())
    assert line.startswith(
        f"data: {tmp_path}: 3 images; left out: 2 .heic (pip install pillow-heif) such as trip/a.heic"
    )
    for part in (
        "1 without a suffix such as trip/IMG_1",
        "1 .txt",
        "1 hidden images such as ._00.png",
        "1 .npy",
        "1 .tar",
    ):
        assert part in line
    assert find_images(tmp_path, say=False)
    assert capsys.readouterr().err == ""


def test_what_was_found_is_always_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_noise(tmp_path, 2)
    find_images(tmp_path)
    assert capsys.readouterr().err == f"data: {tmp_path}: 2 images\n"
    find_images(tmp_path / "00.png")
    assert capsys.readouterr().err == f"data: {tmp_path / '00.png'}: 1 image\n"


def test_files_without_a_suffix_are_images_if_they_begin_as_one(tmp_path: Path) -> None:
    write_noise(tmp_path, 2)
    (tmp_path / "00.png").rename(tmp_path / "5f1d")
    (tmp_path / "README").write_text("no image")
    (tmp_path / "empty").touch()
    found = survey(tmp_path)
    assert [path.name for path in found.images] == ["01.png", "5f1d"]
    assert found.left_out.counts == {"without a suffix": 2}


def test_only_other_files(tmp_path: Path) -> None:
    (tmp_path / "a.heic").touch()
    with pytest.raises(ConfigError, match=r"no images below .*; there are: 1 .heic \(pip install pillow-heif\)"):
        find_images(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no named pipes")
def test_pipes_are_not_opened(tmp_path: Path) -> None:
    write_noise(tmp_path, 2)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "pipe.png")
    (tmp_path / "broken.png").symlink_to(tmp_path / "gone.png")
    found = survey(tmp_path)
    assert [path.name for path in found.images] == ["00.png", "01.png", "broken.png"]
    assert found.left_out.counts == {"pipes, sockets or devices": 2}
    with pytest.raises(ConfigError, match="is neither a file nor a folder"):
        find_images(tmp_path / "pipe.png")


def test_a_folder_that_cannot_be_read_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_noise(tmp_path / "a", 2)
    write_noise(tmp_path / "locked", 2)
    scandir = os.scandir

    def refuse(path: Path) -> object:  # as for any user but root
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert main(["data", "stats", str(tmp_path), "--num-workers", "0"]) == 2
    assert f"cannot read the folder {tmp_path / 'locked'}: Permission denied" in capsys.readouterr().err


def test_links_in_a_circle_are_entered_once(tmp_path: Path) -> None:
    write_noise(tmp_path / "a", 2)
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "b").symlink_to(tmp_path / "a")
    (tmp_path / "self").symlink_to(tmp_path / "self")
    found = survey(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in found.images] == ["a/00.png", "a/01.png"]


@pytest.mark.parametrize(
    ("marks", "what"),
    [
        (("config.yaml", "environment.json"), "run folders of mae-deploy"),
        (("manifest.json", "golden.npz"), "bundles of mae-deploy"),
        (("sweep.yaml", "sweep.json"), "sweeps of mae-deploy"),
    ],
)
def test_our_own_outputs_are_no_images(tmp_path: Path, marks: tuple[str, ...], what: str) -> None:
    write_noise(tmp_path / "data", 2)
    write_noise(tmp_path / "data" / "out" / "pictures", 2)
    for mark in marks:
        assert len(survey(tmp_path / "data").images) == 4
        (tmp_path / "data" / "out" / mark).touch()
    found = survey(tmp_path / "data")
    assert (len(found.images), found.left_out.counts) == (2, {what: 1})
    assert len(survey(tmp_path / "data" / "out").images) == 2  # where it is asked for, it is read


def test_pictures_of_several_views_are_read(tmp_path: Path) -> None:
    first, second = (Image.new("RGB", (16, 8), colour) for colour in ("red", "blue"))
    first.save(tmp_path / "a.mpo", save_all=True, append_images=[second], quality=95)
    assert find_images(tmp_path) == [tmp_path / "a.mpo"]
    image = read_image(tmp_path / "a.mpo")
    assert isinstance(image, Image.Image)
    red, green, blue = image.getpixel((3, 3))  # type: ignore[misc]
    assert red > 240
    assert max(green, blue) < 15


@pytest.fixture
def with_heif(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if `pillow_heif` were installed: it registers its format with Pillow, here one of PNG files."""
    module = types.ModuleType("pillow_heif")
    module.__spec__ = object()  # type: ignore[assignment]  # as find_spec asks
    opener, accept = Image.OPEN["PNG"]

    def register_heif_opener() -> None:
        Image.register_open("HEIF", opener, accept)
        Image.register_extension("HEIF", ".heic")

    module.register_heif_opener = register_heif_opener  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pillow_heif", module)
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setattr(Image, "EXTENSION", dict(Image.EXTENSION))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    for cached in (formats, image_suffixes):
        cached.cache_clear()
    yield
    monkeypatch.undo()
    for cached in (formats, image_suffixes):
        cached.cache_clear()


@pytest.mark.usefixtures("with_heif")
def test_heif_is_read_where_its_reader_is_installed(tmp_path: Path) -> None:
    write_noise(tmp_path, 2)
    (tmp_path / "00.png").rename(tmp_path / "00.heic")
    assert [path.name for path in find_images(tmp_path)] == ["00.heic", "01.png"]
    assert "HEIF" in read.formats()


def test_a_folder_of_many_kinds_is_told_in_a_line(tmp_path: Path) -> None:
    for number in range(30):
        for copy in range(2 if number == 7 else 1):
            (tmp_path / f"file{copy}.x{number:02}").touch()
    with pytest.raises(ConfigError, match="no images") as caught:
        find_images(tmp_path)
    assert "; there are: 2 .x07 such as file0.x07, " in str(caught.value)
    assert str(caught.value).splitlines()[0].endswith(", 22 of 22 other kinds")
