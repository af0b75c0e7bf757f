"""A signal ends a command with one line and its exit code, and nothing half written stays; of two at one output, one
works.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mae_deploy.cli import main
from mae_deploy.errors import ConfigError
from mae_deploy.files import alone_at, write_text

WAITING = """
import signal, sys, time
from pathlib import Path
from mae_deploy import cli
from mae_deploy.commands import info
from mae_deploy.files import atomic_path

def wait(config):
    try:
        with atomic_path(config.path / "file") as aside:
            aside.write_text("half")
            print("ready", flush=True)
            time.sleep(60)
    finally:
        if "slow" in sys.argv:
            print("ending", flush=True)
            time.sleep(60)

info.run_info = wait
if "ignored" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
sys.exit(cli.main(["info", sys.argv[1]]))
"""
"""A command that writes a file for a minute."""


def start(folder: Path, *more: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING, str(folder), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Whoever runs the tests in the background ignores Ctrl-C, and so would the command.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_the_first_signal_ends_it_in_order(number: signal.Signals, code: int, tmp_path: Path) -> None:
    process = start(tmp_path)
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (code, f"error: stopped by {number.name}\n")
    assert [*tmp_path.iterdir()] == []


def test_the_second_ends_it_at_once(tmp_path: Path) -> None:
    process = start(tmp_path, "slow")
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    assert process.stdout.readline() == "ending\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (130, "error: stopped by SIGINT again\n")


def test_what_the_caller_ignores_stays_ignored(tmp_path: Path) -> None:
    process = start(tmp_path, "ignored")
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    assert process.poll() is None
    process.kill()
    process.communicate()


def test_two_at_one_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "not there yet" / "sweep"
    with alone_at(out):
        process = [sys.executable, "-m", "mae_deploy", "sweep", "photos", "--mask-ratio", "0.5", "--out", str(out)]
        found = subprocess.run(process, capture_output=True, text=True)
        assert main(process[3:]) == 2
    first, hint = capsys.readouterr().err.splitlines()
    assert first == f"error: --out {out} is being written by another process"
    assert (found.returncode, found.stderr.splitlines()) == (2, [first, hint])
    assert not out.parent.exists()
    with alone_at(out), alone_at(tmp_path / "other"):
        pass


def test_one_output_has_one_lock_under_all_its_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    with alone_at(Path("out")), pytest.raises(ConfigError, match="is being written"), alone_at(tmp_path / "link/out"):
        pass


def test_locks_do_not_pile_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAE_DEPLOY_CACHE", str(tmp_path))
    with alone_at(tmp_path / "out"):
        (lock,) = (tmp_path / "outputs").iterdir()
    assert not lock.exists()


def test_without_a_folder_of_caches_a_line_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_text(tmp_path / "file", "")
    monkeypatch.setenv("MAE_DEPLOY_CACHE", str(tmp_path / "file"))
    with alone_at(tmp_path / "out"):
        assert "no lock: nothing keeps another process from --out" in capsys.readouterr().err
