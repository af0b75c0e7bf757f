"""The options and arguments that the fields of a config class give a command."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from mae_deploy.config import field_docs, field_types, is_required, option_name, optional_of
from mae_deploy.hub import is_address, local
from mae_deploy.results import as_text

COMMON = "Common"
"""The heading of the options that every command has."""


@dataclasses.dataclass(frozen=True)
class Flag:
    """One config field as the command line shows it."""

    path: tuple[str, ...]
    """Where its value goes in the nested settings."""
    name: str
    """`--image-size`, or the metavar of a positional argument."""
    kind: Any
    """The Python type that Typer parses."""
    panel: str
    help: str
    default: str | None
    argument: bool
    required: bool
    takes: str
    """The metavar: `PATH`, `a|b|c`; what it can be completed with goes by it."""
    basic: bool
    """Whether `--help` shows it where a command has many options."""

    @property
    def variable(self) -> str:
        """The parameter name of the generated function."""
        return "_".join(self.path)

    @property
    def several(self) -> bool:
        """Whether it may be given several times."""
        return get_origin(self.kind) is list

    @property
    def unused(self) -> bool:
        """Whether the command accepts it only because every command does."""
        return self.help.startswith("Not used")

    @property
    def note(self) -> str:
        """What is said behind the help: that it is required, or its default; a flag that is off needs neither."""
        if self.required or self.default is None or (self.kind is bool and self.default == "no"):
            return "required" if self.required else ""
        return f"default: {self.default}"

    @property
    def spelling(self) -> str:
        """The option as it is written: a flag that is on has its `--no-` form beside it."""
        return f"{self.name}/--no-{self.name[2:]}" if self.kind is bool and self.default != "no" else self.name


def flags_of(
    cls: type,
    *,
    path: tuple[str, ...] = (),
    panel: str = "Options",
    defaults: dict[str, Any] | None = None,
    without: Sequence[str] = (),
) -> list[Flag]:
    """Every option and argument that a config class gives a command, sections flattened."""
    found: list[Flag] = []
    kinds, docs = field_types(cls), field_docs(cls)
    for field in dataclasses.fields(cls):
        kind, _ = optional_of(kinds[field.name])
        if dataclasses.is_dataclass(kind):
            section = (inspect.getdoc(kind) or field.name).splitlines()[0].rstrip(".")
            inner, left_out = (field.metadata.get(name) or None for name in ("defaults", "without"))
            found += flags_of(
                kind,  # type: ignore[arg-type]
                path=(*path, field.name),
                panel=section,
                defaults=inner,
                without=left_out or (),
            )
            continue
        if field.metadata.get("hidden") or field.name in without:
            continue
        required = is_required(field)
        default = (defaults or {}).get(field.name, field.default)
        argument = bool(field.metadata.get("argument"))
        found.append(
            Flag(
                path=(*path, field.name),
                name=option_name(field),
                kind=_typer_kind(kind, argument or bool(field.metadata.get("repeated"))),
                panel=panel if path else (COMMON if field.name in ("seed", "device") else "Options"),
                help=docs.get(field.name, ""),
                default=None if required or default in (None, ()) else as_text(default, ","),
                argument=argument,
                required=required,
                takes=field.metadata.get("metavar") or _metavar(kind),
                basic=required or argument or bool(field.metadata.get("basic")),
            )
        )
    return found


def with_local_bundles(settings: Any, flags: Sequence[Flag]) -> Any:
    """The settings with a folder in the place of each bundle on a model hub, fetched first; see `hub.local`."""
    for flag in flags:
        if "BUNDLE" not in flag.takes or len(flag.path) != 1:
            continue
        value = getattr(settings, flag.path[0])
        items = value if isinstance(value, tuple) else (value,)
        if any(isinstance(item, str | Path) and is_address(item) for item in items):
            found = tuple(type(item)(local(item)) if is_address(item) else item for item in items)
            settings = dataclasses.replace(settings, **{flag.path[0]: found if isinstance(value, tuple) else found[0]})
    return settings


_METAVARS = {
    int: "INTEGER",
    float: "NUMBER",
    str: "TEXT",
    Path: "PATH",
    bool: "",
    tuple[int, int]: "H[,W]",
    tuple[float, float]: "LOW[,HIGH]",
}


def _metavar(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    if get_origin(kind) is tuple and kind not in _METAVARS:
        return f"{_metavar(get_args(kind)[0])},…"
    return _METAVARS[kind]


def _typer_kind(kind: Any, several: bool) -> Any:
    """Typer reads a comma-separated tuple as text, but several positional arguments, and an option that may be
    repeated, as a list.
    """
    if get_origin(kind) is not tuple:
        return kind
    return list[get_args(kind)[0]] if several else str  # type: ignore[misc]
