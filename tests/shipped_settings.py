"""The settings that ship: those of every command, and the sections in them."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from pathlib import Path
from typing import Any

import mae_deploy
from mae_deploy.config import field_types, optional_of

ROOT = Path(mae_deploy.__file__).parent


def commands() -> list[type]:
    """The settings of every command."""
    stages = [ROOT / stage for stage in ("pretrain", "distill", "export")]  # rglob does not follow symbolic links
    found = []
    for path in sorted(
        {path for folder in (ROOT, *stages) for path in folder.rglob("config.py")} - {ROOT / "config.py"}
    ):
        name = ".".join(("mae_deploy", *path.relative_to(ROOT).with_suffix("").parts))
        found += [
            value
            for value in vars(importlib.import_module(name)).values()
            if inspect.isclass(value)
            and value.__module__ == name
            and (value.__doc__ or "").startswith("Settings of `mae-deploy")
        ]
    return found


def fields_of(cls: type, where: str = "") -> dict[str, tuple[type, dataclasses.Field[Any]]]:
    """Every setting by its path, with the class that has it."""
    found: dict[str, tuple[type, dataclasses.Field[Any]]] = {}
    for field in dataclasses.fields(cls):
        kind, _ = optional_of(field_types(cls)[field.name])
        if dataclasses.is_dataclass(kind):
            found |= fields_of(kind, f"{where}{field.name}.")  # type: ignore[arg-type]
        else:
            found[f"{where}{field.name}"] = (cls, field)
    return found


def sections_of(cls: type) -> list[type]:
    """The class and those of all sections in it."""
    kinds = [optional_of(kind)[0] for kind in field_types(cls).values()]
    sections: list[Any] = [kind for kind in kinds if dataclasses.is_dataclass(kind)]
    return [cls, *(inner for section in sections for inner in sections_of(section))]
