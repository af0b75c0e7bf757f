"""What Notepad and PowerShell put in front of a text does not become a part of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mae_deploy.files import read_json
from mae_deploy.text import amount, as_size, decode_text, duration, expand_range, is_count


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


def test_amounts() -> None:
    counts = {0: "0 B", 7: "7 B", 999: "999 B", 999.6: "1 kB", 1234: "1.23 kB", 25_300_000: "25.3 MB", 4e21: "4e+03 EB"}
    assert {count: as_size(count) for count in counts} == counts
    assert amount(3.14159e12, "FLOP/s") == "3.14 TFLOP/s"
    assert amount(-2048, "B") == "-2.05 kB"


def test_durations() -> None:
    seconds = {0: "0 s", 0.0234: "0.023 s", 7.26: "7.3 s", 59.4: "59 s", 59.6: "1 min", 754: "13 min", 3600: "1 h"}
    seconds |= {12_000: "3 h 20 min", 86_399: "1 d", 187_200: "2 d 4 h"}
    assert {count: duration(count) for count in seconds} == seconds


@pytest.mark.parametrize(("text", "is_one"), [("1", True), ("049", True), ("9" * 9, True), ("0", False), ("", False)])
def test_counts(text: str, is_one: bool) -> None:
    assert is_count(text) is is_one


@pytest.mark.parametrize("text", ["-1", "1.5", "²", " 1", "1_0", "9" * 10, "9" * 5000])
def test_what_counts_nothing(text: str) -> None:
    assert not is_count(text)
