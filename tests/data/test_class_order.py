"""The order of classes is said, read from a list, or refused; never guessed in silence."""

from __future__ import annotations

import codecs
from pathlib import Path

import pytest
from timm.data.readers.reader_image_folder import find_images_and_targets

from mae_deploy.data.class_order import check_distinct, check_order, natural_order, orders_differ, read_class_names
from mae_deploy.data.sources.files import labelled_files
from mae_deploy.errors import ConfigError
from tests.data.image_folders import write_noise

NUMBERS = tuple(str(number) for number in range(12))


@pytest.mark.parametrize(
    "names", [NUMBERS, ("a10", "a9", "b"), ("B", "a", "C"), ("x1y10", "x1y9", "1", "x"), ("10", "ant", "9")]
)
def test_natural_order_is_timms(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").touch()
    _, numbers = find_images_and_targets(str(tmp_path))
    assert natural_order(names) == tuple(sorted(numbers, key=numbers.__getitem__))


def test_where_the_orders_differ() -> None:
    assert orders_differ(NUMBERS)
    assert orders_differ(("Bee", "ant"))
    assert not orders_differ(("ant", "bee"))
    assert not orders_differ(("n01440764", "n01443537"))
    assert not orders_differ(("01", "02", "10"))


@pytest.mark.parametrize(
    "content",
    [
        b"bee\nant\ncow\n\n",
        b"bee\r\n ant \r\ncow",
        codecs.BOM_UTF8 + b"bee\nant\ncow\n",
        "bee\nant\ncow".encode("utf-16"),
        b'["bee", "ant", "cow"]',
        codecs.BOM_UTF8 + b'\n{"0": "bee", "2": "cow", "1": "ant"}',
        b'{"ant": 1, "bee": 0, "cow": 2}',
    ],
)
def test_lists_of_names(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "names").write_bytes(content)
    assert read_class_names(tmp_path / "names") == ("bee", "ant", "cow")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"ant\n\nbee\n", "has an empty line"),
        (b"ant\nbee\nant\n", r"calls the classes 0 and 2 'ant'$"),
        (b'["ant", "ant", "bee", "bee"]', r"calls the classes 0 and 1 'ant', and 1 names more"),
        (b'{"0": "ant", "2": "bee"}', "2 names, and none for the number 1"),
        (b'{"ant": 0, "bee": 0}', "none for the number 1"),
        (b'["ant", 3]', "is no list of names"),
        (b'["ant"', "is no JSON"),
        (b"\xff\xfa", "cannot read"),
    ],
)
def test_lists_that_are_refused(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "names").write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        read_class_names(tmp_path / "names")


def test_a_list_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read --class-names"):
        read_class_names(tmp_path / "names")


def test_distinct_names_pass() -> None:
    check_distinct(NUMBERS, "file")


def test_classes_of_a_classifier_without_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("ant", "bee", "cow", "doe"):
        write_noise(tmp_path / "plain" / name, 1)
    check_order(labelled_files(tmp_path / "plain"), "the classifier")
    assert "taken in alphabetical order, 0 ant, 1 bee, 2 cow, …" in capsys.readouterr().err
    for name in NUMBERS:
        write_noise(tmp_path / "numbers" / name, 1)
    with pytest.raises(
        ConfigError,
        match=r"in alphabetical order \(0 0, 1 1, 2 10, …\) and in natural order, timm's \(0 0, 1 1, 2 2, …\)",
    ) as caught:
        check_order(labelled_files(tmp_path / "numbers"), "the classifier")
    assert "--class-names" in (caught.value.hint or "")


@pytest.mark.parametrize("content", ['{"0": "a", "0": "b"}', "[" * 50_000 + "]" * 50_000, '{"a": true, "b": 0}'])
def test_names_in_json_that_mean_nothing(content: str, tmp_path: Path) -> None:
    (tmp_path / "names").write_text(content)
    with pytest.raises(ConfigError, match="--class-names"):
        read_class_names(tmp_path / "names")


def test_names_that_have_no_end() -> None:
    with pytest.raises(ConfigError, match="no file, but a pipe or a device"):
        read_class_names(Path("/dev/zero"))


def test_a_name_that_is_a_book(tmp_path: Path) -> None:
    (tmp_path / "names").write_text("x" * 2000 + "\ny\n")
    with pytest.raises(ConfigError, match="has a name of 2,000 characters"):
        read_class_names(tmp_path / "names")
