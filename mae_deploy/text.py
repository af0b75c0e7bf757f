"""Text as people, editors and shells write it."""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Iterable
from typing import Any

_LONGEST = 1_000_000
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but for tab and line end, those that turn the direction of writing, and halves of characters."""
_PREFIXES = ("", "k", "M", "G", "T", "P", "E")
_SECONDS = {"": 1.0, "us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}


def decode_text(content: bytes, *, errors: str = "strict") -> str:
    """Text in UTF-8, or as its byte-order mark says: Notepad puts one in front of UTF-8, PowerShell's `>` writes
    UTF-16.

    Raises:
        UnicodeDecodeError: it is no such text, and `errors` is strict.
    """
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16", errors)
    return content.removeprefix(codecs.BOM_UTF8).decode("utf-8", errors)


def parse_json(content: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is none, nested so deeply that no program of ours wrote it, or gives a name two values, of which
            every reader would choose its own.
    """
    try:
        return json.loads(content if isinstance(content, str) else decode_text(content), object_pairs_hook=_once)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"it has '{name:.80}' twice")
        found[name] = value
    return found


def printable(text: str) -> str:
    """Text from a file as a terminal may be shown it: control characters, which move and colour, are written out."""
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


def shortened(text: str, length: int = 900) -> str:
    """Text of at most about this length: of a longer one, the beginning and the end, which says what is wrong."""
    if len(text) <= length:
        return text
    head, tail = length * 2 // 3, length // 3
    return f"{text[:head]} [... {len(text) - head - tail:,} characters ...] {text[-tail:]}"


def may_name_a_file(path: str | os.PathLike[str]) -> bool:
    """Whether a path can be that of a file: none has a NUL or half a character, which YAML and JSON can write."""
    try:
        return b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        return False


def is_count(text: str) -> bool:
    """Whether it is a whole number from 1 on, of at most nine digits."""
    return text.isdecimal() and len(text) <= 9 and int(text) >= 1


def expand_range(item: Any) -> Iterable[Any]:
    """The whole numbers that `4-7` stands for; anything else, a range of more than a million too, is itself."""
    match = re.fullmatch(r"(\d{1,9})-(\d{1,9})", item) if isinstance(item, str) else None
    if match is None or not int(match[1]) <= int(match[2]) < int(match[1]) + _LONGEST:
        return (item,)
    return range(int(match[1]), int(match[2]) + 1)


def amount(count: float, unit: str) -> str:
    """A number with the unit's prefix that leaves one to three digits before the point: `1.9 GB`, `412 MFLOP`."""
    size, power = abs(count), 0
    while float(f"{size:.3g}") >= 1000 and power < len(_PREFIXES) - 1:
        size, power = size / 1000, power + 1
    return f"{'-' if count < 0 else ''}{size:.3g} {_PREFIXES[power]}{unit}"


def as_size(count: float) -> str:
    """Bytes in words: `1.9 GB`."""
    return amount(count, "B")


def duration(seconds: float) -> str:
    """Seconds as people say them: `0.23 s`, `45 s`, `12 min`, `3 h 20 min`, `2 d 4 h`."""
    if seconds < 59.5:
        return f"{seconds:.2g} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return " ".join([f"{minutes // 60} h", *([f"{minutes % 60} min"] if minutes % 60 else [])])
    hours = round(seconds / 3600)
    return " ".join([f"{hours // 24} d", *([f"{hours % 24} h"] if hours % 24 else [])])


def as_seconds(text: str) -> float | None:
    """What people write of times, in seconds: `5ms`, `30s`, `2 min`; a bare number is of seconds. None: it is none."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)\s*([a-z]*)", text.strip())
    return float(match[1]) * _SECONDS[match[2]] if match is not None and match[2] in _SECONDS else None
