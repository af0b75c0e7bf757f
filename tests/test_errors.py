"""What a user is told of errors that Python and libraries raise."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from mae_deploy import cli
from mae_deploy.errors import CheckFailed, ConfigError, MaeDeployError, explained, report_error, reporting_threads


@pytest.mark.parametrize(
    ("error", "message", "hint"),
    [
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
            "a process that decodes images has died: out of memory? (DataLoader worker (pid 7) is killed by",
            "fewer --num-workers",
        ),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "not enough memory on the GPU: CUDA", "smaller"),
        (MemoryError(), "there is not enough memory in this machine", "smaller --batch-size"),
        (OSError(errno.ENOSPC, "No space left on device", "/runs/a"), "/runs/a: No space left on device", None),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), "the working folder is not there", "another"),
    ],
)
def test_what_is_known_of_an_error(error: Exception, message: str, hint: str | None) -> None:
    found = explained(error)
    assert found is not None
    assert message in str(found)
    assert found.hint is None if hint is None else hint in str(found.hint)


def test_of_others_nothing_is_known() -> None:
    assert explained(ValueError("no")) is None


def test_of_several_processes_the_first_one_says_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr("mae_deploy.errors.time.sleep", waited.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert report_error(CheckFailed("the loss was not finite")) == 1
    assert capsys.readouterr().err == ""
    assert waited, "torchrun ends all processes as soon as one has ended"
    assert report_error(ValueError("only here")) == 1
    assert "ValueError: only here" in capsys.readouterr().err
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert report_error(MaeDeployError("both")) == 1
    assert capsys.readouterr().err == "error: both\n"


@pytest.mark.parametrize(("command", "code"), [("knn", 2), ("pretrain", 0)])
def test_commands_that_share_no_work_are_not_done_twice(
    command: str, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(
        cli,
        "_needs_torch",
        lambda _: type("Any", (), {"run_pretrain": staticmethod(lambda config: {"out": str(config.out)})}),
    )
    given = ["--init", "mae"] if command == "knn" else ["--out", str(tmp_path / "run")]
    assert cli.main([command, "data", *given]) == code
    said = capsys.readouterr().err
    assert ("error: knn runs in one process, not in 2\nhint: start it without torchrun" in said) is (command == "knn")


def test_a_name_that_a_library_cannot_take(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UnicodeEncodeError) as caught:
        os.fsdecode(b"runs/\xff").encode()
    assert report_error(caught.value) == 1
    said = "error: a library takes no name that is not UTF-8: runs/\\udcff\nhint: rename it\n"
    assert capsys.readouterr().err == said


def test_a_link_that_leads_to_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert report_error(RuntimeError("Symlink loop from '/a/out'")) == 1
    assert capsys.readouterr().err == "error: a link leads to itself: '/a/out'\n"


def test_an_error_that_quotes_a_file_at_length_keeps_its_beginning_and_end(capsys: pytest.CaptureFixture[str]) -> None:
    assert report_error(ConfigError("recipe.yaml: " + "\x1b" * 5000 + " is no number")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(r"error: recipe.yaml: \x1b\x1b")
    assert line.endswith(r"\x1b is no number")
    assert "[... 19," in line
    assert len(line) < 1000


def test_an_error_that_ends_a_thread_is_a_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(error: BaseException) -> None:
        raise error

    def fail_in_thread(error: BaseException) -> None:
        thread = threading.Thread(target=fail, args=(error,))
        thread.start()
        thread.join()

    said = list[object]()
    monkeypatch.setattr(threading, "excepthook", said.append)
    with reporting_threads():
        fail_in_thread(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), b"/events"))
        assert capsys.readouterr().err == "a thread ended: /events: No space left on device\n"
        monkeypatch.setenv("MAE_DEPLOY_DEBUG", "1")
        fail_in_thread(ValueError("a number"))
    assert capsys.readouterr().err == ""
    assert len(said) == 1, "with its traceback"
    fail_in_thread(ValueError("after the command"))
    assert len(said) == 2
