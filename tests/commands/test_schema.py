"""`mae-deploy schema` describes recipes: all that ship are valid, and what is misspelt or out of bounds is not."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from mae_deploy.cli import main
from mae_deploy.commands.schema import settings_schema
from mae_deploy.config import merge
from mae_deploy.options import settings_of_commands
from mae_deploy.recipe import EXTENDS, RECIPES
from tests.shipped_settings import commands

TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
    "null": (type(None),),
}


LIMITS: dict[str, Callable[[Any, Any], bool]] = {
    "minimum": operator.ge,
    "exclusiveMinimum": operator.gt,
    "maximum": operator.le,
    "exclusiveMaximum": operator.lt,
}


def is_valid(value: Any, schema: dict[str, Any]) -> bool:
    """JSON Schema, as far as ours use it."""
    if "anyOf" in schema and not any(is_valid(value, one) for one in schema["anyOf"]):
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    if (kind := schema.get("type")) is not None:
        if not isinstance(value, TYPES[kind]) or (kind in ("integer", "number") and isinstance(value, bool)):
            return False
        if isinstance(value, dict) and schema.get("additionalProperties") is False:
            known = schema["properties"]
            return all(key in known and is_valid(inner, known[key]) for key, inner in value.items())
        if isinstance(value, list):
            return len(value) <= schema.get("maxItems", len(value)) and all(is_valid(v, schema["items"]) for v in value)
    return all(within(value, schema[name]) for name, within in LIMITS.items() if name in schema)


def schema_of(name: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["schema", *name.split()]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_every_command_has_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert {*settings_of_commands().values()} == {*commands()}
    for name in settings_of_commands():
        schema = schema_of(name, capsys)
        assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
        assert next(iter(schema["properties"])) == EXTENDS
        assert schema["additionalProperties"] is False


def test_what_it_says_of_a_setting(capsys: pytest.CaptureFixture[str]) -> None:
    settings = schema_of("finetune", capsys)["properties"]
    optim = settings["optim"]["properties"]
    assert optim["epochs"] == {
        "description": "Passes over the data.",
        "type": "integer",
        "minimum": 1,
        "maximum": 100_000,
        "default": 100,
    }
    assert optim["betas"]["default"] == [0.9, 0.999], "the default of its place, not of its class"
    assert settings["pool"]["enum"] == ["avg", "cls"]
    assert settings["init"]["anyOf"] == [{"type": "string"}, {"type": "null"}]
    assert settings["optim"]["additionalProperties"] is False


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda file: str(file.stem))
def test_shipped_recipes_are_valid(file: Any, capsys: pytest.CaptureFixture[str]) -> None:
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    fitting = [
        name for name in ("pretrain", "finetune", "linprobe", "distill") if is_valid(values, schema_of(name, capsys))
    ]
    assert fitting, f"no command's schema takes {file.name}"


@pytest.mark.parametrize(
    "wrong",
    [
        {"mask_ration": 0.5},
        {"optim": {"epoch": 3}},
        {"optim": {"epochs": 0}},
        {"optim": {"epochs": "many"}},
        {"mask_sampling": "rows"},
        {"mask_ratio": 1},
        {"model": {"image_size": [32, 32, 3]}},
    ],
)
def test_what_is_wrong_is_not_valid(wrong: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    schema = schema_of("pretrain", capsys)
    right = {"mask_ratio": 0.5, "optim": {"epochs": 3}, "model": {"image_size": [32, 48]}, "loop": {"tracker": "wandb"}}
    assert is_valid(right, schema)
    assert not is_valid(merge(right, wrong), schema)


def test_a_command_that_there_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", "pretrian"]) == 2
    assert capsys.readouterr().err == "error: COMMAND 'pretrian' is not a command\nhint: did you mean 'pretrain'?\n"


def test_nothing_infinite_is_in_a_schema() -> None:
    for command in commands():
        json.dumps(settings_schema(command), allow_nan=False)
