"""Whatever a command reads, a hostile file is given to it: every argument and option that names a file, a folder, a
list or a table is in the corpus, or stands here with the reason.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mae_deploy import cli
from mae_deploy.commands.data.drop import without
from mae_deploy.commands.predict import _read_mask
from mae_deploy.data.class_order import read_class_names
from mae_deploy.data.sources.files import image_files
from mae_deploy.embedding.job import JOB_FILE, check_begun, features_in
from mae_deploy.errors import ConfigError
from mae_deploy.flags import Flag, flags_of
from mae_deploy.options import settings_of_commands
from mae_deploy.runtime.bundle import Bundle
from tests.crash.test_crash import writes
from tests.hostile.doors import MASKS, NAMES, TABLES
from tests.hostile.pictures import HARMLESS
from tests.hostile.run import CORPORA, FILE, FIXTURES, Arguments

SLOW = ("10 MB", "10^6", "10^10")

NAMES_A_FILE = {
    *("DATA", "SRC", "ENCODERS", "SOURCE", "BUNDLES", "--data", "--recipe", "--finetune-recipe", "--against"),
    *("--pyramid", "--timing-cache", "--teacher-weights"),
}
"""Of arguments and options that take text, those that name what is read."""

NOT_GIVEN = {
    ("serve", "BUNDLES"): "opened as by verify; what is sent to a server is in test_requests.py",
    ("serve", "--images"): "a folder of which requests name files: test_requests.py",
    ("export", "--timing-cache"): "TensorRT's own, with a GPU; its name is the GPU's and its content opaque",
    ("build-engine", "--timing-cache"): "as of export",
    ("pretrain", "--recipe"): "an option that has no field: the corpus of recipes gives it to pretrain",
}
"""And why."""


def given() -> set[tuple[str, str]]:
    """Commands with the arguments and options by which the corpus gives them a hostile file."""
    flags = {command: flags_of(config) for command, config in settings_of_commands().items()}
    return {place_of(words, flags) for corpus in CORPORA.values() for words in corpus.commands.values()}


def place_of(words: Arguments, flags: dict[str, list[Flag]]) -> tuple[str, str]:
    """The command of a line, and the argument or option that is `FILE`."""
    command = " ".join(map(str, words[: 1 + (words[0] == "data")]))
    options = {flag.name: flag for flag in flags[command] if not flag.argument}
    arguments = [flag.name for flag in flags[command] if flag.argument]
    rest, place = list(map(str, words[len(command.split()) :])), 0
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            if word == FILE:
                return command, arguments[place]
            place += 1
        elif "=" in word and word.endswith(FILE):
            return command, word.partition("=")[0]
        elif takes_value(word, options) and rest.pop(0) == FILE:
            return command, word
    raise AssertionError(f"no {FILE} in {words}")


def takes_value(word: str, options: dict[str, Flag]) -> bool:
    """Whether a word that is an option has a value behind it."""
    return word in ("--recipe", "--dump-config") or (word in options and options[word].kind is not bool)


def test_whatever_a_command_reads_is_given_a_hostile_file() -> None:
    assert callable(cli.main)  # which registers the commands
    read = {
        (command, flag.name)
        for command, config in settings_of_commands().items()
        for flag in flags_of(config)
        if (flag.kind in (Path, list[Path]) or flag.name in NAMES_A_FILE)
        and (not writes(command, flag) or flag.name == "BUNDLE")
        and flag.name not in ("--deepstream",)
    }
    assert len(read) > 60
    assert sorted(read - given() - NOT_GIVEN.keys()) == []
    assert sorted(NOT_GIVEN.keys() - read - {("pretrain", "--recipe")}) == []


def read(kind: str, given: Path) -> object:
    if kind == "names":
        return read_class_names(given)
    if kind == "mask":
        return _read_mask(given, Bundle.load(FIXTURES / "bundles/visible"))
    return without({"all": image_files(Path("images"))}, given)


@pytest.mark.parametrize("kind", ["names", "mask", "table"])
def test_names_masks_and_tables(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FIXTURES)
    files = {"names": NAMES, "mask": MASKS, "table": TABLES}[kind]
    for number, name in enumerate(name for name in files if not any(word in name for word in SLOW)):
        (tmp_path / f"{number}").mkdir()
        given = files[name](tmp_path / f"{number}")
        try:
            read(kind, given)
        except ConfigError:
            assert not name.startswith(HARMLESS), name


def test_a_mask_of_no_dimensions_is_none(tmp_path: Path) -> None:
    np.save(tmp_path / "mask.npy", np.array(True))
    with pytest.raises(ConfigError, match="one boolean, not one for each patch"):
        read("mask", tmp_path / "mask.npy")


def test_features_that_are_none(tmp_path: Path) -> None:
    (tmp_path / JOB_FILE).write_text("[]")
    with pytest.raises(ConfigError, match="no record of a job"):
        check_begun(tmp_path, {})
    (tmp_path / "features-000000.parquet").mkdir()
    with pytest.raises(ConfigError, match="is no file"):
        features_in(tmp_path)
