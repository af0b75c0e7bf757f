"""A run folder is one process's at a time; what a dead one leaves behind stops nobody."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mae_deploy.errors import ConfigError
from mae_deploy.machine import process_start
from mae_deploy.training.state import lock
from mae_deploy.training.state.lock import LOCK, RunLock


def left_by(folder: Path, holder: dict[str, Any] | str, *, age: float = 0.0) -> Path:
    """A lock that somebody wrote some seconds ago."""
    path = folder / LOCK
    path.write_text(holder if isinstance(holder, str) else json.dumps(holder), encoding="utf-8")
    written = path.stat().st_mtime - age
    os.utime(path, (written, written))
    return path


def dead_process() -> int:
    """The number of a process that has ended."""
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def test_it_names_host_and_process_until_it_is_given_back(tmp_path: Path) -> None:
    held = RunLock(tmp_path)
    held.acquire()
    written = json.loads((tmp_path / LOCK).read_text())
    assert (written["host"], written["process"]) == (platform.node(), os.getpid())
    held.release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("host", "age"), [(platform.node(), 1e6), ("elsewhere", 0.0)])
def test_a_process_at_work_is_not_disturbed(tmp_path: Path, host: str, age: float) -> None:
    """On this host it is asked for; on another one, its file is fresh."""
    path = left_by(tmp_path, {"host": host, "process": os.getppid()}, age=age)
    with pytest.raises(ConfigError, match=f"is being written by process {os.getppid()} on {host}") as caught:
        RunLock(tmp_path).acquire()
    assert str(path) in str(caught.value.hint)
    assert [file.name for file in tmp_path.iterdir()] == [LOCK]


def test_the_lock_of_a_dead_process_is_taken_over_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dead = dead_process()
    for holder, age in (({"host": platform.node(), "process": dead}, 0.0), ({"host": "spot-7", "process": 1}, 1e4)):
        left_by(tmp_path, holder, age=age)
        held = RunLock(tmp_path)
        held.acquire()
        assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()
        expected = f"taken over: {tmp_path}, which process {holder['process']} on {holder['host']} has left behind"
        assert expected in capsys.readouterr().err
        held.release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["", "[]", '{"host": '])
def test_a_lock_that_a_crash_left_without_its_content(
    tmp_path: Path, content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "_WRITING", 0.0)
    left_by(tmp_path, content)
    RunLock(tmp_path).acquire()
    assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()


def test_its_own_number_is_that_of_a_process_before_it(tmp_path: Path) -> None:
    """Containers count their processes from 1, and keep their host's name."""
    left_by(tmp_path, {"host": platform.node(), "process": os.getpid()})
    RunLock(tmp_path).acquire()


def test_it_shows_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_BEAT", 0.01)
    held = RunLock(tmp_path)
    held.acquire()
    os.utime(held.path, (0, 0))
    for _ in range(1000):
        if held.path.stat().st_mtime > 0:
            break
        held._ended.wait(0.01)
    assert held.path.stat().st_mtime > 0
    held.release()


def test_a_number_that_was_given_anew(tmp_path: Path) -> None:
    holder = {**lock._own(), "process": os.getppid(), "started": process_start(os.getppid())}
    left_by(tmp_path, holder)
    with pytest.raises(ConfigError, match="is being written by process"):
        RunLock(tmp_path).acquire()
    left_by(tmp_path, {**holder, "started": "another boot, or another time"})
    RunLock(tmp_path).acquire()


@pytest.mark.parametrize("works", [False, True])
def test_another_container_of_this_host(tmp_path: Path, works: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is at work if a sign of life comes; its number says nothing here."""
    monkeypatch.setattr(lock, "_BEAT", 0.05)
    path = left_by(tmp_path, {**lock._own(), "numbers": "pid:[1]"}, age=0.02)
    if works:
        monkeypatch.setattr(time, "sleep", lambda _: os.utime(path))
        with pytest.raises(ConfigError, match="is being written by process"):
            RunLock(tmp_path).acquire()
    else:
        RunLock(tmp_path).acquire()
        assert json.loads(path.read_text())["process"] == os.getpid()
