"""Which tensors of a file are missing, unexpected or of another shape, all of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mae_deploy.errors import CheckFailed
from mae_deploy.reporting.tables import Column, Table
from mae_deploy.results import Result

Shapes = dict[str, tuple[int, ...]]

_NAMED = 4
"""Tensors that the error's one line names of each sort; the table above it has every one."""


def check_names(
    tensors: dict[str, Tensor],
    expected: Shapes,
    file: Path,
    *,
    model: str = "",
    hint: str | None = None,
    names: Mapping[str, str] | None = None,
) -> None:
    """Raise CheckFailed, with every difference in its result, unless the tensors are exactly the expected ones by name
    and shape.

    Args:
        names: what renamed tensors are called in the file.
    """
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    misshapen = [name for name, shape in expected.items() if name in found and found[name] != shape]
    sorts = {
        "missing": missing,
        "unexpected": unexpected,
        "misshapen": [f"{name} {found[name]} instead of {expected[name]}" for name in misshapen],
    }
    problems = [
        f"{len(names)} {sort}: {', '.join(names[:_NAMED])}{' …' if len(names) > _NAMED else ''}"
        for sort, names in sorts.items()
        if names
    ]
    if not problems:
        return
    own = {name: {"in_file": called} for name, called in (names or {}).items() if called != name}
    data = {
        "source": str(file),
        "missing": [{"name": name, "expected": list(expected[name])} for name in missing],
        "unexpected": [{"name": name, **own.get(name, {}), "found": list(found[name])} for name in unexpected],
        "reshaped": [
            {"name": name, **own.get(name, {}), "found": list(found[name]), "expected": list(expected[name])}
            for name in misshapen
        ],
    }
    message = f"{file} does not fit{model and f' {model}'}: {'; '.join(problems)}"
    raise CheckFailed(message, hint=hint, result=Result(data, _table(data), failed=True))


def _table(data: dict[str, Any]) -> Table:
    """A row for each tensor that does not fit."""
    rows = [
        {
            "sort": sort,
            "tensor": entry["name"] + (f"\n({entry['in_file']})" if "in_file" in entry else ""),
            **{part: _written(entry[part]) for part in ("found", "expected") if part in entry},
        }
        for sort in ("missing", "unexpected", "reshaped")
        for entry in data[sort]
    ]
    columns = (
        Column("", "sort"),
        Column("tensor", "tensor"),
        Column("in the file", "found"),
        Column("expected", "expected"),
    )
    return Table(data["source"], columns, rows)


def _written(shape: list[int]) -> str:
    return "x".join(map(str, shape)) or "a number"
