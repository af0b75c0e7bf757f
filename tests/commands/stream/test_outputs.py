"""Several outputs appear as good as at once, and a kill between two is made good."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from mae_deploy.commands.stream import outputs as module
from mae_deploy.commands.stream.outputs import appearing_together, finish_appearing
from mae_deploy.files import atomic_path, write_text


def outputs(folder: Path) -> list[Path]:
    return [folder / "rows.npz", folder / "report"]


def write(folder: Path, *, call: str = "stream a") -> None:
    rows, report = outputs(folder)
    with appearing_together([rows, report], call):
        write_text(rows, "rows")
        write_text(folder / "cache", "at once")
        with atomic_path(report) as aside:
            aside.mkdir()
            write_text(aside / "page", "page")
        assert {path.name for path in folder.iterdir() if path.name[0] != "."} == {"cache"}


def assert_whole(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {"rows.npz", "report", "cache"}
    assert ((folder / "rows.npz").read_text(), (folder / "report" / "page").read_text()) == ("rows", "page")


def test_all_appear_at_the_end(tmp_path: Path) -> None:
    write(tmp_path)
    assert_whole(tmp_path)
    assert not finish_appearing(outputs(tmp_path), "stream a")


@pytest.mark.parametrize("change", [1, 2])
def test_a_kill_before_a_change_is_made_good_by_the_same_call(
    tmp_path: Path, change: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, seen = os.replace, list[Path]()

    def killed(source: Path, target: Path) -> None:
        seen.extend([target] if target in outputs(tmp_path) else [])
        if len(seen) == change:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path)
    assert not finish_appearing(outputs(tmp_path), "stream a"), "its process is still there"
    monkeypatch.setattr(module, "is_running", lambda _: False)
    assert not finish_appearing(outputs(tmp_path), "stream b")
    assert finish_appearing(outputs(tmp_path), "stream a")
    assert_whole(tmp_path)


def test_what_is_whole_is_not_lost_where_another_fails(tmp_path: Path) -> None:
    def fill_the_disk() -> None:
        rows, report = outputs(tmp_path)
        with appearing_together([rows, report], "stream a"):
            write_text(rows, "rows")
            with atomic_path(report) as aside:
                aside.mkdir()
                raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        fill_the_disk()
    assert [path.name for path in tmp_path.iterdir()] == ["rows.npz"]


@pytest.mark.parametrize("content", ["", "[]", '{"process": "1", "call": "c"}', '{"process": 1e99, "call": "c"}'])
def test_a_record_of_somebody_else(tmp_path: Path, content: str) -> None:
    (tmp_path / "rows.npz.unfinished").write_text(content)
    assert not finish_appearing(outputs(tmp_path), "c")
