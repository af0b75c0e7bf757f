"""What a command hands back, and how it is printed."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mae_deploy.text import printable


@dataclasses.dataclass(frozen=True)
class Items:
    """A list that is made item by item as it is printed: one of as many items as there are images is never held."""

    make: Callable[[], Iterator[Any]]


@dataclasses.dataclass(frozen=True)
class Result:
    """What a command found: data for `--json`, something rich can print for people."""

    data: Any
    """Plain values; those of a dictionary may be `Items`."""
    view: Any = None
    """Something rich can print, or `Items` that are lines."""
    failed: bool = False
    """It says why there is no result: people read it on stderr, above the error."""
    as_json: bool = False
    """JSON is what was asked for, with `--json` or without."""
    then: str | None = None
    """The command to go on with; people read it on stderr, below the result."""


def show(result: Any, *, as_json: bool) -> None:
    """Print a command's result on stdout; everything else that a command says goes to stderr."""
    result = result if isinstance(result, Result) else Result(result)
    if as_json or result.as_json:
        sys.stdout.writelines(_json(result.data))
        sys.stdout.write("\n")
        return
    if isinstance(result.view, Items):
        sys.stdout.writelines(f"{printable(line)}\n" for line in result.view.make())
        return
    from rich.console import Console
    from rich.markup import escape

    if os.environ.get("COLUMNS") == "0":  # rich would show nothing at all
        del os.environ["COLUMNS"]

    console = Console(stderr=result.failed)
    if result.view is not None and console.is_terminal:
        console.print(result.view)
    elif result.view is not None:  # in a file, rich would pad the last column
        with console.capture() as captured:
            console.print(result.view)
        console.file.writelines(f"{line.rstrip()}\n" for line in captured.get().splitlines())
    elif isinstance(result.data, dict):
        lines = (
            f"[bold]{key}[/bold]  {escape(as_text(value, ','))}"
            for key, value in result.data.items()
            if value is not None
        )
        console.print("\n".join(lines), highlight=False, soft_wrap=True)
    if result.then is not None:
        then = escape(printable(result.then))
        Console(stderr=True).print(f"[bold]Next:[/bold] {then}", highlight=False, soft_wrap=True)


def _json(data: Any) -> Iterator[str]:
    """JSON in pieces."""
    if not isinstance(data, dict) or not any(isinstance(value, Items) for value in data.values()):
        yield json.dumps(data, indent=2, default=str)
        return
    for place, (key, value) in enumerate(data.items()):
        yield f"{',' if place else '{'}\n  {json.dumps(key)}: "
        if not isinstance(value, Items):
            yield _indented(value, 2)
            continue
        opened = "["
        for item in value.make():
            yield f"{opened}\n    {_indented(item, 4)}"
            opened = ","
        yield "[]" if opened == "[" else "\n  ]"
    yield "\n}"


def _indented(value: Any, spaces: int) -> str:
    return json.dumps(value, indent=2, default=str).replace("\n", "\n" + " " * spaces)


def as_text(value: Any, comma: str = ", ") -> str:
    """A value in words, never as Python writes it: a dash for nothing, yes or no, items with commas between them."""
    if value is None or (isinstance(value, Mapping | tuple | list) and not value):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {as_text(item, comma)}" for name, item in value.items())
    if isinstance(value, tuple | list):
        return comma.join(as_text(item, comma) for item in value)
    return f"{value:g}" if isinstance(value, float) else printable(str(value))
