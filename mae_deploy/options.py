"""Turn config dataclasses into Typer commands: every field an option, every section a heading of the help page."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import os
import pkgutil
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, TypeVar, cast, get_args, get_origin

import typer
from typer.core import TyperCommand

from mae_deploy.config import MISSING, Settings, from_dict, merge, to_yaml
from mae_deploy.errors import ConfigError, MaeDeployError, errors_of, raise_all
from mae_deploy.files import alone_at, refuse_to_overwrite, write_text
from mae_deploy.flags import COMMON, Flag, flags_of, with_local_bundles
from mae_deploy.help_page import Entry, page
from mae_deploy.images.limits import pixels_at_most
from mae_deploy.recipe import parse_assignment, read_recipe
from mae_deploy.results import show

C = TypeVar("C")

SMALL = 15
"""A command with at most so many options shows them all; one with more shows those that matter, and the others with
`--help-all`."""

Completions = Mapping[str, Callable[[str], Iterable[str]]]
"""For what an option takes (`CKPT`, `MODEL`), the values that begin with a text."""


_SETTINGS: dict[str, type | str] = {}
"""Of every command its config class, or where it is."""


def settings_of_commands() -> dict[str, type]:
    """The config class of every command by its name, `pretrain` or `data pack`."""
    return {name: pkgutil.resolve_name(cls) if isinstance(cls, str) else cls for name, cls in _SETTINGS.items()}


def command(
    app: typer.Typer,
    config: type[C] | str,
    *,
    name: str | None = None,
    panel: str | None = None,
    recipes: bool = False,
    completions: Completions | None = None,
) -> Callable[[Callable[[C], Any]], Callable[[C], Any]]:
    """Register `function(config)` as a command whose options are the fields of `config`.

    The function returns its result as plain data, or as a `Result` that also knows how to show itself. Its docstring is
    the help text; the first paragraph stands in the list of commands.

    Args:
        config: the class, or "module:Class", which is imported when the command is called or explained.
        panel: the heading under which the list of commands has it.
        recipes: also offer `--recipe`, `--set` and `--dump-config`.
    """

    def register(function: Callable[[C], Any]) -> Callable[[C], Any]:
        group = "data " if app.info.name == "data" else ""
        _SETTINGS[group + (name or function.__name__)] = config

        def build() -> TyperCommand:
            found = cast(type[C], pkgutil.resolve_name(config)) if isinstance(config, str) else config
            return _build(function, found, name or function.__name__, recipes, completions or {})

        cls = type("Deferred", (_Deferred,), {"build": staticmethod(functools.cache(build))})
        app.command(name or function.__name__, cls=cls, help=inspect.getdoc(function), rich_help_panel=panel)(_nothing)
        return function

    return register


class _Deferred(TyperCommand):
    """A command whose options are made when it is called: those of all commands, and the modules that hold their
    settings, would double the time of every `--help` and of every completion.
    """

    build: Callable[[], TyperCommand]

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        return self.build().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        return self.build().invoke(ctx)


def _nothing() -> None:
    """In place of a command that is not made yet."""


class _Command(TyperCommand):
    """A command whose help page is made from its flags."""

    flags: list[Flag]
    allow_extra_args = True  # they are reported with all else that is wrong

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the options; what is wrong with them is kept for `_runner`, which reports it with all the rest."""
        found: list[MaeDeployError] = []
        ctx.meta[_USAGE] = found
        while True:
            try:
                extra = super().parse_args(ctx, list(args))
            except Exception as error:  # Typer brings click's own classes, or click does, by version
                if (option := getattr(error, "option_name", None)) is None:
                    raise
                args = self._without(option, args, found)
                continue
            unknown = any(error.hint == _LISTED for error in found)
            # Behind an unknown option stands its value, or not: nobody knows.
            found += [ConfigError(f"unexpected argument '{word}'") for word in extra if not unknown]
            return []

    def _without(self, option: str, args: list[str], found: list[MaeDeployError]) -> list[str]:
        """The arguments without an option that cannot be read, and without its value where the nearest one has one."""
        at = next(i for i, word in enumerate(args) if word.partition("=")[0] == option or option == word[:2] != "--")
        spellings = {name: flag for flag in self.flags for name in flag.spelling.split("/") if name.startswith("-")}
        after = args[at + 1 :]
        if option in spellings or option.replace("--no-", "--", 1) in spellings:
            given = args[at].partition("=")[2]
            found.append(ConfigError(f"{option} takes no value, got '{given}'" if given else f"{option} needs a value"))
            return args[:at] + after
        close = difflib.get_close_matches(option, spellings, n=1)
        hint = f"did you mean '{close[0]}'?" if close else _LISTED
        found.append(ConfigError(f"there is no option '{args[at]}'", hint=hint))
        takes = bool(close) and spellings[close[0]].kind is not bool and "=" not in args[at]
        return args[:at] + after[1 if takes else 0 :]

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        arguments = [f"{flag.name}..." if flag.several else flag.name for flag in self.flags if flag.argument]
        required = [f"{flag.name} {flag.takes}" for flag in self.flags if flag.required and not flag.argument]
        return [*arguments, *required, "[OPTIONS]"]

    def format_help(self, ctx: Any, formatter: Any) -> None:
        formatter.write(self.page(ctx, everything=False))

    def page(self, ctx: Any, *, everything: bool) -> str:
        """The help page.

        Args:
            everything: with all options, not only those that matter.
        """
        flags = [flag for flag in self.flags if not flag.unused]
        options = [flag for flag in flags if not flag.argument]
        shown = flags if everything or len(options) <= SMALL else [flag for flag in flags if flag.basic]
        entries = [
            Entry(
                heading="Arguments" if flag.argument else flag.panel,
                name=flag.spelling,
                takes="" if flag.argument else flag.takes,
                text=flag.help,
                note=flag.note,
            )
            for flag in sorted(shown, key=lambda flag: flag.panel == COMMON)
        ]
        entries.append(Entry(COMMON, "--help", "Show this page and exit."))
        if len(flags) > len(shown) or everything:
            entries.append(Entry(COMMON, "--help-all", "Show every option and exit."))
        more = len(flags) - len(shown)
        return page(
            " ".join([ctx.command_path, *self.collect_usage_pieces(ctx)]),
            self.help or "",
            entries,
            last=f"… {more} more options: {ctx.command_path} --help-all" if more else "",
        )


def _build(
    function: Callable[[C], Any], config: type[C], name: str, recipes: bool, completions: Completions
) -> TyperCommand:
    flags = flags_of(config)
    run = _runner(function, config, flags, recipes)
    flags = [*flags, *(_RECIPE_FLAGS if recipes else []), _JSON_FLAG]
    parameters = [_CONTEXT, *(_parameter(flag, completions.get(flag.takes)) for flag in flags), _HELP_ALL]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
    app.command(name, cls=_Command, help=inspect.getdoc(function))(run)
    command = cast(_Command, typer.main.get_command(app))
    command.flags = flags
    return command


def _runner(function: Callable[[C], Any], config: type[C], flags: list[Flag], recipes: bool) -> Callable[..., None]:
    def run(context: typer.Context, **given: Any) -> None:
        as_json = bool(given.pop("as_json"))
        given.pop("help_all")
        dump: Path | None = given.pop("dump_config", None)
        found: list[MaeDeployError] = context.meta[_USAGE]
        values: dict[str, Any] = {}
        if recipes:
            command = context.info_name or ""
            values = _from_recipes(given.pop("recipe"), given.pop("assignments") or [], found, command, config)
        names: dict[str, str] = {}
        for flag in flags:
            if (value := given[flag.variable]) is not None:
                values = merge(values, _nest(flag.path, value))
                names[".".join(flag.path)] = flag.name
        settings = None
        try:
            if issubclass(config, Settings):
                values = config.completed(values)
            settings = from_dict(config, values, flags=names)
        except ConfigError as error:
            said = {str(one).partition(" ")[0] for one in found}
            found += [one for one in error.errors if str(one) not in {f"{name} is missing" for name in said}]
        if dump is not None and str(dump) != "-":
            found += errors_of(functools.partial(refuse_to_overwrite, dump, option="--dump-config", file=True))
        found += _processes(context.info_name or "", config)
        raise_all(found)
        assert settings is not None  # what kept it from being built was raised
        if dump is not None:
            write_text(dump, to_yaml(settings)) if str(dump) != "-" else sys.stdout.write(to_yaml(settings))
            return
        try:
            settings = with_local_bundles(settings, flags)
            with pixels_at_most(_max_pixels(settings)), _alone(settings, flags):
                result = function(settings)
        except MaeDeployError as error:
            if error.result is not None:
                show(error.result, as_json=as_json)
            raise
        if os.environ.get("RANK", "0") == "0":  # under torchrun, one process of all speaks
            show(result, as_json=as_json)

    return run


def _alone(settings: Any, flags: list[Flag]) -> AbstractContextManager[None]:
    """Keeps other processes from `--out` of a command that does its work alone; a run folder has a lock of its own."""
    out = next((flag for flag in flags if flag.path == ("out",)), None)
    if out is None or settings.out is None or getattr(settings, "shared", True):
        return nullcontext()
    return alone_at(settings.out, option=out.name)


def _max_pixels(settings: Any) -> int | None:
    """`--max-pixels` of a command that has it, in whatever section."""
    sections = [settings, *(getattr(settings, field.name) for field in dataclasses.fields(settings))]
    return next((value for part in sections if (value := getattr(part, "max_pixels", None)) is not None), None)


def _processes(command: str, config: type) -> list[ConfigError]:
    """Whether a command that does its work alone was started by torchrun, which would do it several times."""
    processes = os.environ.get("WORLD_SIZE", "1") if "LOCAL_RANK" in os.environ else "1"
    if processes == "1" or getattr(config, "shared", True):
        return []
    return [ConfigError(f"{command} runs in one process, not in {processes}", hint="start it without torchrun")]


def _from_recipes(
    recipe: str | None, assignments: list[str], found: list[MaeDeployError], command: str, config: type
) -> dict[str, Any]:
    """The settings of `--recipe`, and those of `--set` on top; what is wrong with these is added to `found`."""
    values: dict[str, Any] = {}
    if recipe is not None:
        try:
            values = read_recipe(recipe)
            _check_command(recipe, values, command, config)
        except ConfigError as error:
            raise_all([*found, *error.errors])  # what it leaves out would all be reported as missing
    for assignment in assignments:
        try:
            values = merge(values, parse_assignment(assignment))
        except ConfigError as error:
            found += error.errors
    return values


def _check_command(recipe: str, values: dict[str, Any], command: str, config: type) -> None:
    """Whether a recipe is of this command.

    Raises:
        ConfigError: another command has all of its settings, and this one has not.
    """

    def fits(cls: type) -> bool:
        return all(str(error).startswith(MISSING) for error in errors_of(lambda: from_dict(cls, values)))

    if not fits(config) and (other := [name for name, cls in settings_of_commands().items() if fits(cls)]):
        raise ConfigError(f"--recipe {recipe} is one of {other[0]}, not of {command}")


def _parameter(flag: Flag, complete: Callable[[str], Iterable[str]] | None) -> inspect.Parameter:
    kind: Any = _text(flag.kind)
    if get_origin(flag.kind) is Literal:
        complete = functools.partial(_starting_with, get_args(flag.kind))
    # Typer tells a completer's arguments by their names.
    completer = None if complete is None else lambda incomplete: list(complete(incomplete))
    if flag.argument:
        # Required arguments are checked after the recipe is read, which may name them.
        info = typer.Argument(metavar=flag.name, help=flag.help, autocompletion=completer)
    else:
        names = f"{flag.name}/--no-{flag.name[2:]}" if kind is bool and flag is not _JSON_FLAG else flag.name
        info = typer.Option(names, help=flag.help, hidden=flag.unused, autocompletion=completer)
    annotation = Annotated[Optional[kind], info]  # noqa: UP045  (a Literal has no | operator on Python 3.10)
    return inspect.Parameter(flag.variable, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _starting_with(choices: tuple[Any, ...], incomplete: str) -> list[str]:
    return [str(choice) for choice in choices if str(choice).startswith(incomplete)]


def _text(kind: Any) -> Any:
    """What Typer reads it as: text, which the settings check, with all that is wrong at once."""
    if get_origin(kind) is list:
        return list[Path] if get_args(kind) == (Path,) else list[str]
    return kind if kind in (bool, Path) else str


def _common(variable: str, name: str, kind: Any, takes: str, help: str, *, basic: bool = True) -> Flag:
    return Flag(
        path=(variable,),
        name=name,
        kind=kind,
        panel=COMMON,
        help=help,
        default="no" if kind is bool else None,
        argument=False,
        required=False,
        takes=takes,
        basic=basic,
    )


_RECIPE_FLAGS = [
    _common(
        "recipe",
        "--recipe",
        str,
        "RECIPE",
        "Settings from a YAML file, or the name of a recipe that ships with mae-deploy; flags win over it.",
    ),
    _common(
        "assignments",
        "--set",
        list[str],
        "KEY=VALUE",
        "Any setting as section.key=value, those without an option too; may be repeated.",
        basic=False,
    ),
    _common(
        "dump_config",
        "--dump-config",
        Path,
        "PATH",
        "Write the resolved settings as a recipe (- for stdout) and do nothing else.",
        basic=False,
    ),
]
_JSON_FLAG = _common("as_json", "--json", bool, "", "Print the result as JSON on stdout.")


def _show_all(ctx: typer.Context, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        typer.echo(cast(_Command, ctx.command).page(ctx, everything=True))
        raise typer.Exit


_USAGE = "mae_deploy.usage"
"""Key of Click's context for what is wrong with the options themselves."""

_LISTED = "--help-all lists the options"

_CONTEXT = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)

_HELP_ALL = inspect.Parameter(
    "help_all",
    inspect.Parameter.KEYWORD_ONLY,
    default=False,
    annotation=Annotated[
        bool, typer.Option("--help-all", is_eager=True, callback=_show_all, help="Show every option and exit.")
    ],
)


def _nest(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    for part in reversed(path):
        value = {part: value}
    return dict(value)
