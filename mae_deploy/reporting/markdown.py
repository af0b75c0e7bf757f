"""A report as a page of Markdown, with its data as JSON and its pictures beside it, and as one HTML file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mae_deploy.errors import MissingDependency
from mae_deploy.files import atomic_path, write_json, write_text
from mae_deploy.progress import notice
from mae_deploy.reporting.html import as_html
from mae_deploy.reporting.tables import Table


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture of a report."""

    caption: str
    draw: Callable[[Path], None]
    """Writes the PNG; raises MissingDependency without matplotlib."""
    name: str = ""
    """Tells its file from those of the page's other pictures."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """A report for people."""

    title: str
    command: str
    """The command that made it."""
    parts: Sequence[str | Table | Picture]
    """Paragraphs, tables and pictures, from top to bottom; a table's title is its heading."""

    def to_markdown(self, drawn: Mapping[str, str]) -> str:
        """The page as text.

        Args:
            drawn: by their names, the files of the pictures, relative to the page; others are left out.
        """
        parts = [f"# {self.title}", f"```sh\n{self.command}\n```"]
        for part in self.parts:
            if isinstance(part, Table):
                parts += [*([f"## {part.title}"] if part.title else []), part.to_markdown()]
            elif isinstance(part, str):
                parts.append(part)
            elif part.name in drawn:
                parts.append(f"![{part.caption}]({drawn[part.name]})")
        return "\n\n".join(parts) + "\n"


def write_report(folder: Path, stem: str, data: dict[str, Any], page: Page, *, html: bool = False) -> None:
    """Write `stem.json`, `stem.md` and, where there are pictures and matplotlib is installed, `stem.png` or
    `stem-NAME.png`, each in one step; a folder that is not there yet, or is empty, is written whole or not at all.

    Args:
        html: write `stem.html` as well, which holds its pictures.
    """
    with _opened(folder) as place:
        drawn: dict[str, str] = {}
        try:
            for picture in (part for part in page.parts if isinstance(part, Picture)):
                file = f"{stem}-{picture.name}.png" if picture.name else f"{stem}.png"
                picture.draw(place / file)
                drawn[picture.name] = file
        except MissingDependency as error:
            notice("no picture:", f"{error}; {error.hint}")
        text = page.to_markdown(drawn)
        write_text(place / f"{stem}.md", text)
        if html:
            write_text(place / f"{stem}.html", as_html(page.title, text, place))
        write_json(place / f"{stem}.json", data)


@contextmanager
def _opened(folder: Path) -> Iterator[Path]:
    if folder.is_dir() and any(folder.iterdir()):
        yield folder
        return
    with atomic_path(folder) as aside:
        aside.mkdir()
        yield aside
