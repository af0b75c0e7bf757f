"""What a file really is, by its bytes: a name may say otherwise, and a download or a copy may have brought something
else.
"""

from __future__ import annotations

import errno
import os
import tarfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from mae_deploy.text import as_size, parse_json


@dataclass(frozen=True, slots=True)
class FileKind:
    """What a file is, in words that follow "is", and what to do where weights were expected."""

    words: str
    hint: str | None = None
    weights: Literal["safetensors", "pickle"] | None = None
    """As what it is read, where it is a weights file."""
    stands_in: bool = False
    """It took the place of the file that was meant: a pointer, a web page, nothing."""


AGAIN = "download or copy it again, and compare its size and SHA-256 with what its source states"
_STATE_DICT = "give the PyTorch model's state dict, as .safetensors or a file of torch.save(model.state_dict(), FILE)"
_UNPACK = "unpack it, and give the weights file in it"
_PROGRAM = (
    "it is a program, and is not run; ask whoever made it for a .safetensors file, or for torch.save of its state dict"
)

_TAR_NAMES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, b"X")
"""Members that only say something about the next one."""
_LONGEST_NAME = 1 << 20

_POINTERS = (
    (b"version https://git-lfs.github.com/spec/", "a Git LFS pointer, not the file itself", "git lfs pull fetches it"),
    (b"version https://hawser.github.com/spec/", "a Git LFS pointer, not the file itself", "git lfs pull fetches it"),
    (b"/annex/objects/", "a git-annex pointer, not the file itself", "git annex get fetches it"),
    (b"outs:\n- md5:", "a DVC pointer, not the file itself", "dvc pull fetches it"),
)

_MAGIC = (
    (0, b"GGUF", "a GGUF file (llama.cpp)", _STATE_DICT),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras and TensorFlow write weights", _STATE_DICT),
    (4, b"TFL3", "a TensorFlow Lite model", _STATE_DICT),
    (4, b"ET12", "an ExecuTorch program", _STATE_DICT),
    (0, b"ftrt", "a TensorRT engine", _STATE_DICT),
    (0, b"ptrt", "a TensorRT engine", _STATE_DICT),
    (0, b"\x93NUMPY", "a NumPy array", _STATE_DICT),
    (0, b"PAR1", "a Parquet table", None),
    (0, b"SQLite format 3\0", "a SQLite database", None),
    (0, b"\x1f\x8b", "a gzip archive", _UNPACK),
    (0, b"BZh", "a bzip2 archive", _UNPACK),
    (0, b"\xfd7zXZ\0", "an xz archive", _UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "a Zstandard archive", _UNPACK),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", _UNPACK),
    (0, b"Rar!\x1a\x07", "a RAR archive", _UNPACK),
    (0, b"%PDF-", "a PDF document", None),
    (0, b"\x89PNG\r\n\x1a\n", "a PNG image", None),
    (0, b"\xff\xd8\xff", "a JPEG image", None),
    (0, b"\x00\x05\x16\x07", "what macOS keeps beside a file (._NAME)", "give the file without '._' before its name"),
    (0, b"\x7fELF", "a program (ELF)", None),
    (0, b"MZ", "a program (Windows)", None),
)
"""Where they stand, the bytes, and what begins with them."""

_HEAD = 4096
"""Bytes that are looked at; archives and safetensors also at their table of contents."""
HEADER_WORDS = "__metadata__"
"""Where a safetensors file has words of its writer."""
_LARGEST_HEADER = 100_000_000
"""Of a safetensors file, as its library limits it."""
_BOMB = 1 << 30
"""Bytes that an archive may unpack to whatever its size."""
_FIELDS = 64
"""Of a protobuf message, as many are looked at."""
_LEVELDB = bytes.fromhex("57fb808b247547db")
"""How the index of a TensorFlow checkpoint ends."""


def look_at(path: Path) -> FileKind:
    """What the file is; nothing in it is run.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD)
        size = file.seek(0, 2)
        file.seek(max(0, size - len(_LEVELDB)))
        tail = file.read()
    if not size:
        return FileKind("an empty file", AGAIN, stands_in=True)
    if (instead := stand_in(head)) is not None:
        return instead
    for offset, beginning, words, remedy in _MAGIC:
        if head[offset:].startswith(beginning):
            return FileKind(words, remedy)
    if head.startswith(b"PK\x03\x04"):
        return _zip(path, size)
    if head[257:262] == b"ustar":
        return _tar(path)
    if tail == _LEVELDB or ".data-0000" in path.name:
        return FileKind("a part of a TensorFlow checkpoint", _STATE_DICT)
    if head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= _LARGEST_HEADER:
        return _safetensors(path, size)
    if head[0] == 0x80 and head[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        return FileKind("a pickle", weights="pickle")
    return _protobuf(path, head) or _flax(head) or _text(head) or _unknown(head)


def is_special(path: Path) -> bool:
    """Whether it is a pipe, which would be waited for, or a device, which may have no end."""
    return path.exists() and not path.is_file() and not path.is_dir()


def read_whole(path: Path, most: int = 1 << 28, *, pipes: bool = False) -> bytes:
    """A file's bytes, where there are no more than `most` of them.

    Args:
        pipes: a pipe is read, too, and waited for.

    Raises:
        OSError: there are more, as in a device without an end, or it cannot be read.
    """
    if not pipes and is_special(path):
        raise OSError(errno.EINVAL, "it is no file, but a pipe or a device", os.fspath(path))
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        content = b"" if size > most else file.read(most + 1)
    if max(size, len(content)) > most:
        raise OSError(errno.EFBIG, f"it has more than {as_size(most)}", os.fspath(path))
    return content


def stand_in(head: bytes) -> FileKind | None:
    """What took the place of the file that was meant, by its first bytes: a pointer, a web page, zeros."""
    if head and not any(head):
        return FileKind("full of zeros, as an unfinished download leaves it", AGAIN, stands_in=True)
    for beginning, words, hint in _POINTERS:
        if head.startswith(beginning):
            return FileKind(words, hint, stands_in=True)
    text = _text(head)
    return text if text is not None and text.stands_in else None


def _zip(path: Path, size: int) -> FileKind:
    try:
        with zipfile.ZipFile(path) as archive:
            names, unpacked = archive.namelist(), sum(part.file_size for part in archive.infolist())
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        return FileKind(f"the beginning of a zip archive without its end ({size} bytes): it was cut off", AGAIN)
    if unpacked > max(_BOMB, 4 * size):  # torch.save compresses nothing
        return FileKind(f"a zip archive of {size} bytes that unpacks to {unpacked}", AGAIN)
    inner = {name.partition("/")[2] for name in names}
    if "constants.pkl" in inner:
        return FileKind("a TorchScript program", _PROGRAM)
    if ".data/python_version" in inner | set(names):
        return FileKind("a torch.package archive", _PROGRAM)
    if "archive_format" in inner:
        return FileKind("a program of torch.export", _PROGRAM)
    if "data.pkl" in inner:
        return FileKind("a file of torch.save", weights="pickle")
    if "model.weights.h5" in names:
        return FileKind("a Keras model", _STATE_DICT)
    if names and all(name.endswith(".npy") for name in names):
        return FileKind("an archive of NumPy arrays (.npz), as JAX's ViTs are released", _STATE_DICT)
    return FileKind(f"a zip archive of {_listed(names)}", _UNPACK)


class TarMember(tarfile.TarInfo):
    """A member of a tar with a size that can be, and a name that fits a megabyte, which `tarfile` reads at once however
    large it is said to be. With a negative size it would read the same headers for ever.
    """

    @classmethod
    def frombuf(cls, buf: Any, encoding: str, errors: str) -> Any:
        """See `tarfile.TarInfo`.

        Raises:
            tarfile.ReadError: the header is not one that anybody writes.
        """
        found = super().frombuf(buf, encoding, errors)
        if found.size < 0 or (found.type in _TAR_NAMES and found.size > _LONGEST_NAME):
            raise tarfile.ReadError(f"a header says {found.size} bytes")
        return found

    @classmethod
    def fromtarfile(cls, archive: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """See `frombuf`; the size may follow from other headers."""
        found = super().fromtarfile(archive)
        if found.size < 0:
            raise tarfile.ReadError(f"a header says {found.size} bytes")
        return found


def _tar(path: Path) -> FileKind:
    try:
        with tarfile.open(path, "r:", tarinfo=TarMember) as archive:
            names = [entry.name for entry in archive]
    except (OSError, ValueError, RecursionError, tarfile.TarError):
        return FileKind("a damaged tar archive", AGAIN)
    if {"pickle", "storages"} <= set(names):
        return FileKind(
            "of the tar form of early PyTorch, which only running it reads",
            "ask whoever made it for a .safetensors file",
        )
    return FileKind(f"a tar archive of {_listed(names)}", _UNPACK)


def safetensors_header(path: Path) -> dict[str, Any]:
    """Of each tensor in a safetensors file, dtype, shape and place; under `__metadata__`, words by name. Nothing where
    it is no such file.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        beginning = file.read(1)
        if beginning != b"{" or length > _LARGEST_HEADER:
            return {}
        words = beginning + file.read(length - 1)
    try:
        header = parse_json(words)
    except ValueError:
        return {}
    return header if isinstance(header, dict) else {}


def _safetensors(path: Path, size: int) -> FileKind:
    """The header says where the last tensor ends."""
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
    try:
        tensors = [entry for name, entry in safetensors_header(path).items() if name != HEADER_WORDS]
        end = start + max((entry["data_offsets"][1] for entry in tensors), default=0)
    except (TypeError, KeyError, IndexError):
        end = 0
    if end > size:
        return FileKind(f"cut off: its header tells of {end} bytes, and it has {size}", AGAIN)
    return FileKind("a safetensors file", weights="safetensors")


def _protobuf(path: Path, head: bytes) -> FileKind | None:
    """ONNX, Core ML and TensorFlow have no magic number: told by the fields at their top."""
    numbers = _top_fields(path)
    if numbers[:1] == [1] and head[0] == 0x08:  # field 1 is a number: the format's version
        if 7 in numbers and max(numbers) <= 25:
            return FileKind("an ONNX graph", "give the checkpoint that it was exported from")
        if max(numbers) >= 200:
            return FileKind("a Core ML model", _STATE_DICT)
        if set(numbers) == {1, 2}:
            return FileKind("a TensorFlow SavedModel", _STATE_DICT)
    if numbers[:1] == [1] and head[0] == 0x0A and (b"Placeholder" in head or b"\x12\x05Const" in head):
        return FileKind("a TensorFlow graph", _STATE_DICT)
    return None


def _top_fields(path: Path) -> list[int]:
    """Numbers of the first fields of a protobuf message; none where it is no such message."""
    numbers: list[int] = []
    with path.open("rb") as file:
        while len(numbers) < _FIELDS and (tag := _varint(file)) is not None:
            number, wire = tag >> 3, tag & 7
            if not number or wire not in (0, 2) or (value := _varint(file)) is None:
                return []
            numbers.append(number)
            if wire == 2:
                file.seek(value, 1)
    return numbers


def _varint(file: BinaryIO) -> int | None:
    """A number in parts of 7 bits, the last one first; None at the end, and where it is none."""
    value = 0
    for shift in range(0, 64, 7):
        byte = file.read(1)
        if not byte:
            return None
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    return None


def _flax(head: bytes) -> FileKind | None:
    """A MessagePack map with a word as its first key."""
    sizes = {0xDE: 3, 0xDF: 5}
    start = 1 if 0x81 <= head[0] <= 0x8F else sizes.get(head[0])
    if start is not None and (0xA1 <= head[start : start + 1][0] <= 0xBF or head[start : start + 1] == b"\xd9"):
        return FileKind("a MessagePack file, as Flax writes weights", _STATE_DICT)
    return None


def _text(head: bytes) -> FileKind | None:
    try:
        text = head.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if len(head) < _HEAD or error.start < _HEAD - 4:  # not a character that the end of what was read cuts in two
            return None
        text = head[: error.start].decode("utf-8-sig")
    begins = text.lstrip().lower()
    if begins.startswith(("<!doctype html", "<html", "<head", "<script")):
        return FileKind(
            "a web page (HTML)",
            "download the file itself: the link to the raw file ('resolve' on Hugging Face, 'raw' on GitHub), logged in"
            " where that is needed",
            stands_in=True,
        )
    if begins.startswith("<?xml"):
        return FileKind("an XML file", "download the file itself, or give the weights that stand beside it")
    if not all(character.isprintable() or character in "\t\r\n\f" for character in text):
        return None
    if begins.startswith(("{", "[")):
        return FileKind(
            "a JSON file", "give the weights file that it describes; if a server sent it in its place, download again"
        )
    return FileKind(f"a text file that begins with '{' '.join(text[:60].split())}'", AGAIN)


def _unknown(head: bytes) -> FileKind:
    return FileKind(
        f"neither a safetensors file nor a file of torch.save (it begins with the bytes {head[:8].hex(' ')})", AGAIN
    )


def _listed(names: Sequence[str]) -> str:
    """The first names, on one line."""
    shown = ", ".join("".join(c if c.isprintable() else "?" for c in name) for name in names[:3])
    return (
        f"{len(names)} file{'s' if len(names) != 1 else ''} ({shown}{', …' if len(names) > 3 else ''})"
        if names
        else "no files"
    )
