"""`mae-deploy schema`: the JSON Schema of a command's settings, with which editors complete and check recipes."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from mae_deploy.commands.config import SchemaConfig
from mae_deploy.config import field_docs, field_types, nearest, optional_of, to_plain
from mae_deploy.errors import ConfigError
from mae_deploy.options import settings_of_commands
from mae_deploy.recipe import EXTENDS
from mae_deploy.results import Result

_BOUNDS = {"at_least": "minimum", "above": "exclusiveMinimum", "at_most": "maximum", "below": "exclusiveMaximum"}
_TYPES: dict[Any, dict[str, Any]] = {
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"type": "number"},
    str: {"type": "string"},
    Path: {"type": "string"},
}


def run_schema(config: SchemaConfig) -> Result:
    """The JSON Schema (draft 2020-12) of the recipes of a command.

    Raises:
        ConfigError: there is no such command.
    """
    name, known = " ".join(config.command), settings_of_commands()
    if name not in known:
        raise ConfigError(f"COMMAND '{name}' is not a command", hint=nearest(name, list(known)))
    schema = settings_schema(known[name])
    extends = {"type": "string", "description": "The recipe that this one builds on: a name, or a file beside it."}
    schema["properties"] = {EXTENDS: extends, **schema["properties"]}
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": f"Settings of mae-deploy {name}"}
    return Result({**head, **schema}, as_json=True)


def settings_schema(cls: type, defaults: dict[str, Any] | None = None) -> dict[str, Any]:
    """The schema of a config class; nothing is required, as options may say it.

    Args:
        defaults: those of a section in this place, where they are not its class's.
    """
    docs, kinds = field_docs(cls), field_types(cls)
    properties: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        kind, optional = optional_of(kinds[field.name])
        if dataclasses.is_dataclass(kind):
            title = (inspect.getdoc(kind) or "").splitlines()[0]
            inner = settings_schema(kind, field.metadata.get("defaults"))  # type: ignore[arg-type]
            properties[field.name] = {"description": title, **inner}
            continue
        schema = _schema(kind, field.metadata.get("bounds", {}))
        if optional:
            schema = {"anyOf": [*schema.get("anyOf", [schema]), {"type": "null"}]}
        default = (defaults or {}).get(field.name, field.default)
        if default is not dataclasses.MISSING:
            schema["default"] = to_plain(default)
        properties[field.name] = {"description": docs.get(field.name, ""), **schema}
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _schema(kind: Any, bounds: dict[str, float]) -> dict[str, Any]:
    if get_origin(kind) is Literal:
        return {"enum": list(get_args(kind))}
    if get_origin(kind) is dict:
        return {"type": "object"}
    if get_origin(kind) is not tuple:
        limits = {_BOUNDS[bound]: limit for bound, limit in bounds.items()}
        return {**_TYPES[kind], **limits}
    inner = get_args(kind)
    one = _schema(inner[0], bounds)
    several: dict[str, Any] = {"type": "array", "items": one}
    if inner[-1] is not Ellipsis:
        several |= {"maxItems": len(inner)}  # one item stands for all
    # Also one value alone, and values with commas between them, as on the command line.
    return {"anyOf": [several, *one.get("anyOf", [one]), {"type": "string"}]}
