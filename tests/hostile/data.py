"""Data sets that mean harm: tables, tar shards, archives of arrays, lists of paths."""

from __future__ import annotations

import io
import json
import os
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

Write = Callable[[Path], Path]
"""Writes data below a folder; returns what is given as DATA."""


def _png() -> bytes:
    written = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (25, 10, 3), np.uint8)).save(written, "PNG")
    return written.getvalue()


def _table(columns: Callable[[], dict[str, object]], **metadata: str) -> Write:
    def write(folder: Path) -> Path:
        table = pyarrow.table(columns())
        pyarrow.parquet.write_table(table.replace_schema_metadata(metadata), folder / "train.parquet")
        return folder / "train.parquet"

    return write


def _parquet(change: Callable[[bytes], bytes]) -> Write:
    def write(folder: Path) -> Path:
        path = _table(lambda: {"image": [_png()] * 12, "label": list(range(12))})(folder)
        path.write_bytes(change(path.read_bytes()))
        return path

    return write


def _member(
    name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "", size: int | None = None
) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(content) if size is None else size
    return info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)


def _tar(*members: bytes, end: bytes = bytes(1024)) -> Write:
    def write(folder: Path) -> Path:
        (folder / "shards").mkdir()
        (folder / "shards/a.tar").write_bytes(b"".join(members) + end)
        return folder / "shards"

    return write


def _images(number: int = 12) -> tuple[bytes, ...]:
    return tuple(_member(f"{index:03}.png", _png()) for index in range(number))


def _index(edit: Callable[[dict[str, object]], object]) -> Write:
    """An index beside a whole shard."""

    def write(folder: Path) -> Path:
        shards = _tar(*_images())(folder)
        content = (shards / "a.tar").read_bytes()
        size = len(_png())
        entry: dict[str, object] = {
            "name": "a.tar",
            "bytes": len(content),
            "images": 12,
            "names": [f"{index:03}.png" for index in range(12)],
            "offsets": [512 + index * (512 + -(-size // 512) * 512) for index in range(12)],
            "sizes": [size] * 12,
            "labels": [-1] * 12,
        }
        found = edit(entry)
        words = found if isinstance(found, bytes) else json.dumps({"format": 1, "shards": [entry]}).encode()
        (shards / "index.json").write_bytes(words)
        return shards

    return write


def _bomb(folder: Path) -> Path:
    """A table of a column that unpacks to 4 GB."""
    column = pyarrow.DictionaryArray.from_arrays(np.zeros(1 << 10, np.int32), pyarrow.array([bytes(1 << 22)]))
    pyarrow.parquet.write_table(pyarrow.table({"image": column}), folder / "train.parquet")
    return folder / "train.parquet"


def _arrow(folder: Path) -> Path:
    (folder / "a.arrow").write_bytes(b"ARROW1\0\0" + bytes(range(256)) * 4)
    return folder / "a.arrow"


def _list(content: bytes) -> Write:
    def write(folder: Path) -> Path:
        (folder / "list.txt").write_bytes(content)
        return Path(f"@{folder / 'list.txt'}")

    return write


def _deep_folder(folder: Path) -> Path:
    path = folder / "deep"
    path.mkdir()
    for _ in range(400):
        path = path / "d"
        path.mkdir()
    (path / "a.png").write_bytes(_png())
    return folder / "deep"


def _circle(folder: Path) -> Path:
    (folder / "circle").mkdir()
    (folder / "circle/again").symlink_to(folder / "circle")
    for index in range(12):
        (folder / f"circle/{index}.png").write_bytes(_png())
    return folder / "circle"


def _strange_names(folder: Path) -> Path:
    (folder / "names").mkdir()
    for name in (b"\x1b[2J.png", b"new\nline.png", b"\xff\xfe.png", b"-rf.png", b"[bold].png", b"*.png", b"'\".png"):
        path = os.path.join(os.fsencode(folder / "names"), name)
        with open(path, "wb") as file:
            file.write(_png() if name != b"\xff\xfe.png" else b"no image")
    return folder / "names"


_LARGE = 1 << 40

DATA: dict[str, Write] = {
    "table of other columns": _table(lambda: {"a": [1, 2], "b": ["x", "y"]}),
    "table of no rows": _table(lambda: {"image": pyarrow.array([], pyarrow.binary())}),
    "table of no columns": _table(dict),
    "table of numbers as images": _table(lambda: {"image": [1, 2, 3], "label": [0, 1, 2]}),
    "table of nothing as images": _table(
        lambda: {"image": pyarrow.array([None] * 12, pyarrow.binary()), "label": [0] * 12}
    ),
    "table of text as images": _table(lambda: {"image": ["/etc/passwd"] * 12, "label": [0] * 12}),
    "table of paths as images": _table(
        lambda: {"image": [{"bytes": None, "path": "/etc/passwd"}] * 12, "label": [0] * 12}
    ),
    "table of labels of 2^62": _table(lambda: {"image": [_png()] * 12, "label": [1 << 62] * 12}),
    "table of labels below zero": _table(lambda: {"image": [_png()] * 12, "label": [-5] * 12}),
    "table of labels that are floats": _table(lambda: {"image": [_png()] * 12, "label": [0.5] * 12}),
    "table of labels that are lists": _table(lambda: {"image": [_png()] * 12, "label": [[1]] * 12}),
    "table whose words are no JSON": _table(lambda: {"image": [_png()] * 12, "label": [0] * 12}, huggingface="{"),
    "table whose words are a list": _table(lambda: {"image": [_png()] * 12, "label": [0] * 12}, huggingface="[1]"),
    "table whose words are deep": _table(
        lambda: {"image": [_png()] * 12, "label": [0] * 12}, huggingface="[" * 50_000 + "]" * 50_000
    ),
    "table cut off": _parquet(lambda data: data[: len(data) // 2]),
    "table without its end": _parquet(lambda data: data[:-9]),
    "table of garbage in the middle": _parquet(lambda data: data[:200] + bytes(range(256)) + data[456:]),
    "table of garbage at the end": _parquet(lambda data: data[:-200] + bytes(192) + data[-8:]),
    "table of a footer of 2^31": _parquet(lambda data: data[:-8] + struct.pack("<I", 2**31) + b"PAR1"),
    "table of zeros": _parquet(lambda data: bytes(len(data))),
    "table that is empty": _parquet(lambda data: b""),
    "table bomb": _bomb,
    "Arrow file of garbage": _arrow,
    "shard of paths above": _tar(_member("../../outside.png", _png()), *_images(10)),
    "shard of whole paths": _tar(_member("/tmp/hostile-outside.png", _png()), *_images(10)),
    "shard of links": _tar(_member("a.png", kind=tarfile.SYMTYPE, link="/etc/passwd"), *_images(10)),
    "shard of hard links": _tar(_member("a.png", kind=tarfile.LNKTYPE, link="/etc/passwd"), *_images(10)),
    "shard of devices": _tar(
        _member("a.png", kind=tarfile.CHRTYPE), _member("b.png", kind=tarfile.BLKTYPE), *_images(10)
    ),
    "shard of pipes": _tar(_member("a.png", kind=tarfile.FIFOTYPE), *_images(10)),
    "shard of 1 TB in a member": _tar(_member("a.png", _png(), size=_LARGE), *_images(10)),
    "shard of a size below zero": _tar(
        _member("a.png", _png()).replace(b"0" * 11 + b"\0", b"-0000000001\0"), *_images(10)
    ),
    "shard of a sparse member": _tar(_member("a.png", _png(), kind=tarfile.GNUTYPE_SPARSE), *_images(10)),
    "shard of a name of 1 GB": _tar(
        _member("././@LongLink", b"x" * 512, kind=tarfile.GNUTYPE_LONGNAME, size=1 << 30), *_images(10)
    ),
    "shard of pax headers of 1 GB": _tar(_member("pax", b"9" * 512, kind=tarfile.XHDTYPE, size=1 << 30), *_images(10)),
    "shard of a pax header that is none": _tar(_member("pax", b"x" * 512, kind=tarfile.XHDTYPE), *_images(10)),
    "shard of pax headers in pax headers": _tar(
        *[_member("pax", b"11 path=ab\n", kind=tarfile.XHDTYPE)] * 5000, *_images(10)
    ),
    "shard of a wrong sum": _tar(_member("a.png", _png()).replace(b"a.png", b"b.png", 1), *_images(10)),
    "shard cut off": _tar(*_images(10), _member("z.png", _png())[:700], end=b""),
    "shard of zeros": _tar(bytes(4096)),
    "shard that is empty": _tar(end=b""),
    "shard of garbage": _tar(bytes(range(256)) * 20),
    "shard of one name": _tar(*[_member("a.png", _png())] * 12),
    "shard of labels that are text": _tar(*_images(), _member("000.cls", b"\x1b[2J")),
    "shard of labels of 5,000 digits": _tar(*_images(), _member("000.cls", b"9" * 5000)),
    "shard of a label of 2^62": _tar(*_images(), *[_member(f"{i:03}.cls", b"%d" % (1 << 62)) for i in range(12)]),
    "shard of labels below zero": _tar(*_images(), *[_member(f"{i:03}.cls", b"-7") for i in range(12)]),
    "index that is no JSON": _index(lambda entry: b"{"),
    "index that is a list": _index(lambda entry: b"[]"),
    "index without shards": _index(lambda entry: b'{"format": 1}'),
    "index of shards that are a number": _index(lambda entry: b'{"format": 1, "shards": 5}'),
    "index of shards that are text": _index(lambda entry: b'{"format": 1, "shards": ["a"]}'),
    "index that is deep": _index(lambda entry: b"[" * 50_000 + b"]" * 50_000),
    "index of a shard above": _index(lambda entry: entry.update(name="../a.tar")),
    "index of a shard that is a command": _index(lambda entry: entry.update(name="pipe:touch CANARY")),
    "index without names": _index(lambda entry: entry.pop("names")),
    "index of names that are numbers": _index(lambda entry: entry.update(names=[1] * 12)),
    "index of fewer names": _index(lambda entry: entry.update(names=["a.png"])),
    "index of offsets beyond the end": _index(lambda entry: entry.update(offsets=[1 << 50] * 12)),
    "index of offsets below zero": _index(lambda entry: entry.update(offsets=[-512] * 12)),
    "index of offsets that are text": _index(lambda entry: entry.update(offsets=["a"] * 12)),
    "index of offsets of 2^80": _index(lambda entry: entry.update(offsets=[1 << 80] * 12)),
    "index of sizes of 1 TB": _index(lambda entry: entry.update(sizes=[_LARGE] * 12)),
    "index of sizes below zero": _index(lambda entry: entry.update(sizes=[-1] * 12)),
    "index of labels that are text": _index(lambda entry: entry.update(labels=["a"] * 12)),
    "index of more labels": _index(lambda entry: entry.update(labels=[0] * 500)),
    "list of paths that are not": _list(b"/absent/a.png\n"),
    "list of NUL": _list(b"a\0b\0\0"),
    "list of bytes": _list(bytes(range(256)) * 4),
    "list of itself": _list(b"@list.txt\n"),
    "list of a device": _list(b"/dev/zero\n"),
    "list of a line of 10 MB": _list(b"x" * (10 << 20)),
    "list that is empty": _list(b""),
    "folders 400 deep": _deep_folder,
    "folder that holds itself": _circle,
    "names that speak to the terminal": _strange_names,
}
