"""The house stays one that a stranger reads: small folders, small modules, lines that fit a laptop."""

from __future__ import annotations

import ast
import subprocess
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("mae_deploy", "pretrain", "distill", "export")
MOST_MODULES, MOST_LINES, WIDTH = 20, 400, 120


def tracked(*patterns: str) -> list[Path]:
    """Files that git tracks, or every such file where this is no checkout (an unpacked source distribution)."""
    listed = subprocess.run(["git", "ls-files", "-z", *patterns], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    return [path for pattern in patterns for path in ROOT.rglob(pattern) if ".venv" not in path.parts]


def modules() -> list[Path]:
    """The sources, without tests and scripts."""
    return [path for path in tracked("*.py") if path.relative_to(ROOT).parts[0] in SOURCES]


def test_the_modules_are_found() -> None:
    assert len(modules()) > 200


def test_a_folder_holds_at_most_twenty_modules() -> None:
    folders = Counter(path.parent for path in modules() if path.name != "__init__.py")
    assert {folder: number for folder, number in folders.items() if number > MOST_MODULES} == {}


def test_a_module_has_at_most_four_hundred_lines() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in modules()}
    assert {path: length for path, length in lengths.items() if length > MOST_LINES} == {}


def test_every_package_says_what_it_is() -> None:
    silent = [
        path for path in modules() if path.name == "__init__.py" and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert silent == []


@pytest.mark.parametrize("pattern", ["*.py", "*.md"])
def test_lines_fit_a_laptop(pattern: str) -> None:
    long = [f"{path.relative_to(ROOT)}:{number}" for path in tracked(pattern) for number in long_lines(path)]
    assert long == []


def long_lines(path: Path) -> list[int]:
    """Numbers of the lines over 120 columns; in Markdown, of prose: not of tables, code and lines that are one link."""
    found, code = [], False
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if path.suffix == ".md":
            if line.lstrip().startswith("```"):
                code = not code
            if code or line.lstrip().startswith("|") or " " not in line.strip("- "):
                continue
        if len(line) > WIDTH:
            found.append(number)
    return found
