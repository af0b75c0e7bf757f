"""The command where its standard streams are closed, or cannot be written."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

from mae_deploy.__main__ import _Unfailing

CLOSED = """
import os, sys
for number in range(3):
    os.close(number)
sys.stdin = sys.stdout = sys.stderr = None
from mae_deploy.__main__ import _open_streams
_open_streams()
file = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
for number in (1, 2):
    os.write(number, b"what a library says")
print("what we say")
print("what we say", file=sys.stderr, flush=True)
os.write(file, b"content")
"""


def test_no_file_gets_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", CLOSED, str(tmp_path / "file")], check=True)
    assert (tmp_path / "file").read_bytes() == b"content"


def test_a_log_that_cannot_be_written_ends_no_work() -> None:
    class Full:
        encoding = "utf-8"

        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def flush(self) -> None:
            raise BrokenPipeError

    stream = _Unfailing(Full())
    assert stream.write("words") == 5
    print("words", file=stream, flush=True)
    assert stream.encoding == "utf-8"
