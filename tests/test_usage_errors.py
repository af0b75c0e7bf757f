"""Every usage error of a call is reported at once, with the option, the value received and what is accepted."""

from __future__ import annotations

import math
from typing import Any

import pytest

from mae_deploy.cli import main
from mae_deploy.config import field_types, from_dict, option_name, optional_of
from mae_deploy.errors import ConfigError
from tests.shipped_settings import commands, fields_of


def nested(path: str, value: Any) -> dict[str, Any]:
    for part in reversed(path.split(".")):
        value = {part: value}
    found: dict[str, Any] = value
    return found


def outside(bounds: dict[str, float]) -> list[float]:
    """Values beyond each bound."""
    beyond = {"at_least": -1, "above": 0, "at_most": 1, "below": 0}
    return [limit + beyond[name] for name, limit in bounds.items() if limit != math.inf]


BOUNDED = [
    pytest.param(command, path, value, id=f"{command.__name__}-{path}-{value}")
    for command in commands()
    for path, (_, field) in fields_of(command).items()
    for value in outside(field.metadata.get("bounds", {}))
]
TYPED = [
    pytest.param(command, path, id=f"{command.__name__}-{path}")
    for command in commands()
    for path, (cls, field) in fields_of(command).items()
    if optional_of(field_types(cls)[field.name])[0] in (int, float, bool)
]


def test_many_are_checked() -> None:
    assert (len(BOUNDED) > 200, len(TYPED) > 150) == (True, True)


@pytest.mark.parametrize(("command", "path", "value"), BOUNDED)
def test_a_number_out_of_bounds_is_named(command: type, path: str, value: float) -> None:
    _, field = fields_of(command)[path]
    name = option_name(field)
    with pytest.raises(ConfigError) as caught:
        from_dict(command, nested(path, value), flags={path: name})
    errors = [str(error) for error in caught.value.errors]
    (error,) = [error for error in errors if " must be " in error and " is missing" not in error]
    assert error.removeprefix("each of ").startswith(f"{name} must be ")
    assert error.endswith(tuple(f"got {written}" for written in (value, float(value), f"{value},{value}")))


@pytest.mark.parametrize(("command", "path"), TYPED)
def test_a_value_of_another_type_is_named(command: type, path: str) -> None:
    _, field = fields_of(command)[path]
    with pytest.raises(ConfigError) as by_option:
        from_dict(command, nested(path, "x"), flags={path: option_name(field)})
    assert any(str(error).startswith(f"{option_name(field)} 'x' is not ") for error in by_option.value.errors)
    with pytest.raises(ConfigError) as by_recipe:
        from_dict(command, nested(path, "x"), flags={})
    assert any(str(error).startswith(f"{path} 'x' is not ") for error in by_recipe.value.errors)


def test_all_that_is_wrong_with_a_call(capsys: pytest.CaptureFixture[str]) -> None:
    call = "pretrain images --batch-sise 3 --epochs many --mask-ratio 2 --target pcb --set optim.lr=-1 --resum"
    assert main(call.split()) == 2
    assert sorted(capsys.readouterr().err.splitlines()) == [
        "error: --epochs 'many' is not a whole number",
        "error: --mask-ratio must be above 0 and below 1, got 2.0",
        "error: --out is missing",
        "error: --target 'pcb' is not one of pixels, pca, features",
        "error: optim.lr must be at least 0, got -1.0",
        "error: there is no option '--batch-sise'",
        "error: there is no option '--resum'",
        "hint: Run folder to write.",
        "hint: did you mean '--batch-size'?",
        "hint: did you mean '--resume'?",
        "hint: did you mean 'pca'?",
    ]


def test_options_without_a_value_and_with_one_too_many(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "more", "--json=yes", "--seed"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert sorted(line for line in lines if line.startswith("error")) == [
        "error: --json takes no value, got 'yes'",
        "error: --seed needs a value",
        "error: unexpected argument 'more'",
    ]
