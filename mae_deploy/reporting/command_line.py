"""The command that made a report, as a line to copy."""

from __future__ import annotations

import functools
import shlex
from typing import Any

from mae_deploy.config import from_dict, to_dict
from mae_deploy.errors import ConfigError
from mae_deploy.flags import flags_of


def command_line(name: str, config: Any) -> str:
    """The command that makes these settings; an option without which they would be the same is left out."""
    words = ["mae-deploy", name]
    options: list[str] = []
    needed = to_dict(config)
    for flag in flags_of(type(config)):
        value = functools.reduce(getattr, flag.path, config)
        if flag.argument:
            words += map(str, value) if isinstance(value, tuple) else [str(value)]
            continue
        without = _without(needed, flag.path)
        if value is None or _makes(without, config):
            needed = without
        else:
            options += _option(flag.name, value, repeated=flag.kind == list[str])
    return shlex.join([*words, *options])


def next_command(name: str, *arguments: object, **options: object) -> str:
    """A command to go on with, as a line to copy."""
    words = [str(argument) for argument in arguments]
    for option, value in options.items():
        words += [f"--{option.replace('_', '-')}", str(value)]
    return shlex.join(["mae-deploy", name, *words])


def _without(values: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    first, *rest = path
    if not rest:
        return {name: value for name, value in values.items() if name != first}
    return {**values, first: _without(values[first], tuple(rest))}


def _makes(values: dict[str, Any], config: Any) -> bool:
    try:
        return bool(from_dict(type(config), values) == config)
    except ConfigError:
        return False


def _option(name: str, value: Any, *, repeated: bool) -> list[str]:
    if isinstance(value, bool):
        return [name if value else f"--no-{name[2:]}"]
    if repeated:
        return [word for item in value for word in (name, item)]
    return [name, ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
