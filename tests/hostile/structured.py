"""Changes that know a file's structure: values of a manifest, fields of headers, opcodes of a pickle, nodes of a graph.

Each takes a whole file and a source of chance, and returns another file, which may be a right one.
"""

from __future__ import annotations

import io
import json
import pickletools
import random
import struct
import warnings
import zipfile
from collections.abc import Callable
from typing import Any

import onnx

_SIZES = (0, 1, -1, 7, 255, 1 << 16, (1 << 31) - 1, 1 << 31, 1 << 32, (1 << 62) + 1, (1 << 63) - 1)
_VALUES: tuple[Any, ...] = (None, True, *_SIZES, 1 << 70, 0.5, 1e308, "", "x" * 300, "../a", "\x1b[31m", [], {}, [[[]]])
"""Of every type that JSON has."""
_TYPES = ("F32", "F16", "BF16", "F64", "I8", "I64", "U64", "BOOL", "F8_E4M3", "F4", "C64", "")


def change_json(content: bytes, chance: random.Random) -> bytes:
    """A value at any path of another type or size, left out, or under another name."""
    found: Any = {"": json.loads(content)}
    for _ in range(chance.choice((1, 1, 1, 3))):
        place: Any = found
        key: Any = ""
        while isinstance(place[key], (dict, list)) and place[key] and (key == "" or chance.random() > 0.15):
            place = place[key]
            key = chance.choice(list(place) if isinstance(place, dict) else range(len(place)))
        if chance.random() < 0.15 and key != "":
            del place[key]
        elif chance.random() < 0.1 and isinstance(place, dict):
            place[chance.choice(("x", "", key + "s"))] = place[key]
        else:
            place[key] = chance.choice((*_VALUES, place[key]))
    return json.dumps(found[""]).encode()


def change_safetensors(content: bytes, chance: random.Random) -> bytes:
    """Names, types, shapes and offsets of the header, or its length."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    for _ in range(chance.choice((1, 1, 2, 5))):
        name = chance.choice([name for name in header if name != "__metadata__"] or [""])
        entry = header.setdefault(name, {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]})
        kind = chance.randrange(6)
        if kind == 0:
            entry["dtype"] = chance.choice((*_TYPES, *_VALUES))
        elif kind == 1:
            entry["shape"] = [chance.choice(_SIZES) for _ in range(chance.randrange(6))]
        elif kind == 2:
            entry["data_offsets"] = [chance.choice((*_SIZES, len(data))) for _ in range(chance.choice((2, 2, 1, 3)))]
        elif kind == 3:
            header[chance.choice(("", "../a", "x" * 300, "__metadata__"))] = chance.choice((entry, *_VALUES))
        elif kind == 4:
            header[name] = chance.choice(_VALUES)
        else:
            del header[name]
        if not all(isinstance(value, dict) for value in header.values()):
            break
    written = json.dumps(header).encode()
    size = len(written) if chance.random() > 0.1 else chance.choice(_SIZES) % (1 << 64)
    return struct.pack("<Q", size) + written + data


def _opcodes(content: bytes, chance: random.Random) -> bytes:
    starts = [at for _, _, at in pickletools.genops(content) if at is not None]
    parts = [content[start:stop] for start, stop in zip(starts, [*starts[1:], len(content)], strict=True)]
    for _ in range(chance.choice((1, 1, 2, 8))):
        at = chance.randrange(len(parts))
        other = chance.choice((chance.choice(parts), *(code.code.encode("latin-1") for code in pickletools.opcodes)))
        kind = chance.randrange(4)
        if kind == 0:
            parts[at] = other
        elif kind == 1:
            parts.insert(at, other * chance.choice((1, 1, 1000)))
        elif kind == 2:
            del parts[at]
        else:
            parts[at] = b"cposix\nsystem\n"
        parts = parts or [b"."]
    return b"".join(parts)


def change_archive(content: bytes, chance: random.Random) -> bytes:
    """A pickle in it, opcode by opcode, a member's name or length, or a field of its headers."""
    if not zipfile.is_zipfile(io.BytesIO(content)):
        return content
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    kind, written = chance.randrange(3), io.BytesIO()
    with zipfile.ZipFile(written, "w", chance.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for name, data in members:
            if kind == 0 and name.endswith(".pkl"):
                data = _opcodes(data, chance)
            elif kind == 1 and chance.random() < 0.2:
                name, data = chance.choice((name, "../a", name + "x")), data[: chance.randrange(len(data) + 1)]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a name twice
                archive.writestr(name, data)
    found = bytearray(written.getvalue())
    if kind == 2:
        for _ in range(chance.choice((1, 2, 4))):
            mark, fields = chance.choice(((b"PK\3\4", 30), (b"PK\1\2", 46), (b"PK\5\6", 22)))
            places = [at for at in range(len(found) - fields) if found[at : at + 4] == mark]
            if places:
                at, size = chance.choice(places) + chance.randrange(4, fields - 3, 2), chance.choice((2, 4))
                found[at : at + size] = (chance.choice(_SIZES) % (1 << 8 * size)).to_bytes(size, "little")
    return bytes(found)


def change_graph(content: bytes, chance: random.Random) -> bytes:
    """Operators, inputs, outputs, attributes and constants of nodes."""
    model = onnx.ModelProto.FromString(content)
    nodes, constants = model.graph.node, model.graph.initializer
    names = [name for node in nodes for name in (*node.input, *node.output)]
    for _ in range(chance.choice((1, 1, 2, 6))):
        node, kind = chance.choice(nodes), chance.randrange(8)
        if kind == 0:
            node.op_type = chance.choice((*(other.op_type for other in nodes), "Tile", "Resize", "If", "Pad", "Split"))
        elif kind == 1 and node.input:
            node.input[chance.randrange(len(node.input))] = chance.choice((*names, ""))
        elif kind == 2 and node.output:
            node.output[chance.randrange(len(node.output))] = chance.choice((*names, ""))
        elif kind == 3 and node.attribute:
            attribute = chance.choice(node.attribute)
            attribute.i = chance.choice(_SIZES)
            attribute.ints[:] = [chance.choice(_SIZES) for _ in attribute.ints] + [1] * chance.randrange(2)
        elif kind == 4 and node.attribute:
            del node.attribute[chance.randrange(len(node.attribute))]
        elif kind == 5:
            nodes.append(node)
        elif kind == 6:
            constant = chance.choice(constants)
            constant.dims[:] = [chance.choice(_SIZES) for _ in range(chance.randrange(5))]
        else:
            constant = chance.choice(constants)
            constant.data_type = chance.randrange(25)
            constant.raw_data = chance.randbytes(chance.choice((0, 1, 8, 64)))
    return bytes(model.SerializeToString())


_TAR_FIELDS = {"name": (0, 100), "size": (124, 12), "type": (156, 1), "link": (157, 100), "magic": (257, 8)}


def change_tar(content: bytes, chance: random.Random) -> bytes:
    """Fields of headers, with the right checksum: sizes in octal and in base 256, types, names, links."""
    found = bytearray(content)
    heads = [at for at in range(0, len(found) - 511, 512) if found[at + 257 : at + 262] == b"ustar"]
    for _ in range(chance.choice((1, 1, 2, 4))):
        head, (field, (at, size)) = chance.choice(heads), chance.choice(list(_TAR_FIELDS.items()))
        number = chance.choice(_SIZES)
        choices = {
            "size": (
                b"%011o" % (abs(number) % (1 << 33)),
                b"\x80" + (abs(number) % (1 << 88)).to_bytes(11, "big"),
                b"\xff" + (number % (1 << 88)).to_bytes(11, "big"),
                b"-0000000001",
            ),
            "type": tuple(bytes([letter]) for letter in b"0123456789LKxgSVDMNX\0"),
            "magic": (b"ustar\x0000", b"ustar  \0", b"\0" * 8),
        }.get(field, (b"/etc/passwd", b"../a", b"", b"\xff\xfe", chance.randbytes(size)))
        found[head + at : head + at + size] = chance.choice(choices)[:size].ljust(size, b"\0")
        if field == "type" and chance.random() < 0.5:
            lines = (b"30 GNU.sparse.map=0,1,9999999\n", b"99999999999 size=1\n", b"20 size=-1234567890\n", b"x")
            found[head + 512 : head + 512] = chance.choice(lines).ljust(512, b"\0")
        found[head + 148 : head + 156] = b" " * 8
        found[head + 148 : head + 156] = b"%06o\0 " % sum(found[head : head + 512])
        heads = heads[: heads.index(head) + 1]
    return bytes(found)


CHANGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "graph": change_graph,
    "manifest": change_json,
    "golden": change_archive,
    "pickle": change_archive,
    "safetensors": change_safetensors,
    "tar": change_tar,
}
"""By target of `fuzz`."""
