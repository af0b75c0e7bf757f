"""Frozen dataclasses are the single source of settings: strict reading, plain writing, help texts.

A field's docstring (the string below it) is its help text. Nested dataclasses are sections. What else there is to know
about a setting is said on its field, too: see `setting`.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import math
import operator
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

from mae_deploy.errors import ConfigError, MaeDeployError, import_optional, raise_all
from mae_deploy.results import as_text
from mae_deploy.text import expand_range, may_name_a_file

C = TypeVar("C")

MISSING = "missing setting"  # how it begins what is said of one that is required, where there are no options

Resume = Literal["fixed", "free", "never"]
"""Whether a setting may change where a command goes on with what it began: a run with `--resume`; a sweep, a pack or a
report that is called again. fixed: it must be what it was; free: it may change; never: the command always starts anew.
"""


class Settings:
    """What every section and every command's settings derive from, as frozen dataclasses.

    `class X(Settings, resume="fixed")` says it for all fields that say nothing; without it, each field has to. Values
    are checked when it is built: each against the bounds of its field, then all together by `faults`.
    """

    __slots__ = ()
    _resume: ClassVar[Resume | None] = None
    shared: ClassVar[bool] = False  # whether several processes, as torchrun starts them, share the command's work

    def __init_subclass__(cls, *, resume: Resume | None = None) -> None:
        if resume is not None:  # dataclass(slots=True) makes the class a second time, without keywords
            cls._resume = resume

    def __post_init__(self) -> None:
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        raise_all([e for f in fields for e in out_of_bounds(f, getattr(self, f.name), option_name(f))])
        self.resolve()
        raise_all(list(self.faults()))

    @classmethod
    def completed(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The plain values that a command was given, and for those left out what files say that they name.

        Raises:
            ConfigError: such a file is not there, or contradicts a value.
        """
        return values

    def resolve(self) -> None:
        """Put what the other settings say in the place of what was left out."""

    def faults(self) -> Iterator[MaeDeployError]:
        """What is wrong between settings that are each within their bounds; each names the option, the value received
        and what is accepted.
        """
        return iter(())


def setting(
    default: Any = dataclasses.MISSING,
    *,
    resume: Resume | None = None,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    flag: str | None = None,
    argument: bool = False,
    hidden: bool = False,
    repeated: bool = False,
    metavar: str | None = None,
    basic: bool = False,
) -> Any:
    """A dataclass field with what there is to know about it.

    Args:
        default: the default value; left out for a required setting.
        resume: whether it may change where a command goes on; default: what its class says.
        at_least: the bounds of a number, or of each number of a tuple; as are
        above:
        at_most:
        below: no number may be infinite.
        flag: the option's name where it is not the field's own.
        argument: a positional argument instead of an option.
        hidden: no option at all; `--recipe` and `--set` still reach it (architecture fields).
        repeated: a tuple of which each value is an option of its own, as its values may hold commas.
        metavar: what help says that it takes, where the type says too little: `CKPT`, `MODEL`; shells complete by it.
        basic: one of the few that `--help` shows where a command has many; required ones always are.
    """
    bounds = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    return dataclasses.field(
        default=default,
        metadata={
            "resume": resume,
            "bounds": {name: limit for name, limit in bounds.items() if limit is not None},
            "flag": flag,
            "argument": argument,
            "hidden": hidden,
            "repeated": repeated,
            "metavar": metavar,
            "basic": basic,
        },
    )


def section(cls: type[C], *without: str, **defaults: Any) -> C:
    """A nested config whose defaults differ from its class's in this place, `without` the options of some fields."""
    factory = functools.partial(cls, **defaults)
    return dataclasses.field(default_factory=factory, metadata={"defaults": defaults, "without": without})


# --- reading ---------------------------------------------------------------------------------------------------------


def from_dict(cls: type[C], values: dict[str, Any], *, where: str = "", flags: Mapping[str, str] | None = None) -> C:
    """Build a config dataclass from plain values; unknown keys and wrong types are errors.

    Args:
        flags: of values from the command line, the option that gave each; the others go by their key.

    Raises:
        ConfigError: everything that is wrong, each with its option or key, the value received and what is accepted.
    """
    found: list[MaeDeployError] = []
    config = _read(cls, values, where, flags, found)
    raise_all(found)
    return typing.cast(C, config)


def _read(
    cls: type[C], values: dict[str, Any], where: str, flags: Mapping[str, str] | None, found: list[MaeDeployError]
) -> C | None:
    """The config; None where something is wrong, which is added to `found`."""
    kinds = field_types(cls)  # type: ignore[arg-type]
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    arguments: dict[str, Any] = {}
    before = len(found)
    for key, value in values.items():
        if key not in fields:
            found.append(ConfigError(f"unknown setting '{where}{key!s:.80}'", hint=_elsewhere(cls, f"{key}", where)))
            continue
        name = (flags or {}).get(f"{where}{key}", f"{where}{key}")
        kind, _ = optional_of(kinds[key])
        if dataclasses.is_dataclass(kind) and isinstance(value, dict):
            value = merge(fields[key].metadata.get("defaults", {}), value)
            arguments[key] = _read(kind, value, f"{where}{key}.", flags, found)  # type: ignore[arg-type]
            continue
        try:
            arguments[key] = _coerce(kinds[key], value, name)
        except ConfigError as error:
            found.append(error)
        else:
            found += out_of_bounds(fields[key], arguments[key], name)
    for name, field in fields.items():
        if name not in values and is_required(field):
            missing = f"{MISSING} '{where}{name}'" if flags is None else f"{option_name(field)} is missing"
            hint = None if flags is None else field_docs(cls).get(name)  # type: ignore[arg-type]
            found.append(ConfigError(missing, hint=hint))
    if len(found) == before:
        try:
            return cls(**arguments)
        except ConfigError as error:
            found += error.errors
    return None


def typed(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    """Single values of a config class, each of its type (else ConfigError), without those that it does not know."""
    kinds = field_types(cls)
    return {name: _coerce(kinds[name], value, name) for name, value in values.items() if name in kinds}


def option_name(field: dataclasses.Field[Any]) -> str:
    """What the command line calls a setting: `--image-size`, `DATA`; the key of one that has no option."""
    if field.metadata.get("hidden"):
        return field.name
    plain = field.name.upper() if field.metadata.get("argument") else f"--{field.name.replace('_', '-')}"
    return field.metadata.get("flag") or plain


_BOUNDS: dict[str, Callable[[float, float], bool]] = {
    "at_least": operator.ge,
    "above": operator.gt,
    "at_most": operator.le,
    "below": operator.lt,
}


def out_of_bounds(field: dataclasses.Field[Any], value: Any, name: str) -> list[MaeDeployError]:
    """What a number, or one of a tuple, is not within; `name` is what to call the setting."""
    bounds: dict[str, float] = field.metadata.get("bounds", {})
    numbers = value if isinstance(value, tuple) else () if value is None else (value,)
    infinite = any(isinstance(number, float) and not math.isfinite(number) for number in numbers)
    if not infinite and all(_BOUNDS[bound](number, limit) for bound, limit in bounds.items() for number in numbers):
        return []
    words = [f"{bound.replace('_', ' ')} {limit:g}" for bound, limit in bounds.items()]
    accepted = " and ".join([*words, *["finite"] * (math.inf in map(abs, numbers) or not words)])
    each = "each of " if isinstance(value, tuple) else ""
    return [ConfigError(f"{each}{name} must be {accepted}, got {','.join(map(str, numbers))}")]


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over` laid on top, section by section."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


# --- writing ---------------------------------------------------------------------------------------------------------


def to_dict(config: Any) -> dict[str, Any]:
    """The config as plain JSON and YAML values; `from_dict` reads it back."""
    return {f.name: to_plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def to_yaml(config: Any) -> str:
    """The config as a YAML recipe."""
    yaml = import_optional("yaml", extra="train")
    return typing.cast(str, yaml.safe_dump(to_dict(config), sort_keys=False))


def resume_of(cls: type, field: dataclasses.Field[Any]) -> Resume | None:
    """Whether a setting may change where its command goes on; None: it is a section, or its class says nothing."""
    return field.metadata.get("resume") or getattr(cls, "_resume", None)


def fixed_settings(config: Any) -> dict[str, Any]:
    """The config as plain values without what may change where its command goes on."""
    fields = [field for field in dataclasses.fields(config) if resume_of(type(config), field) != "free"]
    values = ((field.name, getattr(config, field.name)) for field in fields)
    return {
        name: fixed_settings(value) if dataclasses.is_dataclass(value) else to_plain(value) for name, value in values
    }


def differences(old: Any, new: Any, *, where: str = "") -> list[str]:
    """The settings in which a command cannot go on, as 'section.key: old -> new': two configs of one class differ in
    them, and they may not change.
    """
    found: list[str] = []
    for field in dataclasses.fields(old):
        before, after = getattr(old, field.name), getattr(new, field.name)
        if before == after or resume_of(type(old), field) == "free":
            continue
        if dataclasses.is_dataclass(before) and dataclasses.is_dataclass(after):
            found += differences(before, after, where=f"{where}{field.name}.")
        else:
            found.append(f"{where}{field.name}: {as_text(before, ',')} -> {as_text(after, ',')}")
    return found


def nearest(word: str, known: list[str]) -> str:
    """A hint for a name that is not known: the nearest one that is, else all of them."""
    match = difflib.get_close_matches(word, known, n=1)
    return f"did you mean '{match[0]}'?" if match else f"known: {', '.join(known)}"


def _elsewhere(cls: type, key: str, where: str) -> str:
    """A hint for an unknown setting: one of that name in a section, else the nearest one here."""
    known = field_types(cls)
    inside = [n for n, kind in known.items() if dataclasses.is_dataclass(kind) and key in field_types(known[n])]
    return f"did you mean '{where}{inside[0]}.{key}'?" if inside else nearest(key, list(known))


# --- types and help --------------------------------------------------------------------------------------------------


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """Each field's resolved type, in order."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


@functools.cache
def field_docs(cls: type) -> dict[str, str]:
    """Each field's docstring: the string literal that follows it in the class body."""
    docs: dict[str, str] = {}
    body = _class_bodies(cls.__module__)[cls.__name__]
    for statement, after in itertools.pairwise(body):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(after, ast.Expr)
        ):
            docs[statement.target.id] = " ".join(ast.literal_eval(after.value).split())
    return docs


def is_required(field: dataclasses.Field[Any]) -> bool:
    """Whether a field has no default."""
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def optional_of(kind: Any) -> tuple[Any, bool]:
    """`(T, True)` for `T | None`, else `(kind, False)`."""
    if get_origin(kind) in (Union, types.UnionType):
        inner = [k for k in get_args(kind) if k is not type(None)]
        if len(inner) == 1 and len(get_args(kind)) == 2:
            return inner[0], True
    return kind, False


@functools.cache
def _class_bodies(module: str) -> dict[str, list[ast.stmt]]:
    # One parse a module: parsing a class at a time made --help take a second.
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {node.name: node.body for node in tree.body if isinstance(node, ast.ClassDef)}


def _coerce(kind: Any, value: Any, where: str) -> Any:
    kind, optional = optional_of(kind)
    if value is None and optional:
        return None
    if dataclasses.is_dataclass(kind):
        if isinstance(value, kind):  # type: ignore[arg-type]
            return value
    elif get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
        choices = [str(choice) for choice in get_args(kind)]
        close = difflib.get_close_matches(str(value)[:80], choices, n=1)
        raise ConfigError(
            f"{where} {value!r:.80} is not one of {', '.join(choices)}",
            hint=f"did you mean '{close[0]}'?" if close else None,
        )
    elif get_origin(kind) is tuple:
        return _coerce_tuple(get_args(kind), value, where)
    elif get_origin(kind) is dict and isinstance(value, dict):
        return value
    elif kind is Path and isinstance(value, str | Path) and may_name_a_file(value):
        return Path(value)
    elif kind is bool and isinstance(value, bool):
        return value
    elif kind is str and isinstance(value, str | Path):
        return str(value)
    elif kind in (int, float) and value is not None and not isinstance(value, bool | Path):
        # YAML reads 1e-3 as a string; an int field takes 3.0 but not 3.5.
        try:
            number = float(value)
            if kind is float and not math.isnan(number):
                return number
            if number == int(number):
                return int(value) if isinstance(value, int) else int(number)
        except (TypeError, ValueError, OverflowError):
            pass
    raise ConfigError(f"{where} {value!r:.80} is not {_describe(kind)}")


def _coerce_tuple(kinds: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if isinstance(value, str):
        separator = ";" if get_origin(kinds[0]) is tuple else ","
        value = [part for part in value.replace(" ", "").split(separator) if part]
    elif not isinstance(value, list | tuple):
        value = [value]
    value = [number for item in value for number in expand_range(item)] if kinds == (int, Ellipsis) else value
    if kinds[-1] is Ellipsis:
        return tuple(_coerce(kinds[0], item, where) for item in value)
    if len(value) == 1:  # --image-size 224 is 224,224
        value = list(value) * len(kinds)
    if len(value) != len(kinds):
        given = ",".join(map(str, value[:80]))
        raise ConfigError(f"{where} '{given:.80}' is not one value or {len(kinds)} separated by commas")
    return tuple(_coerce(kind, item, where) for kind, item in zip(kinds, value, strict=True))


def to_plain(value: Any) -> Any:
    """A value as JSON and YAML have it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, tuple):
        return [to_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _describe(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
    return names.get(kind, "a section of settings" if dataclasses.is_dataclass(kind) else f"a {kind.__name__}")
