"""Recipes: settings in YAML files, those that ship with the package by name, and single ones as `section.key=value`."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any

from mae_deploy import __version__
from mae_deploy.config import merge
from mae_deploy.errors import ConfigError, import_optional, reason
from mae_deploy.files import read_json
from mae_deploy.packages import is_later, upgrade
from mae_deploy.text import as_size, decode_text

RECIPES = Path(__file__).parent / "recipes"
"""The recipes that ship with the package; `--recipe NAME` finds them without a path."""

RUN_CONFIG = "config.yaml"
"""The settings of a run, in its folder."""

ENVIRONMENT = "environment.json"
"""What a run ran on, beside its settings."""

_MOST_BYTES, _MOST_VALUES, _LONGEST = 1 << 17, 1 << 16, 1 << 12
"""Of a recipe and of a value in it; the largest that ship have 2 kB and 60 values."""

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
    try:
        nested = _parse_yaml(value)
    except ValueError as error:
        raise ConfigError(
            f"--set {text:.80}: the value is not YAML",
            hint="quote what YAML reads as its own, such as --set 'key=\"[\"'",
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
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"it has more than {as_size(_MOST_BYTES)}")
        values = _parse_yaml(decode_text(path.read_bytes()))
    except ValueError as error:
        raise ConfigError(f"recipe {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values or {}, dict):
        raise ConfigError(f"recipe {path} must be a mapping of settings, not {type(values).__name__}")
    return values or {}


def _parse_yaml(text: str) -> Any:
    """Plain values of a YAML text.

    Raises:
        ValueError: it is none, wants objects made, or is nested or repeats itself beyond what anybody wrote by hand.
    """
    yaml = import_optional("yaml", extra="train")
    try:
        loader = yaml.SafeLoader(text)
        document = loader.get_single_node()
        if document is None:
            return None
        _size(document, {})
        return loader.construct_document(document)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(reason(error)) from error
    except Exception as error:  # of any kind: a word with a tag, such as !!bool x, raises what its reader does
        raise ValueError(f"a word is not what its tag (!!int, !!bool, …) says: {reason(error)}") from error


def _size(node: Any, known: dict[int, int]) -> int:
    """How many values a part of a document has with each of its aliases written out: a few lines can stand for
    billions.

    Args:
        known: of nodes that were counted; 0: it is being counted, so a node that comes back to it holds itself.
    """
    if not isinstance(node.value, list):
        if len(node.value) > _LONGEST:
            raise ValueError(f"it has a value of {len(node.value)} characters")
        return 1
    if id(node) not in known:
        known[id(node)] = 0
        parts = [part for item in node.value for part in (item if isinstance(item, tuple) else (item,))]
        names = [name.value for name, _ in node.value if isinstance(name.value, str)] if node.id == "mapping" else []
        if len(set(names)) < len(names):
            raise ValueError(f"it has '{next(name for name in names if names.count(name) > 1):.80}' twice")
        known[id(node)] = 1 + sum(_size(part, known) for part in parts)
    if not 0 < known[id(node)] <= _MOST_VALUES:
        raise ValueError(
            "its aliases (*name) stand for too much" if known[id(node)] else "an alias (*name) holds itself"
        )
    return known[id(node)]
