"""A report as a page of Markdown, with its data as JSON and its picture beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mae_deploy.errors import MissingDependency
from mae_deploy.files import atomic_path, write_json, write_text
from mae_deploy.progress import notice
from mae_deploy.reporting.tables import Table


@dataclass(frozen=True, slots=True)
class Picture:
    """What a report shows below its tables."""

    caption: str
    draw: Callable[[Path], None]
    """Writes the PNG; raises MissingDependency without matplotlib."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """A report for people."""

    title: str
    command: str
    """The command that made it."""
    parts: Sequence[str | Table]
    """Paragraphs and tables, from top to bottom; a table's title is its heading."""
    picture: Picture | None = None

    def to_markdown(self, picture: str | None = None) -> str:
        """The page as text.

        Args:
            picture: the file with the picture, relative to the page; None: it was not drawn.
        """
        parts = [f"# {self.title}", f"```sh\n{self.command}\n```"]
        for part in self.parts:
            if isinstance(part, Table):
                parts += [*([f"## {part.title}"] if part.title else []), part.to_markdown()]
            else:
                parts.append(part)
        if self.picture is not None and picture is not None:
            parts.append(f"![{self.picture.caption}]({picture})")
        return "\n\n".join(parts) + "\n"


def write_report(folder: Path, stem: str, data: dict[str, Any], page: Page) -> None:
    """Write `stem.json`, `stem.md` and, where there is a picture and matplotlib is installed, `stem.png`, each in one
    step; a folder that is not there yet, or is empty, is written whole or not at all.
    """
    with _opened(folder) as place:
        picture = f"{stem}.png" if page.picture is not None else None
        if page.picture is not None:
            try:
                page.picture.draw(place / f"{stem}.png")
            except MissingDependency as error:
                notice("no picture:", f"{error}; {error.hint}")
                picture = None
        write_text(place / f"{stem}.md", page.to_markdown(picture))
        write_json(place / f"{stem}.json", data)


@contextmanager
def _opened(folder: Path) -> Iterator[Path]:
    if folder.is_dir() and any(folder.iterdir()):
        yield folder
        return
    with atomic_path(folder) as aside:
        aside.mkdir()
        yield aside
