"""Images by files, folders, patterns and lists: what is typed is what is used, and what is not there is an error."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import pytest

from mae_deploy.errors import ConfigError
from mae_deploy.images.find import find_images
from tests.data.image_folders import write_noise


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """a/00.png, a/01.png, b/c/00.png, and a file that is no image."""
    write_noise(tmp_path / "a", 2)
    write_noise(tmp_path / "b" / "c", 1)
    (tmp_path / "a" / "labels.csv").write_text("no image")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def found(*names: str) -> list[str]:
    return [str(path) for path in find_images(*map(Path, names), say=False)]


def test_files_and_folders_in_the_order_given(here: Path) -> None:
    assert found("b", "a/01.png", "a") == ["b/c/00.png", "a/01.png", "a/00.png", "a/01.png"]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a/*.png", ["a/00.png", "a/01.png"]),
        ("**/00.png", ["a/00.png", "b/c/00.png"]),
        ("a/0[1-9].png", ["a/01.png"]),
        ("*", ["a/00.png", "a/01.png", "b/c/00.png"]),
    ],
)
def test_patterns(here: Path, pattern: str, names: list[str]) -> None:
    assert found(pattern) == names


def test_what_a_pattern_matches_beside_images_is_left_out(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "a" / "empty").mkdir()
    assert len(find_images(Path("a/*"))) == 2
    assert capsys.readouterr().err == (
        "data: a/*: 2 images; left out: 1 folders without images such as a/empty, 1 .csv such as a/labels.csv\n"
    )


def test_a_name_that_is_there_is_no_pattern_and_no_list(here: Path) -> None:
    for name in ("a[0].png", "@a.png"):
        os.rename(here / "a" / f"0{'@' in name:d}.png", here / name)
        assert found(name) == [name]


@pytest.mark.parametrize(
    "content",
    [
        b"b\na/01.png\n",
        b"b\r\na/01.png\r\n",
        b"b\n\na/01.png",
        b"b\0a/01.png\0",
        "\ufeffb\na/01.png".encode(),
        "\ufeffb\r\na/01.png\r\n".encode("utf-16-le"),
    ],
    ids=["lines", "windows", "gaps", "print0", "bom", "powershell"],
)
def test_lists(here: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("list.txt").write_bytes(content)
    assert found("@list.txt") == ["b/c/00.png", "a/01.png"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert found("-") == ["b/c/00.png", "a/01.png"]


def test_a_list_of_names_in_another_encoding(here: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    try:
        os.rename("a/00.png", name)
    except OSError:
        pytest.skip("this file system takes names in UTF-8 only")
    Path("list.txt").write_bytes(b"caf\xe9.png\n")
    assert found("@list.txt") == [name]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["a", "nowhere.png"], "no such file or folder: nowhere.png"),
        (["c/*.png"], r"no file matches 'c/\*.png'"),
        (["a/*.csv"], r"no images in a/\*.csv; there are: 1 .csv"),
        (["@nowhere.txt"], "cannot read the list nowhere.txt: No such file"),
        (["@list.txt"], "2 of the 3 paths in list.txt are not there: x.png"),
        (["@photo"], r"of the 2 paths in photo are not there: '.udc89PNG"),
        (["@empty"], "empty names no image"),
    ],
)
def test_what_is_not_there_is_an_error(here: Path, names: list[str], said: str) -> None:
    Path("list.txt").write_text("x.png\na\ny.png\n")
    Path("photo").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\xff")
    Path("empty").touch()
    with pytest.raises(ConfigError, match=said):
        found(*names)
