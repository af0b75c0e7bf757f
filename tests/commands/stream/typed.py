"""`mae-deploy stream` as it is typed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mae_deploy.cli import main

COUNT = 14
"""Frames of the video."""


def stream(capsys: pytest.CaptureFixture[str], *arguments: str | Path, code: int = 0) -> tuple[dict[str, Any], str]:
    """The result of a command, and what it said beside it."""
    assert main(["stream", *map(str, arguments), "--bypass", "0.9", "--json"]) == code
    said = capsys.readouterr()
    found: dict[str, Any] = json.loads(said.out)
    return found, said.err


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path, code: int = 2) -> str:
    """The one line that an impossible command says."""
    assert main(["stream", *map(str, arguments)]) == code
    said = capsys.readouterr()
    assert not said.out
    return next(line for line in said.err.splitlines() if line.startswith("error: "))
