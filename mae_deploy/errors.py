"""Errors that a user can act on: one line, a hint, and a documented exit code."""

from __future__ import annotations

import errno
import importlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

from mae_deploy.packages import QUIET, is_hollow, remedy
from mae_deploy.text import printable, shortened

_FIRST_SAYS_IT = 5.0
"""Seconds that the other processes of a run leave it to the first one to say why they end."""

_MOST_ERRORS = 20
"""That are said of one call."""


class MaeDeployError(Exception):
    """The work failed. The command line prints the message and the hint, never a traceback."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None, result: object = None) -> None:
        super().__init__(message)
        self.hint = hint
        self.result = result
        """What was found before it failed; a command still prints it."""

    @property
    def errors(self) -> tuple[MaeDeployError, ...]:
        """Each of several, else the error itself."""
        return (self,)


class CheckFailed(MaeDeployError):
    """A check ran and its answer is no: parity missed, a hash differs, too many unreadable files."""

    def __init__(
        self, message: str, *, hint: str | None = None, result: object = None, details: Sequence[str] = ()
    ) -> None:
        """Args: details: what else the check found, a line each; the message has the first cause."""
        super().__init__(message, hint=hint, result=result)
        self.details = tuple(details)

    @property
    def errors(self) -> tuple[MaeDeployError, ...]:
        """The message and each detail; the hint comes after the last."""
        lines = (str(self), *self.details)
        return (*map(CheckFailed, lines[:-1]), CheckFailed(lines[-1], hint=self.hint))


class ConfigError(MaeDeployError):
    """A value, a file name or a combination of options that cannot be used."""

    exit_code = 2


class ConfigErrors(ConfigError):
    """Several at once: all that is wrong with a call."""

    def __init__(self, errors: Sequence[MaeDeployError]) -> None:
        super().__init__("; ".join(map(str, errors)), hint=next((e.hint for e in errors if e.hint), None))
        more = [ConfigError(f"and {len(errors) - _MOST_ERRORS} more")] if len(errors) > _MOST_ERRORS else []
        self._errors = (*errors[:_MOST_ERRORS], *more)

    @property
    def errors(self) -> tuple[MaeDeployError, ...]:
        """Each of them."""
        return self._errors


class MissingDependency(MaeDeployError):
    """An optional package or a device is absent; the hint names the extra that brings it."""

    exit_code = 3


def import_optional(module: str, *, extra: str) -> ModuleType:
    """Import an optional package, or a module of ours that needs one, or say which extra installs it.

    Raises:
        MissingDependency: a package is not installed, or cannot be loaded.
    """
    try:
        return import_whole(module)
    except Exception as error:
        top = module.partition(".")[0]
        name = (getattr(error, "name", None) or top).partition(".")[0] if isinstance(error, ImportError) else top
        if name == "mae_deploy" or (top == "mae_deploy" and not isinstance(error, ImportError)):
            raise
        raise MissingDependency(
            f"this needs the package '{name}', which cannot be imported ({reason(error)})",
            hint=remedy(name, f"pip install 'mae-deploy[{extra}]'", absent=isinstance(error, ModuleNotFoundError)),
        ) from error


def import_whole(module: str) -> ModuleType:
    """Import a module that somebody has installed, without reports to its makers unless the environment asks for them
    (`QUIET`).

    Raises:
        Exception: whatever it raises; ImportError where an uninstalled package has left its folder behind.
    """
    for name, value in QUIET.get(module.partition(".")[0], {}).items():
        os.environ.setdefault(name, value)
    found = importlib.import_module(module)
    if is_hollow(found):
        top = module.partition(".")[0]
        raise ImportError(f"of {top} only a folder is left, {next(iter(found.__path__))}", name=top)
    return found


def reason(error: Exception) -> str:
    """What an exception says in one line; of one that says nothing, its cause's or its type."""
    text = " ".join(str(error).split())
    cause = error.__cause__ or error.__context__
    return text or (reason(cause) if isinstance(cause, Exception) else type(error).__name__)


def explained(error: Exception) -> MaeDeployError | None:
    """What an error of Python or a library says to somebody who meets it; None: nothing is known of it."""
    text = " ".join(str(error).split())
    if "DataLoader worker" in text or "process pool was terminated abruptly" in text:
        return MaeDeployError(
            f"a process that decodes images has died: out of memory? ({text})",
            hint="fewer --num-workers (0 decodes in this process), a smaller --batch-size; in a container, more shared"
            " memory (docker run --shm-size 8g)",
        )
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        where = "on the GPU" if "CUDA" in text else "in this machine"
        return MaeDeployError(
            f"there is not enough memory {where}: {text}".removesuffix(": "),
            hint="a smaller --batch-size (with --accum-iter, the same step), or --precision bf16",
        )
    if "does not have a deterministic implementation" in text:
        return MaeDeployError(
            f"--deterministic: {text.partition(', but')[0]} on this device", hint="leave --deterministic out"
        )
    if isinstance(error, UnicodeEncodeError) and error.reason == "surrogates not allowed":
        return MaeDeployError(f"a library takes no name that is not UTF-8: {error.object}", hint="rename it")
    if isinstance(error, RuntimeError) and text.startswith("Symlink loop"):  # pathlib before Python 3.13
        return MaeDeployError(f"a link leads to itself: {text.removeprefix('Symlink loop from ')}")
    if isinstance(error, OSError) and error.strerror:
        names = [
            os.fsdecode(name) if isinstance(name, bytes) else str(name)
            for name in (error.filename, error.filename2)
            if name is not None
        ]
        if not names and error.errno == errno.ENOENT:  # of os.getcwd alone
            return MaeDeployError("the working folder is not there any more", hint="change to another one")
        return MaeDeployError(": ".join([*names[:1], error.strerror]))
    return None


def errors_of(check: Callable[[], object]) -> tuple[MaeDeployError, ...]:
    """What a check finds wrong, instead of raising it; none where all is well."""
    try:
        check()
    except ConfigError as error:
        return error.errors
    return ()


def raise_all(errors: Sequence[MaeDeployError]) -> None:
    """Raise what was found, at once; nothing where nothing was.

    Raises:
        ConfigError: the only one, or `ConfigErrors` of several.
    """
    if errors:
        raise errors[0] if len(errors) == 1 else ConfigErrors(errors)


@contextmanager
def reporting_threads() -> Iterator[None]:
    """An error that ends a thread within the block is a line, too; where the command needs what the thread did, it says
    so itself.
    """
    before = threading.excepthook

    def report(ended: threading.ExceptHookArgs) -> None:
        if isinstance(ended.exc_value, Exception) and os.environ.get("MAE_DEPLOY_DEBUG") != "1":
            error = explained(ended.exc_value) or ended.exc_value
            print(f"a thread ended: {printable(reason(error))}", file=sys.stderr)
        else:
            before(ended)

    threading.excepthook = report
    try:
        yield
    finally:
        threading.excepthook = before


def report_error(error: Exception) -> int:
    """Say on stderr what ended a command, in a line and a hint; returns the exit code."""
    error = error if isinstance(error, MaeDeployError) else explained(error) or error
    if os.environ.get("LOCAL_RANK", "0") != "0" and isinstance(error, MaeDeployError):
        # The first process of this machine says the same: torchrun would end it before it had.
        time.sleep(_FIRST_SAYS_IT)
        return error.exit_code
    for one in error.errors if isinstance(error, MaeDeployError) else (error,):
        known = isinstance(one, MaeDeployError)
        message = shortened(printable(" ".join(str(one).split())))
        print(f"error: {message if known else f'{type(one).__name__}: {message}'}", file=sys.stderr)
        if hint := one.hint if isinstance(one, MaeDeployError) else "MAE_DEPLOY_DEBUG=1 shows the traceback":
            print(f"hint: {printable(hint)}", file=sys.stderr)
    return error.exit_code if isinstance(error, MaeDeployError) else 1
