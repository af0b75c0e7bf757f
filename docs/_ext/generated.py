"""Pages that are written from the program: every command with its options, and every section of settings."""

from __future__ import annotations

import dataclasses
import posixpath
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer
from sphinx.application import Sphinx

from mae_deploy import cli
from mae_deploy.commands.doctor import NEEDS
from mae_deploy.config import field_docs, field_types, is_required, option_name, optional_of, resume_of
from mae_deploy.flags import Flag
from mae_deploy.options import settings_of_commands
from mae_deploy.results import as_text

COMMANDS = "reference/commands"
"""The folder of a page for each command."""
SETTINGS = "reference/settings"

ROOT_PAGES = {"examples": "examples/README.md", "changelog": "CHANGELOG.md", "contributing": "CONTRIBUTING.md"}
"""Pages that lie elsewhere in the repository."""

BELOW = {
    "commands": [f"{COMMANDS}/{name.replace(' ', '-')}" for name in settings_of_commands()],
    "recipes": [SETTINGS],
    "start": ["examples"],
    "architecture": ["changelog", "contributing"],
}
"""Of a page that somebody wrote, the generated ones that stand below it in the contents."""

Row = Sequence[str]


def setup(app: Sphinx) -> dict[str, Any]:
    """Write the pages before Sphinx looks for its sources."""
    app.connect("builder-inited", lambda app: write(Path(app.srcdir)))
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def write(folder: Path) -> None:
    """Write every generated page below the folder of the sources."""
    pages = {f"{COMMANDS}/{name.replace(' ', '-')}": page for name, page in command_pages()}
    root = Path(cli.__file__).parents[1]
    pages.update(
        {name: _moved((root / source).read_text(encoding="utf-8"), source) for name, source in ROOT_PAGES.items()}
    )
    for name, text in {**pages, SETTINGS: settings_page()}.items():
        path = folder / f"{name}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def _moved(text: str, source: str) -> str:
    """A page of the repository as it reads in docs/: its links lead where they led."""

    def link(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[1]))
        return f"]({posixpath.relpath(target, 'docs')}"

    return re.sub(r"\]\((?![\w+]+:|#)([^)#]+)", link, text)


# --- commands --------------------------------------------------------------------------------------------------------


def command_pages() -> Iterator[tuple[str, str]]:
    """Name and page of every command."""
    for name, command in _commands(typer.main.get_command(cli.app)):
        built = command.build()
        panels = {flag.path: "Accepted, and not used" if flag.unused else flag.panel for flag in built.flags}
        usage = " ".join([name, *built.collect_usage_pieces(None)])
        parts = [
            f"# {name}",
            built.help or "",
            f"```\nmae-deploy {usage}\n```",
            _needs(name),
            "Exit codes are those of [every command](../../commands.md#exit-codes).",
        ]
        arguments = ([f"`{flag.name}`", _prose(flag.help)] for flag in built.flags if flag.argument)
        parts += [_section("Arguments", ("argument", "what"), arguments)]
        options = [flag for flag in built.flags if not flag.argument]
        for heading in dict.fromkeys(panels[flag.path] for flag in options):
            rows = (_option(flag) for flag in options if panels[flag.path] == heading)
            parts += [_section(heading, ("option", "takes", "default", "what"), rows)]
        yield name, "\n\n".join(part for part in parts if part) + "\n"


def _commands(group: Any, within: str = "") -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, f"{within}{name} ")
        else:
            yield f"{within}{name}", command


def _needs(name: str) -> str:
    """The extras that a command needs, and what else of it needs others."""
    needs = [
        (entry, extras) for extras, names in NEEDS.items() for entry in names if f"{entry} ".startswith(f"{name} ")
    ]
    lines = [f"- `{entry}`: " + (f"`mae-deploy[{extras}]`" if extras else "no extra") for entry, extras in needs]
    return "\n".join(["What it needs:", "", *lines])


def _option(flag: Flag) -> Row:
    off = f" `--no-{flag.name[2:]}`" if flag.kind is bool and flag.name != "--json" else ""
    default = "required" if flag.required else _code(flag.default)
    key = f" (`{'.'.join(flag.path)}`)" if len(flag.path) > 1 else ""
    return f"`{flag.name}`{off}", " ".join(map(_code, flag.takes.split("|"))), default, _prose(flag.help) + key


# --- settings --------------------------------------------------------------------------------------------------------


def settings_page() -> str:
    """Every section of settings once, with the commands that have it."""
    users: dict[type, dict[str, list[str]]] = {}
    for command, cls in settings_of_commands().items():
        for path, found in _sections(cls):
            users.setdefault(found, {}).setdefault(path, []).append(command)
    parts = [
        "# Settings",
        "Every section of settings, as recipes and `--set` name them. What a command has beside its sections is on"
        " [its page](../commands.md). *May change* says whether a setting may be another when a command goes on with"
        " what it began, as `--resume` does.",
    ]
    for found, places in users.items():
        of = "; ".join(f"`{path}` of {', '.join(commands)}" for path, commands in places.items())
        rows = (_field(found, field) for field in dataclasses.fields(found) if not _is_section(found, field.name))
        columns = ("setting", "type", "default", "bounds", "may change", "what")
        parts += [_section(found.__name__, columns, rows, f"{_first_line(found)}\n\n{of}.")]
    return "\n\n".join(parts) + "\n"


def _sections(cls: type, path: str = "") -> Iterator[tuple[str, type]]:
    """The dataclasses within a dataclass, with the dotted key of each."""
    for name, kind in field_types(cls).items():
        inner, _ = optional_of(kind)
        if dataclasses.is_dataclass(inner):
            yield f"{path}{name}", inner  # type: ignore[misc]
            yield from _sections(inner, f"{path}{name}.")  # type: ignore[arg-type]


def _is_section(cls: type, name: str) -> bool:
    return dataclasses.is_dataclass(optional_of(field_types(cls)[name])[0])


def _field(cls: type, field: dataclasses.Field[Any]) -> Row:
    bounds = ", ".join(
        f"{name.replace('_', ' ')} {limit:g}" for name, limit in field.metadata.get("bounds", {}).items()
    )
    default = (
        "required" if is_required(field) else "" if field.default is dataclasses.MISSING else _plain(field.default)
    )
    may_change = {"free": "yes", "fixed": "no", "never": "", None: ""}[resume_of(cls, field)]
    option = "" if field.metadata.get("hidden") else f"`{option_name(field)}`: "
    kind = _kind(field_types(cls)[field.name])
    return f"`{field.name}`", kind, default, bounds, may_change, option + _prose(field_docs(cls).get(field.name, ""))


def _kind(kind: Any) -> str:
    kind, optional = optional_of(kind)
    if get_origin(kind) is Literal:
        said = ", ".join(f"`{value}`" for value in get_args(kind))
    elif get_origin(kind) is tuple:
        inner = get_args(kind)
        said = f"several of {_kind(inner[0])}" if inner[-1] is ... else ", ".join(map(_kind, inner))
    else:
        said = {int: "whole number", float: "number", str: "text", Path: "path", bool: "true or false"}.get(
            kind, getattr(get_origin(kind) or kind, "__name__", str(kind))
        )
    return f"{said} or null" if optional else said


# --- Markdown --------------------------------------------------------------------------------------------------------


def _section(heading: str, columns: Row, rows: Iterable[Row], text: str = "") -> str:
    """A heading with a table below it; nothing where there are no rows."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    if not lines:
        return ""
    head = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    return "\n\n".join(part for part in (f"## {heading}", text, "\n".join([*head, *lines])) if part)


def _prose(text: str) -> str:
    """A help text as Markdown: what would be markup there stands for itself."""
    for mark in "\\*_<>[]":
        text = text.replace(mark, f"\\{mark}")
    return text


def _code(text: str | None) -> str:
    return f"`{text}`" if text not in (None, "") else ""


def _plain(value: Any) -> str:
    return "" if value in (None, ()) else _code(as_text(value, ","))


def _first_line(cls: type) -> str:
    return (cls.__doc__ or "").strip().partition("\n")[0]
