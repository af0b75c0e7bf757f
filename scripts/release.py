#!/usr/bin/env python3
"""What a release needs, checked before it is built; prints its notes, or with `--recipe` the recipe for conda-forge.

python scripts/release.py v1.2.3
python scripts/release.py v1.2.3 --recipe dist/mae_deploy-1.2.3.tar.gz --url https://…/releases/download/v1.2.3
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def faults(tag: str, root: Path) -> list[str]:
    """What keeps a tag from being a release."""
    version = _one(r'^__version__ = "(.+)"$', root / "mae_deploy" / "__init__.py")
    found = [] if tag == f"v{version}" else [f"the tag is {tag}, and mae_deploy.__version__ is {version}: v{version}"]
    cited = _one(r"^version: (.+)$", root / "CITATION.cff")
    if cited != version:
        found.append(f"CITATION.cff has the version {cited}, not {version}")
    packed = _one(r'^  version: "(.+)"$', root / "recipe" / "recipe.yaml")
    if packed != version:
        found.append(f"recipe/recipe.yaml has the version {packed}, not {version}")
    if not section(root / "CHANGELOG.md", version):
        found.append(f"CHANGELOG.md has no section [{version}]: give [Unreleased] its number and its date")
    if not section(root / "docs" / "migration.md", version):
        found.append(f"docs/migration.md has no section {version}: say what to change, or that nothing is")
    return found


def section(page: Path, version: str) -> str:
    """The text below a version's heading, `## [1.2.3] - 2026-01-31` or `## 1.2.3`."""
    pattern = rf"^## \[?{re.escape(version)}\]?(?: [^\n]*)?\n(.*?)(?=^## |\Z)"
    match = re.search(pattern, page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return "" if match is None else match[1].strip()


def recipe(root: Path, sdist: Path, url: str) -> str:
    """The recipe with a source distribution in the place of the checkout."""
    text = (root / "recipe" / "recipe.yaml").read_text(encoding="utf-8")
    source = f"  url: {url}/{sdist.name}\n  sha256: {hashlib.sha256(sdist.read_bytes()).hexdigest()}\n"
    found, count = re.subn(r"^  path: \.\.\n", source, text, flags=re.MULTILINE)
    assert count == 1, "recipe/recipe.yaml has one source, the checkout"
    return found


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Exit code 0, or 1 with what is wrong on stderr."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tag")
    parser.add_argument("--recipe", type=Path, metavar="SDIST")
    parser.add_argument("--url")
    given = parser.parse_args(arguments)
    if found := faults(given.tag, root):
        print(*(f"error: {fault}" for fault in found), sep="\n", file=sys.stderr)
        return 1
    if given.recipe is not None:
        print(recipe(root, given.recipe, given.url or "."), end="")
    else:
        print(section(root / "CHANGELOG.md", given.tag.removeprefix("v")))
    return 0


def _one(pattern: str, path: Path) -> str:
    match = re.search(pattern, path.read_text(encoding="utf-8"), re.MULTILINE)
    return "nothing" if match is None else match[1]


if __name__ == "__main__":
    raise SystemExit(main())
