"""A function in a process of its own: what it returns and raises comes here, and its death is one line."""

from __future__ import annotations

import operator
import os
import sys
import time

import pytest

from mae_deploy.errors import ConfigError, MaeDeployError
from mae_deploy.runtime.alone import Died, run_alone
from mae_deploy.runtime.registry import open_graph


def test_what_it_returns_and_writes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_alone(operator.add, [1], [2]) == [1, 2]
    assert run_alone(os.getpid) != os.getpid()
    assert run_alone(exec, "import sys; sys.stderr.write('a warning')") is None
    assert capsys.readouterr() == ("", "a warning")


def test_what_it_raises(tmp_path: object) -> None:
    with pytest.raises(ConfigError, match="no ONNX file") as caught:
        run_alone(exec, f"from {open_graph.__module__} import *\nfrom pathlib import Path\nopen_graph(Path('none'))")
    assert (caught.value.exit_code, caught.value.hint) == (2, None)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("import os; os.abort()", "dies of SIGABRT"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "dies of SIGILL"),
        ("import sys; print('why', file=sys.stderr); sys.exit(3)", "ends with 3: why"),
        ("1 / 0", "ends with 1: ZeroDivisionError: division by zero"),
    ],
)
def test_how_it_dies(program: str, message: str) -> None:
    with pytest.raises(Died) as caught:
        run_alone(exec, program)
    assert str(caught.value) == message


def test_what_does_not_end_or_start(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Died, match=r"does not end within 0\.5 s"):
        run_alone(time.sleep, 60, timeout=0.5)
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(MaeDeployError, match=r"cannot be started: .*No such file or directory"):
        run_alone(os.getpid)
