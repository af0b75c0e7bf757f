"""Text as people, editors and shells write it."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable
from typing import Any

_LONGEST = 1_000_000


def decode_text(content: bytes, *, errors: str = "strict") -> str:
    """Text in UTF-8, or as its byte-order mark says: Notepad puts one in front of UTF-8, PowerShell's `>` writes
    UTF-16.

    Raises:
        UnicodeDecodeError: it is no such text, and `errors` is strict.
    """
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16", errors)
    return content.removeprefix(codecs.BOM_UTF8).decode("utf-8", errors)


def expand_range(item: Any) -> Iterable[Any]:
    """The whole numbers that `4-7` stands for; anything else, a range of more than a million too, is itself."""
    match = re.fullmatch(r"(\d{1,9})-(\d{1,9})", item) if isinstance(item, str) else None
    if match is None or not int(match[1]) <= int(match[2]) < int(match[1]) + _LONGEST:
        return (item,)
    return range(int(match[1]), int(match[2]) + 1)
