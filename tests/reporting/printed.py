"""What a table on a terminal says."""

from __future__ import annotations

import re


def cells(printed: str) -> list[list[str]]:
    """The cells of every row of every printed table, of columns that are two spaces apart."""
    rows: list[list[str]] = []
    inside = False
    for line in printed.splitlines():
        if line.strip() and not line.strip("─ "):
            inside = True
        elif not line.strip():
            inside = False
        elif inside:
            rows.append(re.split(r"\s{2,}", line.strip()))
    return rows
