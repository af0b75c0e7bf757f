"""Video files that mean harm."""

from __future__ import annotations

import functools
import io
import random
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np

Write = Callable[[Path], Path]


@functools.cache
def _video() -> bytes:
    """Twelve frames of 64x48."""
    written = io.BytesIO()
    with av.open(written, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(12):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), number * 20, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return written.getvalue()


def _file(name: str, change: Callable[[bytes], bytes]) -> Write:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(change(_video()))
        return folder / name

    return write


def _noise(seed: int, share: float) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        chance, found = random.Random(seed), bytearray(data)
        for _ in range(max(1, int(len(found) * share))):
            found[chance.randrange(len(found))] = chance.randrange(256)
        return bytes(found)

    return change


_PLAYLIST = b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n#EXTINF:1,\nhttp://127.0.0.1:9/x\n"
_CONCAT = b"ffconcat version 1.0\nfile /etc/passwd\n"

VIDEOS: dict[str, Write] = {
    "whole": _file("a.mp4", lambda data: data),
    "cut off": _file("a.mp4", lambda data: data[: len(data) // 2]),
    "of a header alone": _file("a.mp4", lambda data: data[:40]),
    "empty": _file("a.mp4", lambda data: b""),
    "zeros": _file("a.mp4", lambda data: bytes(len(data))),
    "text": _file("a.mp4", lambda data: b"hello"),
    "of 65,535 x 65,535": _file(
        "a.mp4", lambda data: data.replace(b"\x00\x40\x00\x30\x00\x48", b"\xff\xff\xff\xff\x00\x48")
    ),
    "of a box of 2^32": _file("a.mp4", lambda data: b"\xff\xff\xff\xff" + data[4:]),
    "of a box within itself": _file("a.mp4", lambda data: b"\x00\x00\x00\x08moov" * 5000 + data),
    "playlist of files": _file("a.mp4", lambda data: _PLAYLIST),
    "playlist by its name": _file("a.m3u8", lambda data: _PLAYLIST),
    "concatenation of files": _file("a.mp4", lambda data: _CONCAT),
    "device": lambda folder: Path("/dev/zero"),
    **{f"with 1 % of noise, {seed}": _file("a.mp4", _noise(seed, 0.01)) for seed in range(6)},
    "with one byte of noise": _file("a.mp4", _noise(99, 0.0)),
}
