"""What Notepad and PowerShell put in front of a text does not become a part of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mae_deploy.files import read_json
from mae_deploy.text import decode_text, expand_range


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_byte_order_marks(encoding: str, tmp_path: Path) -> None:
    assert decode_text('{"é": 1}'.encode(encoding)) == '{"é": 1}'
    (tmp_path / "a.json").write_bytes('{"é": 1}'.encode(encoding))
    assert read_json(tmp_path / "a.json") == {"é": 1}


def test_no_text() -> None:
    with pytest.raises(UnicodeDecodeError):
        decode_text(b"caf\xe9")
    assert decode_text(b"caf\xe9", errors="surrogateescape") == "caf\udce9"


def test_ranges() -> None:
    assert list(expand_range("4-7")) == [4, 5, 6, 7]
    assert list(expand_range("3-3")) == [3]
    for item in ("7-4", "0-1000000", "4", "-4", "4-", "1-2-3", "a-b", 4, "9" * 30 + "-" + "9" * 31):
        assert list(expand_range(item)) == [item]
