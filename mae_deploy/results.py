"""What a command found: plain data, as JSON or as a person reads it."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any


@dataclasses.dataclass(frozen=True)
class Result:
    """What a command found: data for `--json`, something rich can print for people."""

    data: Any
    view: Any = None
    failed: bool = False
    """It says why there is no result: people read it on stderr, above the error."""


def show(result: Any, *, as_json: bool) -> None:
    """Print a command's result on stdout; everything else that a command says goes to stderr."""
    result = result if isinstance(result, Result) else Result(result)
    if as_json:
        sys.stdout.write(json.dumps(result.data, indent=2, default=str) + "\n")
        return
    from rich.console import Console
    from rich.markup import escape

    console = Console(stderr=result.failed)
    if result.view is not None:
        console.print(result.view)
    elif isinstance(result.data, dict):
        lines = (
            f"[bold]{key}[/bold]  {escape(_shown(value))}" for key, value in result.data.items() if value is not None
        )
        console.print("\n".join(lines), highlight=False, soft_wrap=True)


def _shown(value: Any) -> str:
    if isinstance(value, tuple | list):
        return ",".join(map(_shown, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{k} {_shown(v)}" for k, v in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)
