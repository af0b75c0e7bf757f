"""A function in a process of its own: what it calls may hang, or end the process by a signal, as a library does that is
built for another CPU.
"""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from mae_deploy.errors import MaeDeployError
from mae_deploy.files import temporary_folder

_REQUEST, _ANSWER = "request.pickle", "answer.pickle"
"""Files in a folder that only this user can write to."""

T = TypeVar("T")


class Died(MaeDeployError):
    """The process did not come to its end: a signal, a time limit, an error that is no `MaeDeployError`."""


def run_alone(function: Callable[..., T], *arguments: Any, timeout: float | None = None) -> T:
    """What `function(*arguments)` returns in a process of its own; what it raises is raised here, and what it writes to
    stderr comes here where it ends well.

    Args:
        function: one of a module, which is imported there; its arguments and its result must be picklable.
        timeout: seconds after which the process is ended; None waits.

    Raises:
        Died: the process dies, does not end in time, or cannot be started, in one line.
        MaeDeployError: the function raises it.
    """
    with temporary_folder() as folder:
        Path(folder, _REQUEST).write_bytes(pickle.dumps((function, arguments)))
        try:
            done = subprocess.run(
                [sys.executable, "-m", __name__, folder],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                timeout=timeout,
            )
        except subprocess.TimeoutExpired:
            raise Died(f"does not end within {timeout:g} s") from None
        except OSError as error:
            raise Died(f"cannot be started: {error}") from error
        if done.returncode == 0:
            result, raised = pickle.loads(Path(folder, _ANSWER).read_bytes())
            if raised is not None:
                raise raised
            sys.stderr.write(done.stderr)
            return result  # type: ignore[no-any-return]
    raise Died(f"{_end(done.returncode)}{_last_line(done.stderr)}")


def _end(code: int) -> str:
    """How a process ended: `dies of SIGSEGV`."""
    if code >= 0:
        return f"ends with {code}"
    try:
        return f"dies of {signal.Signals(-code).name}"
    except ValueError:
        return f"dies of signal {-code}"


def _last_line(said: str) -> str:
    lines = said.strip().splitlines()
    return f": {lines[-1].strip()}" if lines else ""


def _answer(folder: Path) -> None:
    function, arguments = pickle.loads((folder / _REQUEST).read_bytes())
    answer: tuple[Any, MaeDeployError | None]
    try:
        answer = function(*arguments), None
    except MaeDeployError as error:
        answer = None, error
    (folder / _ANSWER).write_bytes(pickle.dumps(answer))


if __name__ == "__main__":
    _answer(Path(sys.argv[1]))
