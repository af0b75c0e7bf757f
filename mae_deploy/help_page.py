"""Help pages: headings, a column of names and a column of sentences, at the width of the terminal."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from typer.core import TyperGroup

WIDEST = 100
"""Columns of a page at most: longer lines are hard to read."""

BREAK = "\n  "
"""Between a name and what it takes, where the two do not fit on one line."""

OPTIONS = "Options"
"""The heading of the options of the program itself."""


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One line of a page: a command, an argument or an option."""

    heading: str
    name: str
    text: str
    takes: str = ""
    """What follows the name: `PATH`, `a|b|c`; nothing for a flag."""
    note: str = ""
    """What is said behind the text: the default, or that it is required."""


def page(usage: str, text: str, entries: Sequence[Entry], *, headings: Sequence[str] = (), last: str = "") -> str:
    """A help page, with colours where stdout is a terminal.

    Args:
        text: paragraphs, separated by empty lines.
        headings: those that come first, in this order; the others follow as the entries name them.
        last: the last line.
    """
    from rich.console import Console  # a moment that commands which print no page need not wait for
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    console.width = min(console.width, WIDEST)
    names = min(max((len(f"{entry.name} {entry.takes}") for entry in entries), default=0), console.width // 3)
    with console.capture() as captured:
        console.print(Text.assemble(("Usage: ", "bold"), usage))
        for paragraph in text.split("\n\n"):
            console.print(Padding(Text(" ".join(paragraph.split())), (1, 0, 0, 0)))
        for heading in dict.fromkeys([*headings, *(entry.heading for entry in entries)]):
            table = Table.grid(padding=(0, 2, 0, 0))
            table.add_column(width=names, overflow="fold")
            table.add_column()
            for entry in entries:
                if entry.heading == heading:
                    fits = len(entry.name) + 1 + len(entry.takes) <= names
                    takes = f"{' ' if fits else BREAK}{entry.takes}" if entry.takes else ""
                    name = Text.assemble((entry.name, "bold cyan"), (takes, "yellow"))
                    table.add_row(name, Text.assemble(entry.text, (f" [{entry.note}]" if entry.note else "", "dim")))
            if table.row_count:
                console.print()
                console.print(Text(heading, "bold"))
                console.print(Padding(table, (0, 0, 0, 2)))
        if last:
            console.print()
            console.print(Text(last))
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


class Group(TyperGroup):
    """A group of commands whose help has a panel for each kind of command."""

    panels: ClassVar[Sequence[str]] = ()
    """The panels in their order; without, as the commands name them."""
    last: ClassVar[str] = ""
    """The last line of the page."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the page."""
        usage = " ".join([ctx.command_path, *self.collect_usage_pieces(ctx)])
        entries = [
            *_commands(self, heading="Commands"),
            *(Entry(OPTIONS, option.opts[0], getattr(option, "help", "")) for option in self.get_params(ctx)),
        ]
        formatter.write(page(usage, self.help or "", entries, headings=self.panels, last=self.last))


def _commands(group: TyperGroup, *, heading: str, within: str = "") -> Iterable[Entry]:
    for name, command in group.commands.items():
        panel = str(getattr(command, "rich_help_panel", None) or heading)
        if isinstance(command, TyperGroup):
            yield from _commands(command, heading=panel, within=f"{name} ")
        else:
            yield Entry(panel, f"{within}{name}", (command.help or "").partition("\n\n")[0])
