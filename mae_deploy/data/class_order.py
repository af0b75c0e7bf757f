"""The order of classes: lists of their names, and what may be assumed where a classifier does not know them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mae_deploy.data.sources.base import ImageSource
from mae_deploy.errors import ConfigError
from mae_deploy.file_kinds import read_whole
from mae_deploy.progress import notice
from mae_deploy.text import decode_text, parse_json

_DIGITS = 1000
"""More of them are no number."""
_LONGEST = 1000
"""Characters of a class's name in a file."""
_SHOWN = 3
"""Classes that are listed with the numbers of their logits."""


def natural_order(names: Sequence[str]) -> tuple[str, ...]:
    """'2' before '10', without regard to case: how timm numbers class folders (its `natural_key`)."""

    def parts(name: str) -> list[tuple[bool, Any]]:
        pieces = re.split(r"(\d+)", name.lower())
        numbers = (piece.isdecimal() and len(piece) < _DIGITS for piece in pieces)
        return [(number, int(piece) if number else piece) for number, piece in zip(numbers, pieces, strict=True)]

    return tuple(sorted(names, key=parts))


def orders_differ(names: Sequence[str]) -> bool:
    """Whether natural order, timm's, and alphabetical order, torchvision's and ours, number these classes otherwise."""
    return natural_order(names) != tuple(sorted(names))


def numbered(names: Sequence[str]) -> str:
    """The first names with the numbers of their logits."""
    shown = ", ".join(f"{number} {name}" for number, name in enumerate(names[:_SHOWN]))
    return shown + (", …" if len(names) > _SHOWN else "")


def check_distinct(names: Sequence[str], where: object, *, hint: str | None = None) -> None:
    """Classes of one name would be counted as one.

    Raises:
        ConfigError: names the first that is there twice.
    """
    if double := [name for name, count in Counter(names).items() if count > 1]:
        places = [str(number) for number, name in enumerate(names) if name == double[0]]
        more = f", and {len(double) - 1} names more are there twice" if len(double) > 1 else ""
        raise ConfigError(f"{where} calls the classes {' and '.join(places)} '{double[0]}'{more}", hint=hint)


def read_class_names(file: Path) -> tuple[str, ...]:
    """Class names in the order of the logits: a name a line, or JSON: a list, names by number (`id2label`), numbers by
    name (`class_to_idx`).

    Raises:
        ConfigError: it cannot be read, is neither, leaves a number out, or has a name twice.
    """
    try:
        text = decode_text(read_whole(file))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read --class-names {file}: {error}") from error
    names = _from_json(text, file) if text.lstrip()[:1] in ("[", "{") else [line.strip() for line in text.splitlines()]
    while names and not names[-1]:
        names.pop()
    if not names or not all(names):
        raise ConfigError(
            f"--class-names {file} {'has an empty line' if names else 'is empty'}",
            hint="write a name a line, in the order of the logits, or JSON: a list, or id2label",
        )
    if len(longest := max(names, key=len)) > _LONGEST:
        raise ConfigError(f"--class-names {file} has a name of {len(longest):,} characters, '{longest[:40]} …'")
    check_distinct(names, f"--class-names {file}")
    return tuple(names)


def check_order(images: ImageSource, classifier: str) -> None:
    """A classifier without class names has its logits in the order of the data's classes: said, and refused where that
    order is not the only usual one.

    Raises:
        ConfigError: alphabetical and natural order number the classes otherwise.
    """
    names = images.class_names or ()
    alphabetical = tuple(sorted(names)) == names
    if alphabetical and orders_differ(names):
        raise ConfigError(
            f"{classifier} has no class names, and the classes of {images.name} are numbered otherwise in alphabetical"
            f" order ({numbered(names)}) and in natural order, timm's ({numbered(natural_order(names))})",
            hint="say the order of its logits: mae-deploy import … --class-names FILE, one name a line",
        )
    order = "alphabetical order" if alphabetical else "the order of the data"
    notice("classes:", f"{classifier} has no class names: its logits are taken in {order}, {numbered(names)}")


def _from_json(text: str, file: Path) -> list[str]:
    try:
        found = parse_json(text)
    except ValueError as error:
        raise ConfigError(f"--class-names {file} is no JSON: {error}") from error
    if isinstance(found, dict):
        count = len(found)
        if all(type(value) is int for value in found.values()):
            found = {str(number): name for name, number in found.items()}
        missing = next((number for number in range(count) if str(number) not in found), None)
        if missing is not None:
            raise ConfigError(f"--class-names {file} has {count} names, and none for the number {missing}")
        found = [found[str(number)] for number in range(count)]
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise ConfigError(f"--class-names {file} is no list of names", hint='such as ["ant", "bee"]')
    return [name.strip() for name in found]
