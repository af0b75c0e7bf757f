"""What a shell completes an option's value with: names of models, engines and recipes, run folders, bundles."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from mae_deploy.options import Completions

_DEEPEST = 4
"""Folders are looked for this many levels below what has been typed."""

_MOST = 5000
"""Files and folders that one completion looks at: it must not search a data set."""

_RUN = ("config.yaml", "metadata.json")
"""Files that a run folder and a checkpoint folder hold."""

_BUNDLE = ("manifest.json",)


def _models(incomplete: str) -> list[str]:
    from mae_deploy.models.config import PRESETS

    return _beginning(PRESETS, incomplete)


def _engines(incomplete: str) -> list[str]:
    from mae_deploy.runtime.registry import ALIASES, ENGINES

    return _beginning(["auto", *dict.fromkeys([*ENGINES, *ALIASES.values(), *ALIASES])], incomplete)


def _recipes(incomplete: str) -> list[str]:
    from mae_deploy.recipe import RECIPES

    folder = os.path.dirname(incomplete)
    files = (os.path.join(folder, path.name) for path in sorted(Path(folder or ".").glob("*.y*ml")))
    return _beginning([*sorted(path.stem for path in RECIPES.glob("*.yaml")), *files], incomplete)


def _folders_with(*files: str) -> Callable[[str], list[str]]:
    def complete(incomplete: str) -> list[str]:
        folder = os.path.dirname(incomplete)
        return _beginning(_holding(folder, frozenset(files)), incomplete)

    return complete


def _holding(top: str, files: frozenset[str]) -> Iterator[str]:
    """Folders below `top` that hold one of the files, as they would be typed."""
    seen, waiting = 0, [(top, 0)]
    while waiting and seen < _MOST:
        folder, depth = waiting.pop(0)
        try:
            entries = sorted(os.scandir(folder or "."), key=lambda entry: entry.name)
        except OSError:
            continue
        seen += len(entries)
        if folder != top and any(entry.name in files for entry in entries):
            yield folder
        if depth < _DEEPEST:
            waiting += [
                (os.path.join(folder, entry.name), depth + 1)
                for entry in entries
                if entry.is_dir() and not entry.name.startswith(".")
            ]


def _beginning(values: Iterable[str], incomplete: str) -> list[str]:
    return [value for value in values if value.startswith(incomplete)]


COMPLETIONS: Completions = {
    "MODEL": _models,
    "ENGINE": _engines,
    "RECIPE": _recipes,
    "CKPT": _folders_with(*_RUN),
    "BUNDLE": _folders_with(*_BUNDLE),
    "CKPT|BUNDLE": _folders_with(*_RUN, *_BUNDLE),
}
"""By metavar. Where a folder holds none of what is looked for, the shell completes file names as it always does."""
