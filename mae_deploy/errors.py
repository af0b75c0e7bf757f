"""Errors that a user can act on: one line, a hint, and a documented exit code."""

from __future__ import annotations

import importlib
from types import ModuleType


class MaeDeployError(Exception):
    """The work failed. The command line prints the message and the hint, never a traceback."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class CheckFailed(MaeDeployError):
    """A check ran and its answer is no: parity missed, a hash differs, too many unreadable files."""


class ConfigError(MaeDeployError):
    """A value, a file name or a combination of options that cannot be used."""

    exit_code = 2


class MissingDependency(MaeDeployError):
    """An optional package or a device is absent; the hint names the extra that brings it."""

    exit_code = 3


def import_optional(module: str, *, extra: str) -> ModuleType:
    """Import an optional package, or say which extra installs it.

    Raises:
        MissingDependency: the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        raise MissingDependency(
            f"this needs the package '{name}', which cannot be imported ({error})",
            hint=f"pip install 'mae-deploy[{extra}]'",
        ) from error
