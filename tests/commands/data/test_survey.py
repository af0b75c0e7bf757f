"""Processes that look at images end with the command, and it ends with them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from mae_deploy.commands.data.survey import surveying
from mae_deploy.errors import explained
from mae_deploy.files import is_running


def name_process(folder: Path, index: int) -> int:
    (folder / str(os.getpid())).touch()
    return -index


def die(index: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def survey_until_killed(folder: Path) -> None:
    with surveying(partial(name_process, folder), 2) as survey:
        list(survey(range(100)))
        os.kill(os.getpid(), signal.SIGKILL)


def test_results_come_in_order(tmp_path: Path) -> None:
    with surveying(partial(name_process, tmp_path), 2) as survey:
        assert list(survey(range(101, 0, -1))) == list(range(-101, 0))
        assert next(iter(survey(range(7, 300)))) == -7, "the rest is not waited for"
    assert not any(is_running(path.name) for path in tmp_path.iterdir())


def test_a_process_that_is_killed_ends_the_command() -> None:
    def look() -> None:
        with surveying(die, 2) as survey:
            list(survey(range(20)))

    with pytest.raises(RuntimeError) as caught:
        look()
    assert "a process that decodes images has died: out of memory?" in str(explained(caught.value))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nobody tells them")
def test_processes_end_with_a_command_that_is_killed(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=survey_until_killed, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    left = [path.name for path in tmp_path.iterdir()]
    assert left
    end = time.monotonic() + 10
    while any(map(is_running, left)) and time.monotonic() < end:
        time.sleep(0.01)
    assert not any(map(is_running, left))
