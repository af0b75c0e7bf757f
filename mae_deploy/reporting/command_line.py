"""The command that made a result, as it can be typed again."""

from __future__ import annotations

import dataclasses
import shlex
from typing import Any

from mae_deploy.options import flags_of


def command_line(name: str, config: Any) -> str:
    """The command that makes these settings; what has its default is left out."""
    words = ["mae-deploy", name]
    options: list[str] = []
    for flag in flags_of(type(config)):
        value, default = config, _default_of(type(config), flag.path)
        for part in flag.path:
            value = getattr(value, part)
        if flag.argument:
            words += map(str, value) if isinstance(value, tuple) else [str(value)]
        elif value != default and value is not None:
            options += _option(flag.name, value, repeated=flag.kind == list[str])
    return shlex.join([*words, *options])


def _default_of(cls: type, path: tuple[str, ...]) -> Any:
    field = next(field for field in dataclasses.fields(cls) if field.name == path[0])
    found = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    for part in path[1:]:
        found = getattr(found, part)
    return found


def _option(name: str, value: Any, *, repeated: bool) -> list[str]:
    if isinstance(value, bool):
        return [name if value else f"--no-{name[2:]}"]
    if repeated:
        return [word for item in value for word in (name, item)]
    return [name, ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
