"""Turn config dataclasses into Typer commands: every field an option, every section a help panel."""

from __future__ import annotations

import dataclasses
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Optional, TypeVar, get_args, get_origin

import typer

from mae_deploy.config import (
    field_docs,
    field_types,
    from_dict,
    is_required,
    merge,
    optional_of,
    parse_assignment,
    read_recipe,
    to_yaml,
)
from mae_deploy.errors import ConfigError, MaeDeployError
from mae_deploy.files import write_text
from mae_deploy.results import _shown, show

C = TypeVar("C")

COMMON = "Common"
"""The help panel of the options that every command has."""


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

    @property
    def variable(self) -> str:
        """The parameter name of the generated function."""
        return "_".join(self.path)


def flags_of(
    cls: type, *, path: tuple[str, ...] = (), panel: str = "Options", defaults: dict[str, Any] | None = None
) -> list[Flag]:
    """Every option and argument that a config class gives a command, sections flattened."""
    found: list[Flag] = []
    kinds, docs = field_types(cls), field_docs(cls)
    for field in dataclasses.fields(cls):
        kind, _ = optional_of(kinds[field.name])
        if dataclasses.is_dataclass(kind):
            section = (inspect.getdoc(kind) or field.name).splitlines()[0].rstrip(".")
            inner = field.metadata.get("defaults")
            found += flags_of(kind, path=(*path, field.name), panel=section, defaults=inner)  # type: ignore[arg-type]
            continue
        if field.metadata.get("hidden"):
            continue
        required = is_required(field)
        default = (defaults or {}).get(field.name, field.default)
        argument = bool(field.metadata.get("argument"))
        found.append(
            Flag(
                path=(*path, field.name),
                name=field.metadata.get("flag")
                or (field.name.upper() if argument else f"--{field.name.replace('_', '-')}"),
                kind=_typer_kind(kind, argument or bool(field.metadata.get("repeated"))),
                panel=panel if path else (COMMON if field.name in ("seed", "device") else "Options"),
                help=docs.get(field.name, ""),
                default=None if required or default is None else _shown(default),
                argument=argument,
                required=required,
            )
        )
    return found


def command(
    app: typer.Typer, config: type[C], *, name: str | None = None, recipes: bool = False
) -> Callable[[Callable[[C], Any]], Callable[[C], Any]]:
    """Register `function(config)` as a command whose options are the fields of `config`.

    The function returns its result as plain data, or as a `Result` that also knows how to show itself.

    Args:
        recipes: also offer `--recipe`, `--set` and `--dump-config`.
    """

    def register(function: Callable[[C], Any]) -> Callable[[C], Any]:
        flags = flags_of(config)

        def run(**given: Any) -> None:
            as_json: bool = given.pop("as_json")
            dump: Path | None = given.pop("dump_config", None)
            values: dict[str, Any] = {}
            if recipes:
                recipe: str | None = given.pop("recipe")
                values = read_recipe(recipe) if recipe else {}
                for assignment in given.pop("assignments") or []:
                    values = merge(values, parse_assignment(assignment))
            for flag in flags:
                if (value := given[flag.variable]) is not None:
                    values = merge(values, _nest(flag.path, value))
            for flag in flags:
                if flag.required and not _has(values, flag.path):
                    raise ConfigError(f"{flag.name} is missing", hint=flag.help)
            settings = from_dict(config, values)
            if dump is not None:
                write_text(dump, to_yaml(settings)) if str(dump) != "-" else sys.stdout.write(to_yaml(settings))
                return
            try:
                result = function(settings)
            except MaeDeployError as error:
                if error.result is not None:
                    show(error.result, as_json=as_json)
                raise
            if os.environ.get("RANK", "0") == "0":  # under torchrun, one process of all speaks
                show(result, as_json=as_json)

        parameters = [_parameter(flag) for flag in flags]
        if recipes:
            parameters += _RECIPE_PARAMETERS
        parameters.append(_JSON_PARAMETER)
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        run.__doc__ = function.__doc__
        app.command(name or function.__name__)(run)
        return function

    return register


def _parameter(flag: Flag) -> inspect.Parameter:
    kind: Any = flag.kind
    if flag.argument:
        # Required arguments are checked after the recipe is read, which may name them.
        info = typer.Argument(metavar=flag.name, help=flag.help, show_default=False)
    else:
        names = [flag.name, f"--no-{flag.name[2:]}"] if kind is bool else [flag.name]
        info = typer.Option(
            "/".join(names),
            help=flag.help
            + (r" \[required]" if flag.required else "")
            + (rf" \[default: {flag.default}]" if flag.default is not None else ""),
            rich_help_panel=flag.panel,
            show_default=False,
        )
    annotation = Annotated[Optional[kind], info]  # noqa: UP045  (a Literal has no | operator on Python 3.10)
    return inspect.Parameter(flag.variable, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _typer_kind(kind: Any, several: bool) -> Any:
    """Typer reads a comma-separated tuple as text, but several positional arguments, and an option that may be
    repeated, as a list.
    """
    if get_origin(kind) is not tuple:
        return kind
    return list[get_args(kind)[0]] if several else str  # type: ignore[misc]


def _option(name: str, kind: Any, default: Any, *flags: str, help: str) -> inspect.Parameter:
    info = typer.Option(*flags, help=help, rich_help_panel=COMMON, show_default=False)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info])


_RECIPE_PARAMETERS = [
    _option(
        "recipe",
        str | None,
        None,
        "--recipe",
        help="Settings from a YAML file, or the name of a recipe that ships with mae-deploy; flags win over it.",
    ),
    _option(
        "assignments",
        list[str] | None,
        None,
        "--set",
        help="Any setting as section.key=value, those without an option too; may be repeated.",
    ),
    _option(
        "dump_config",
        Path | None,
        None,
        "--dump-config",
        help="Write the resolved settings as a recipe (- for stdout) and do nothing else.",
    ),
]
_JSON_PARAMETER = _option("as_json", bool, False, "--json", help="Print the result as JSON on stdout.")


def _nest(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    for part in reversed(path):
        value = {part: value}
    return dict(value)


def _has(values: dict[str, Any], path: tuple[str, ...]) -> bool:
    for part in path:
        if not isinstance(values, dict) or part not in values:
            return False
        values = values[part]
    return True
