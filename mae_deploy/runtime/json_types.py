"""Whether a JSON value is what an annotation says: TypedDict, list, dict, tuple, Literal, union or plain value."""

from __future__ import annotations

import re
import sys
import types
import typing
from typing import Any, Literal, Union, get_args, get_origin

from mae_deploy.errors import ConfigError

_LARGEST = sys.float_info.max
"""Beyond it lie infinity and whole numbers that no arithmetic takes; NaN is no number up to it."""


def check_keys(value: Any, hints: dict[str, Any], required: frozenset[str], where: str) -> None:
    """Raise ConfigError unless the mapping has the required keys, and each that has a hint is of its kind."""
    for name, kind in hints.items():
        if name in value:
            check(value[name], kind, where + name)
        elif name in required:
            raise ConfigError(f"manifest: '{where}{name}' is missing", hint="export the bundle again")


def check(value: Any, kind: Any, where: str) -> None:
    """Raise ConfigError, with the place in the manifest, unless the value is of the annotated kind."""
    if typing.is_typeddict(kind) and isinstance(value, dict):
        check_keys(value, typing.get_type_hints(kind), kind.__required_keys__, f"{where}." if where else "")
    elif get_origin(kind) is list and isinstance(value, list):
        for index, item in enumerate(value):
            check(item, get_args(kind)[0], f"{where}[{index}]")
    elif get_origin(kind) is dict and isinstance(value, dict):
        for key, item in value.items():
            check(item, get_args(kind)[1], f"{where}['{key}']")
    elif not _is_plain(value, kind):
        wanted = re.sub(r"<class '(\w+)'>|mae_deploy\.runtime\.manifest\.|typing\.", r"\1", str(kind))
        wanted = re.sub(r"\bNone(Type)?\b", "null", wanted)  # the one word or the other, by the version of Python
        raise ConfigError(f"manifest: '{where}' must be {wanted}, not {value!r:.80}", hint="export the bundle again")


def _is_plain(value: Any, kind: Any) -> bool:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return any(_is_plain(value, option) for option in arguments)
    if origin is list:
        return isinstance(value, list) and all(_is_plain(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_is_plain(item, arguments[1]) for item in value.values())
    if origin is tuple:  # JSON has lists only
        kinds = arguments[:1] * len(value) if isinstance(value, list) and arguments[-1] is Ellipsis else arguments
        return isinstance(value, list) and len(value) == len(kinds) and all(map(_is_plain, value, kinds))
    if origin is Literal:
        return isinstance(value, str) and value in arguments
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool) and abs(value) <= _LARGEST
    return kind is Any or (kind in (str, bool, type(None)) and isinstance(value, kind))
