"""An experiment of several trainings and measurements in a folder: what is finished in it is not done again, so that
the same command goes on after a kill.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mae_deploy.config import differences, from_dict, to_yaml
from mae_deploy.errors import ConfigError
from mae_deploy.files import read_json, write_json, write_text
from mae_deploy.recipe import read_recipe


def open_folder(config: Any, name: str) -> None:
    """Start the experiment, or go on with it where it is the same; `name` is the file of its settings.

    Raises:
        ConfigError: the folder is one of other settings, or holds something else.
    """
    stored = config.out / name
    if stored.is_file():
        before = from_dict(type(config), read_recipe(stored))
        if changed := differences(before, config):
            raise ConfigError(
                f"{config.out} was begun with other settings: {'; '.join(changed)}",
                hint="repeat the same options, or choose another --out",
            )
    elif config.out.exists() and (not config.out.is_dir() or any(config.out.iterdir())):
        raise ConfigError(f"--out {config.out} holds something else", hint="choose another --out")
    config.out.mkdir(parents=True, exist_ok=True)
    write_text(stored, to_yaml(config))


class Parts:
    """The finished parts of an experiment, each written as soon as it is there."""

    def __init__(self, path: Path | None) -> None:
        """Read what is finished; without a path, nothing is kept."""
        self.path = path
        self.found: dict[str, dict[str, Any]] = read_json(path) if path is not None and path.is_file() else {}

    @property
    def figures(self) -> dict[str, Any]:
        """All figures by name."""
        return {name: value for part in self.found.values() for name, value in part.items()}

    def has(self, part: str) -> bool:
        """Whether it is finished."""
        return part in self.found

    def do(self, part: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What it gave; it is done unless it is finished."""
        if part not in self.found:
            self.found[part] = work()
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                write_json(self.path, self.found)
        return self.found[part]


def slug(value: Any) -> str:
    """A value as part of a folder's name."""
    return re.sub(r"[^\w.+-]+", "-", str(value)).strip("-") or "none"
