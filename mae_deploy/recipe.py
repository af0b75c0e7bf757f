"""Recipes: settings in YAML files, those that ship with the package by name, and single ones as `section.key=value`."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any

from mae_deploy import __version__
from mae_deploy.config import merge
from mae_deploy.errors import ConfigError, import_optional
from mae_deploy.files import read_json
from mae_deploy.packages import is_later, upgrade
from mae_deploy.text import decode_text

RECIPES = Path(__file__).parent / "recipes"
"""The recipes that ship with the package; `--recipe NAME` finds them without a path."""

RUN_CONFIG = "config.yaml"
"""The settings of a run, in its folder."""

ENVIRONMENT = "environment.json"
"""What a run ran on, beside its settings."""

EXTENDS = "extends"
"""The key of a recipe that names the recipe it builds on."""


def read_recipe(name: str | Path) -> dict[str, Any]:
    """A recipe's settings: a YAML file, or the name of one that ships with the package.

    A recipe may say `extends: NAME`, another recipe beside it or of the package: its own settings are laid on top of
    that one's.

    Raises:
        ConfigError: no such recipe, not a mapping of settings, or recipes that extend each other.
    """
    path = _find_recipe(Path(name))
    read = [path]
    values = _read_mapping(path)
    while (base := values.pop(EXTENDS, None)) is not None:
        path = _find_recipe(path.parent / f"{base}", name=str(base))
        if path in read:
            raise ConfigError(
                f"recipe {read[0]} extends itself, by way of"
                f" {' and '.join(recipe.stem for recipe in read[1:]) or 'itself'}"
            )
        read.append(path)
        values = merge(_read_mapping(path), values)
    return values


def settings_of_run(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a call; with `resume`, the run's own for those left out. Without `out`, the run is what stands in
    the place of DATA.

    Raises:
        ConfigError: there is no run in the place of DATA.
    """
    if values.get("resume") is not True:
        return values
    alone = values.get("out") is None and values.get("data") is not None
    if alone:
        values = {**{name: value for name, value in values.items() if name != "data"}, "out": values["data"]}
    if values.get("out") is None:
        return values
    stored = Path(values["out"]) / RUN_CONFIG
    if not stored.is_file():
        if alone:
            raise ConfigError(
                f"--resume {values['out']}: no run is there", hint="give a run folder, or DATA and --out to start a run"
            )
        return values
    check_written_by(stored.parent)
    return merge(read_recipe(stored), values)


def check_written_by(run: Path) -> None:
    """Whether a run may be gone on with: what a later version began, this one cannot repeat to the last bit.

    Raises:
        ConfigError: a later version has written it.
    """
    file = run / ENVIRONMENT
    version = read_json(file).get("mae_deploy") if file.is_file() else None
    if isinstance(version, str) and is_later(version, __version__):
        raise ConfigError(
            f"--resume of {run}: mae-deploy {version} has written it, this is {__version__}", hint=upgrade(version)
        )


def parse_assignment(text: str) -> dict[str, Any]:
    """`section.key=value` of `--set` as a nested mapping; the value is YAML."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {text}", hint="write it as --set section.key=value")
    yaml = import_optional("yaml", extra="train")
    try:
        nested: Any = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"--set {text}: the value is not YAML", hint="quote what YAML reads as its own, such as --set 'key=\"[\"'"
        ) from error
    for part in reversed(key.split(".")):
        nested = {part: nested}
    return typing.cast(dict[str, Any], nested)


def _find_recipe(path: Path, *, name: str | None = None) -> Path:
    if path.is_file():
        return path.resolve()
    shipped = RECIPES / f"{name or path}.yaml"
    if not shipped.is_file():
        known = sorted(p.stem for p in RECIPES.glob("*.yaml"))
        raise ConfigError(f"no recipe '{name or path}'", hint=f"give a YAML file or one of: {', '.join(known)}")
    return shipped


def _read_mapping(path: Path) -> dict[str, Any]:
    yaml = import_optional("yaml", extra="train")
    try:
        values = yaml.safe_load(decode_text(path.read_bytes()))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values or {}, dict):
        raise ConfigError(f"recipe {path} must be a mapping of settings, not {type(values).__name__}")
    return values or {}
