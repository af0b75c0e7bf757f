"""Files that single options read: keys, class names, masks of patches, tables of images to leave out, features."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from tests.hostile.pictures import HARMLESS

Write = Callable[[Path], Path]
"""Writes a file below a folder; returns its path."""


def _file(name: str, content: bytes | Callable[[], bytes]) -> Write:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content())
        return folder / name

    return write


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


def _made(name: str, make: Callable[[Path], object]) -> Write:
    def write(folder: Path) -> Path:
        make(folder / name)
        return folder / name

    return write


def _special(name: str) -> dict[str, Write]:
    """What may lie in the place of any file."""
    return {
        "a folder": _made(name, Path.mkdir),
        "a pipe": _made(name, os.mkfifo),
        "a device": _made(name, lambda path: path.symlink_to("/dev/zero")),
        "a link to itself": _made(name, lambda path: path.symlink_to(path.name)),
        "a link to nothing": _made(name, lambda path: path.symlink_to("absent")),
        "nothing": lambda folder: folder / name,
        "1 TB": _made(name, _sparse),
        "empty": _file(name, b""),
        "zeros": _file(name, bytes(5000)),
        "bytes": _file(name, bytes(range(256)) * 9),
        "NUL": _file(name, b"a\0b\0\n\0"),
    }


# --- keys ------------------------------------------------------------------------------------------------------------


def private_key(kind: Any = None, password: bytes | None = None) -> bytes:
    """In PEM; by default of the kind that signs."""
    hidden = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    key = kind or ec.generate_private_key(ec.SECP256R1())
    form: bytes = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, hidden)
    return form


def _public(kind: Any) -> bytes:
    form: bytes = kind.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return form


def _rsa() -> Any:
    return rsa.generate_private_key(public_exponent=65537, key_size=1024)


KEYS: dict[str, Write] = {
    "private": _file("key.pem", private_key),
    "private, with line ends of Windows": _file("key.pem", lambda: private_key().replace(b"\n", b"\r\n")),
    "private, behind a text": _file("key.pem", lambda: b"my key\n" + private_key()),
    "private, encrypted": _file("key.pem", lambda: private_key(password=b"x")),
    "private of another curve": _file("key.pem", lambda: private_key(ec.generate_private_key(ec.SECP192R1()))),
    "private of Ed25519": _file("key.pem", lambda: private_key(ed25519.Ed25519PrivateKey.generate())),
    "private of RSA": _file("key.pem", lambda: private_key(_rsa())),
    "private, cut off": _file("key.pem", lambda: private_key()[:120]),
    "private of garbage": _file(
        "key.pem", b"-----BEGIN PRIVATE KEY-----\n" + b"A" * 64 + b"\n-----END PRIVATE KEY-----\n"
    ),
    "public": _file("key.pub", lambda: _public(ec.generate_private_key(ec.SECP256R1()))),
    "public of RSA": _file("key.pub", lambda: _public(_rsa())),
    "public of garbage": _file("key.pub", b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"),
    "a certificate of nothing": _file("key.pub", b"-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n"),
    "10^5 keys": _file("keys", b"key\n" * 100_000),
    "keys in UTF-16": _file("keys", "key\n".encode("utf-16")),
    "keys that speak to the terminal": _file("keys", b"\x1b[2J\n"),
    "comments alone": _file("keys", b"# none\n\n"),
    **_special("key"),
}

# --- names of classes, of the checkpoint's two -----------------------------------------------------------------------

NAMES: dict[str, Write] = {
    **{
        f"{HARMLESS}{name}": _file("names.txt", content)
        for name, content in {
            "lines": b"dark\nlight\n",
            "lines of Windows": b"dark\r\nlight\r\n",
            "lines without an end": b"dark\nlight",
            "lines with a byte-order mark": b"\xef\xbb\xbfdark\nlight\n",
            "UTF-16": "dark\nlight\n".encode("utf-16"),
            "other writings": "\N{CJK UNIFIED IDEOGRAPH-660E}\n\N{GREEK SMALL LETTER ALPHA}\n".encode(),
            "quotes and commas": b'"dark, very"\nlight, less\n',
            "words that YAML takes for others": b"no\nnull\n",
            "a JSON list": b'["dark", "light"]',
            "a JSON list behind a line": b'\n  ["dark", "light"]\n',
            "id2label": b'{"0": "dark", "1": "light"}',
            "class_to_idx": b'{"light": 1, "dark": 0}',
        }.items()
    },
    **{
        name: _file("names.txt", content)
        for name, content in {
            "of one more": b"a\nb\nc\n",
            "of one less": b"a\n",
            "twice": b"a\na\n",
            "with an empty line": b"a\n\nb\n",
            "Latin-1": b"a\xe9\nb\n",
            "that speak to the terminal": b"\x1b[2J\n\x1b]0;x\x07\n",
            "JSON cut off": b'["a", "b"',
            "JSON of numbers": b"[1, 2]",
            "JSON of lists": b'[["a"], ["b"]]',
            "JSON of nothing": b"[null, null]",
            "JSON that is deep": b"[" * 100_000 + b"]" * 100_000,
            "JSON with half a character": b'["\\ud800", "b"]',
            "JSON of 10^400": b'{"a": 1' + b"0" * 400 + b', "b": 0}',
            "JSON of 5,000 digits": b'{"a": ' + b"1" * 5000 + b', "b": 0}',
            "id2label with a number twice": b'{"0": "a", "0": "b", "1": "c"}',
            "id2label without a number": b'{"0": "a", "2": "b"}',
            "id2label of numbers below zero": b'{"-1": "a", "0": "b"}',
            "class_to_idx with a number twice": b'{"a": 0, "b": 0}',
            "class_to_idx of bools": b'{"a": true, "b": false}',
            "class_to_idx of floats": b'{"a": 0.0, "b": 1.0}',
            "10^6 lines": b"a\n" * 1_000_000,
            "a line of 10 MB": b"x" * (10 << 20) + b"\ny\n",
        }.items()
    },
    **_special("names.txt"),
}

# --- masks of the bundle's ten patches -------------------------------------------------------------------------------


def _npy(values: Any, **options: Any) -> Callable[[], bytes]:
    def make() -> bytes:
        written = io.BytesIO()
        np.lib.format.write_array(written, np.asanyarray(values), **options)
        return written.getvalue()

    return make


def _npz() -> bytes:
    written = io.BytesIO()
    np.savez(written, a=np.ones(10, bool))
    return written.getvalue()


def _huge(path: Path) -> None:
    np.lib.format.open_memmap(path, "w+", np.bool_, (10**5, 10**5)).flush()


_KEPT = np.arange(10) != 3

_BROKEN_MASKS: dict[str, bytes | Callable[[], bytes]] = {
    "of none": _npy(np.zeros(10, bool)),
    "of one patch less": _npy(np.ones(9, bool)),
    "of another grid": _npy(np.ones((2, 5), bool)),
    "of no dimensions": _npy(np.array(True)),
    "of no patches": _npy(np.zeros(0, bool)),
    "of several images": _npy(np.ones((3, 10), bool)),
    "of floats": _npy(np.ones(10)),
    "of NaN": _npy(np.full(10, np.nan)),
    "of text": _npy(np.array(["a"] * 10)),
    "of objects": lambda: _npy(np.array([{}] * 10, object), allow_pickle=True)(),
    "of records": _npy(np.zeros(10, [("a", "?")])),
    "of dates": _npy(np.zeros(10, "M8[s]")),
    "of complex numbers": _npy(np.ones(10, np.complex64)),
    "cut off": lambda: _npy(_KEPT)()[:-4],
    "cut in the header": lambda: _npy(_KEPT)()[:40],
    "of a header that is none": b"\x93NUMPY\x01\x00\x10\x00{'descr': ][    \n",
    "of a header that runs": b"\x93NUMPY\x01\x00\x30\x00__import__('os').system('touch CANARY')         \n",
    "of version 9": b"\x93NUMPY\x09\x00\x10\x00" + bytes(64),
    "an archive": _npz,
    "an archive cut off": lambda: _npz()[:60],
    "a pickle": b"\x80\x04cposix\nsystem\n(X\x0c\x00\x00\x00touch CANARYtR.",
}
"""In the place of one."""

MASKS: dict[str, Write] = {
    **{
        f"{HARMLESS}{name}": _file("mask.npy", make)
        for name, make in {
            "booleans": _npy(_KEPT),
            "of the grid": _npy(_KEPT.reshape(5, 2)),
            "in Fortran's order": _npy(np.asfortranarray(_KEPT.reshape(5, 2))),
            "bytes of 0 and 1": _npy(_KEPT.astype(np.uint8)),
            "of the other byte order": _npy(_KEPT.astype(">i8")),
            "of version 3": _npy(_KEPT, version=(3, 0)),
        }.items()
    },
    **{name: _file("mask.npy", make) for name, make in _BROKEN_MASKS.items()},
    "of 10^10 patches": _made("mask.npy", _huge),
    **_special("mask.npy"),
}

# --- tables of images to leave out -----------------------------------------------------------------------------------

TABLES: dict[str, Write] = {
    **{
        f"{HARMLESS}{name}": _file("table.csv", content)
        for name, content in {
            "a table": b"id,key\n1,images/000.png\n",
            "with a byte-order mark": b"\xef\xbb\xbfkey,id\nimages/000.png,1\n",
            "of UTF-16": "key\nimages/000.png\n".encode("utf-16"),
            "of Windows": b"key,id\r\nimages/000.png,1\r\n",
            "of an old Macintosh": b"key,id\rimages/000.png,1\r",
            "in quotes": b'"id","key"\n"a, ""b""","images/000.png"\n"line\nend","images/001.png"\n',
            "of empty lines": b"key\n\nimages/000.png\n\n",
            "of rows of more columns": b"key\nimages/000.png,1,2,3\n",
            "of rows of less": b"id,key\n1,images/000.png\n2\n",
            "that also names others": b"key\nimages/000.png\n/absent/\xff\xfe.png\n",
            "of a field of 200 kB": b"key,note\nimages/000.png," + b"x" * 200_000 + b"\n",
            "of a column twice": b"key,id,id\nimages/000.png,1,2\n",
        }.items()
    },
    **{
        name: _file("table.csv", content)
        for name, content in {
            "of other columns": b"id,name\n1,images/000.png\n",
            "of no rows": b"id,key\n",
            "of no columns": b"\n\n",
            "of semicolons": b"id;key\n1;images/000.png\n",
            "of tabs": b"id\tkey\n1\timages/000.png\n",
            "of all images": b"key\n" + b"".join(b"images/%03d.png\n" % number for number in range(11)),
            "of none that is here": b"key\n/absent.png\n",
            "of NUL": b"key\nimages/000.png\0\n",
            "of a quote without its end": b'key\n"images/000.png\n',
            "of 10^6 rows": b"key\n" + b"images/000.png\n" * 1_000_000,
            "of a row of 10^6 fields": b"key\nimages/000.png" + b"," * 1_000_000 + b"\n",
            "of names that speak to the terminal": b"key\n\x1b[2J\n",
        }.items()
    },
    **_special("table.csv"),
}

# --- features, as embed has written them -----------------------------------------------------------------------------


def _features(change: Callable[[Path], object]) -> Write:
    """A copy of those in the working folder, with a change."""

    def write(folder: Path) -> Path:
        made = Path(shutil.copytree("features", folder / "features"))
        change(made)
        return made

    return write


def _shard(change: Callable[[bytes], bytes]) -> Write:
    def edit(folder: Path) -> None:
        for path in folder.glob("*.parquet"):
            path.write_bytes(change(path.read_bytes()))

    return _features(edit)


def _column(change: Callable[[Any], Any], name: str = "cls") -> Write:
    def edit(folder: Path) -> None:
        for path in folder.glob("*.parquet"):
            table = pyarrow.parquet.read_table(path)
            words = table.schema.metadata
            place = table.schema.get_field_index(name)
            column = change(table.column(name).combine_chunks())
            table = table.remove_column(place) if column is None else table.set_column(place, name, column)
            pyarrow.parquet.write_table(table.replace_schema_metadata(words), path)

    return _features(edit)


def _job(change: Callable[[bytes], bytes]) -> Write:
    def edit(folder: Path) -> None:
        path = next(folder.glob("*.json"))
        path.write_bytes(change(path.read_bytes()))

    return _features(edit)


def _replaced(name: str, make: Callable[[Path], object]) -> Write:
    def edit(folder: Path) -> None:
        path = next(folder.glob(name))
        path.unlink()
        make(path)

    return _features(edit)


def _set(key: str, value: Any) -> Callable[[bytes], bytes]:
    return lambda old: json.dumps({**json.loads(old), key: value}).encode()


def _in_dictionary(column: Any) -> Any:
    return column.dictionary_encode()


FEATURES: dict[str, Write] = {
    f"{HARMLESS}features": _features(lambda folder: None),
    f"{HARMLESS}job of Windows": _job(lambda old: b"\xef\xbb\xbf" + old.replace(b"\n", b"\r\n")),
    "keys in a dictionary": _column(_in_dictionary, "key"),
    **{
        f"job {words}": _job(change)
        for words, change in {
            "that is no JSON": lambda old: b"{",
            "that is empty": lambda old: b"",
            "that is a list": lambda old: b"[]",
            "that is deep": lambda old: b"[" * 100_000 + b"]" * 100_000,
            "with a name twice": lambda old: old.rstrip()[:-1] + b', "x": 1, "x": 2}',
            "of bytes": lambda old: bytes(range(256)),
            "of nothing": lambda old: b"{}",
            "of another bundle": _set("bundle", 5),
            "of another data set": _set("data", None),
        }.items()
    },
    **{
        f"shard {words}": _shard(change)
        for words, change in {
            "that is empty": lambda old: b"",
            "cut off": lambda old: old[: len(old) // 2],
            "without its end": lambda old: old[:-9],
            "of zeros": lambda old: bytes(len(old)),
            "of garbage in the middle": lambda old: old[:200] + bytes(256) + old[456:],
            "of a footer of 2^31": lambda old: old[:-8] + b"\0\0\0\x80PAR1",
        }.items()
    },
    "shard that is a pipe": _replaced("*.parquet", os.mkfifo),
    "shard that is a folder": _replaced("*.parquet", Path.mkdir),
    "shard that is a device": _replaced("*.parquet", lambda path: path.symlink_to("/dev/zero")),
    "job that is a pipe": _replaced("*.json", os.mkfifo),
    "job that is 1 TB": _replaced("*.json", _sparse),
    "features of NaN": _column(
        lambda column: pyarrow.FixedSizeListArray.from_arrays(
            pyarrow.array(np.full(len(column.values), np.nan, np.float32)), column.type.list_size
        )
    ),
    "features of text": _column(lambda column: pyarrow.array(["a"] * len(column))),
    "features that are nothing": _column(lambda column: pyarrow.nulls(len(column), column.type)),
    "features of lists of any length": _column(lambda column: pyarrow.array([[1.0] * n for n in range(len(column))])),
    "features of lists in lists": _column(lambda column: pyarrow.array([[[1.0]]] * len(column))),
    "features that are not there": _column(lambda column: None),
    "keys that are numbers": _column(lambda column: pyarrow.array(range(len(column))), "key"),
    "keys that are nothing": _column(lambda column: pyarrow.nulls(len(column), pyarrow.string()), "key"),
    "keys that are bytes": _column(lambda column: column.cast(pyarrow.binary()), "key"),
    "ids that are text": _column(lambda column: pyarrow.array(["a"] * len(column)), "id"),
    "ids that are the same": _column(
        lambda column: pyarrow.array([column[0].as_py()] * len(column), column.type), "id"
    ),
    **_special("features"),
}
