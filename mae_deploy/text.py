"""Text as editors and shells write it."""

from __future__ import annotations

import codecs


def decode_text(content: bytes, *, errors: str = "strict") -> str:
    """Text in UTF-8, or as its byte-order mark says: Notepad puts one in front of UTF-8, PowerShell's `>` writes
    UTF-16.

    Raises:
        UnicodeDecodeError: it is no such text, and `errors` is strict.
    """
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16", errors)
    return content.removeprefix(codecs.BOM_UTF8).decode("utf-8", errors)
