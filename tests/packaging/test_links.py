"""Every relative link in the documentation points to a file of the repository."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]

LINK = re.compile(r"""\]\(<?([^)>\s]+)|\b(?:src|href)="([^"]+)"|^\[[^\]]+\]:\s*(\S+)""", re.MULTILINE)
"""`[text](target)`, `![text](target)`, `<img src="target">` and `[label]: target`."""

CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_point_to_files(page: Path) -> None:
    broken = [target for target in relative_links(page.read_text(encoding="utf-8")) if not points_to_file(page, target)]
    assert broken == []


def test_links_are_found_in_every_notation() -> None:
    text = (
        '[a](one.md#part) ![b](two.png "title") <img src="three.png">\n[c]: four.md\n[d](https://e.org) [e](#here)'
        " `[f](g)`\n```\n[h](i)\n```"
    )
    assert relative_links(text) == ["one.md", "two.png", "three.png", "four.md"]


def relative_links(text: str) -> list[str]:
    """Targets inside the repository, without their fragments."""
    targets = ["".join(groups) for groups in LINK.findall(CODE.sub("", text))]
    return [unquote(target.partition("#")[0]) for target in targets if not re.match(r"[a-z]+:|#", target)]


def points_to_file(page: Path, target: str) -> bool:
    path = (page.parent / target).resolve()
    return path.is_relative_to(ROOT) and path.exists()
