"""Weights files that mean harm, each written from a whole one."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save_file

from mae_deploy.checkpoint import METADATA, WEIGHTS

Write = Callable[[Path, Path], None]
"""Makes the copy of a checkpoint folder hostile; the second path must not be there afterwards."""


class _Runs:
    """Creates a file when it is unpickled."""

    def __init__(self, canary: Path, by: str) -> None:
        self.canary, self.by = str(canary), by

    def __reduce__(self) -> Any:
        if self.by == "system":
            return os.system, (f"touch {self.canary}",)
        if self.by == "exec":
            return exec, (f"open({self.canary!r}, 'w')",)
        if self.by == "getattr":
            return getattr(Path(self.canary), "touch"), ()  # noqa: B009 - pickled as a call of getattr
        return open, (self.canary, "w")


def _pickled(by: str, form: str) -> Write:
    def write(folder: Path, canary: Path) -> None:
        tensors: dict[str, Any] = load((folder / WEIGHTS).read_bytes())
        tensors["harm"] = _Runs(canary, by)
        file = folder / WEIGHTS
        (folder / METADATA).unlink()
        if form == "zip":
            torch.save({"model": tensors}, file)
        elif form == "legacy":
            torch.save({"model": tensors}, file, _use_new_zipfile_serialization=False)
        else:
            file.write_bytes(pickle.dumps({"model": tensors["harm"]}, protocol=int(form)))

    return write


def _header(edit: Callable[[dict[str, Any]], Any]) -> Write:
    """The header of the weights with a change."""

    def write(folder: Path, _: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        changed = edit(header)
        words = changed if isinstance(changed, bytes) else json.dumps(header).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(words)) + words + data[8 + length :])

    return write


def _entry(key: str, value: Any) -> Write:
    def edit(header: dict[str, Any]) -> None:
        header["pos_embed"][key] = value

    return _header(edit)


def _record(edit: Callable[[dict[str, Any]], None]) -> Write:
    """The record in the header, and metadata.json with the same change."""

    def write(folder: Path, _: Path) -> None:
        tensors = load((folder / WEIGHTS).read_bytes())
        record = json.loads((folder / METADATA).read_text())
        edit(record)
        save_file(tensors, folder / WEIGHTS)
        (folder / METADATA).write_text(json.dumps(record))

    return write


def _set(place: str, value: Any) -> Write:
    def edit(record: dict[str, Any]) -> None:
        *path, last = place.split(".")
        for name in path:
            record = record[name]
        record[last] = value

    return _record(edit)


def _metadata(content: bytes) -> Write:
    def write(folder: Path, _: Path) -> None:
        (folder / METADATA).write_bytes(content)

    return write


def _record_in_header(words: str) -> Write:
    def write(folder: Path, _: Path) -> None:
        save_file(load((folder / WEIGHTS).read_bytes()), folder / WEIGHTS, metadata={"mae_deploy": words})

    return write


def _record_alone(words: str) -> Write:
    def write(folder: Path, canary: Path) -> None:
        _record_in_header(words)(folder, canary)
        (folder / METADATA).unlink()

    return write


def _tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Write:
    def write(folder: Path, _: Path) -> None:
        tensors = load((folder / WEIGHTS).read_bytes())
        edit(tensors)
        save_file(tensors, folder / WEIGHTS)

    return write


def _filled(value: float) -> Write:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["blocks.0.attn.qkv.weight"][0, 0] = value

    return _tensors(edit)


def _as(dtype: torch.dtype) -> Write:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["norm.weight"] = tensors["norm.weight"].to(dtype)

    return _tensors(edit)


def _bytes(change: Callable[[bytes], bytes]) -> Write:
    def write(folder: Path, _: Path) -> None:
        (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes()))

    return write


def _length(number: int) -> Write:
    return _bytes(lambda data: struct.pack("<Q", number) + data[8:])


def _sparse(folder: Path, _: Path) -> None:
    """A header that promises 4 TB, in a file that is as long and holds nothing."""
    words = json.dumps({"cls_token": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}}).encode()
    with (folder / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", len(words)) + words)
        file.truncate(8 + len(words) + 4 * 10**12)


def _zip_bomb(folder: Path, _: Path) -> None:
    """A file of torch.save, of which one storage unpacks to 8 GB."""
    saved = io.BytesIO()
    torch.save({"model": {"cls_token": torch.zeros(4)}}, saved)
    (folder / METADATA).unlink()
    with zipfile.ZipFile(saved) as plain, zipfile.ZipFile(folder / WEIGHTS, "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in plain.namelist():
            if name.endswith("data/0"):
                with bomb.open(name, "w", force_zip64=True) as entry:
                    for _block in range(3_000):
                        entry.write(bytes(1 << 20))
            else:
                bomb.writestr(name, plain.read(name))


def _huge_storage(folder: Path, _: Path) -> None:
    """A pickle whose tensor has 10^12 elements on a storage of four."""
    (folder / METADATA).unlink()
    torch.save({"model": {"cls_token": torch.zeros(1).expand(10**6, 10**6)}}, folder / WEIGHTS)


def _expanded(folder: Path, _: Path) -> None:
    """All tensors whole, but one of 10^12 elements that all lie on one."""
    tensors = load((folder / WEIGHTS).read_bytes())
    tensors["blocks.0.mlp.fc1.weight"] = torch.zeros(1).expand(10**6, 10**6)
    (folder / METADATA).unlink()
    torch.save({"model": tensors}, folder / WEIGHTS)


def _deep_pickle(folder: Path, _: Path) -> None:
    (folder / METADATA).unlink()
    (folder / WEIGHTS).write_bytes(b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".")


def _memo_pickle(folder: Path, _: Path) -> None:
    """A pickle that asks for a string of 2^31 bytes."""
    (folder / METADATA).unlink()
    (folder / WEIGHTS).write_bytes(b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"abc.")


def _folder(folder: Path, _: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()


def _pipe(folder: Path, _: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


def _metadata_pipe(folder: Path, _: Path) -> None:
    (folder / METADATA).unlink()
    os.mkfifo(folder / METADATA)


def _index(shard: str) -> Write:
    """An index of shards in place of the weights."""

    def write(folder: Path, canary: Path) -> None:
        (folder / METADATA).unlink()
        shutil.move(folder / WEIGHTS, canary.with_name("outside.safetensors"))
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {"cls_token": shard}}))

    return write


_DEEP = b"[" * 100_000 + b"]" * 100_000

WEIGHTS_FILES: dict[str, Write] = {
    **{
        f"pickle runs {by}, {form}": _pickled(by, form)
        for by in ("system", "exec", "open", "getattr")
        for form in ("zip", "legacy", "2", "4")
    },
    "header longer than the file": _length(50_000_000),
    "header of 2^63 bytes": _length(1 << 63),
    "header of no bytes": _length(0),
    "cut in the header": _bytes(lambda data: data[:40]),
    "cut in the tensors": _bytes(lambda data: data[:-7]),
    "bytes behind the tensors": _bytes(lambda data: data + b"x" * 64),
    "empty": _bytes(lambda data: b""),
    "zeros": _bytes(lambda data: bytes(len(data))),
    "header that is no JSON": _header(lambda header: b"{" + b"x" * 100),
    "header that is a list": _header(lambda header: b"[1, 2]"),
    "header nested 100,000 deep": _header(lambda header: b'{"a":' + _DEEP + b"}"),
    "offsets that overlap": _entry("data_offsets", [0, 8]),
    "offsets beyond the file": _entry("data_offsets", [10**9, 10**9 + 400]),
    "offsets below zero": _entry("data_offsets", [-8, 0]),
    "offsets that go back": _entry("data_offsets", [400, 0]),
    "offsets that are text": _entry("data_offsets", "ab"),
    "offsets of one number": _entry("data_offsets", [0]),
    "shape of 10^12": _entry("shape", [10**12]),
    "shape that overflows": _entry("shape", [2**33, 2**33, 2**33]),
    "shape below zero": _entry("shape", [-1, 5]),
    "shape of text": _entry("shape", ["a"]),
    "shape of 10^5 numbers": _entry("shape", [1] * 100_000),
    "dtype that is not": _entry("dtype", "F99"),
    "dtype of half the size": _entry("dtype", "F16"),
    "tensor named twice": _header(lambda header: json.dumps(header).encode()[:-1] + b', "norm.weight": {}}'),
    "tensor that is a number": _header(lambda header: header.update(pos_embed=3)),
    "words that are no text": _header(lambda header: header.update(__metadata__={"mae_deploy": [1]})),
    "words that are a number": _header(lambda header: header.update(__metadata__=5)),
    "NaN": _filled(float("nan")),
    "infinity": _filled(float("-inf")),
    "whole numbers": _as(torch.int64),
    "complex numbers": _as(torch.complex64),
    "bools": _as(torch.bool),
    "a tensor less": _tensors(lambda tensors: tensors.pop("norm.weight")),
    "no tensors": _tensors(lambda tensors: tensors.clear()),
    "a tensor of another shape": _tensors(lambda tensors: tensors.update({"norm.weight": torch.ones(3)})),
    "a tensor of no elements": _tensors(lambda tensors: tensors.update({"norm.weight": torch.ones(0)})),
    "positions of another number": _tensors(lambda tensors: tensors.update(pos_embed=torch.zeros(1, 2, 12))),
    "4 TB without content": _sparse,
    "torch.save bomb": _zip_bomb,
    "tensor of 10^12 on one number": _huge_storage,
    "weight of 10^12 on one number": _expanded,
    "pickle nested 200,000 deep": _deep_pickle,
    "pickle of a string of 2^40": _memo_pickle,
    "weights that are a folder": _folder,
    "weights that are a pipe": _pipe,
    "shard in another folder": _index("../outside.safetensors"),
    "shard by its whole path": _index("/etc/passwd"),
    "shard that is itself": _index(f"{WEIGHTS}.index.json"),
    "metadata that is a pipe": _metadata_pipe,
    "metadata of no JSON": _metadata(b"{"),
    "metadata that is a list": _metadata(b"[]"),
    "metadata nested 100,000 deep": _metadata(_DEEP),
    "metadata in UTF-16 without its mark": _metadata('{"kind": "mae"}'.encode("utf-16-le")),
    "metadata of bytes": _metadata(bytes(range(256))),
    "metadata of a huge number": _metadata(b'{"schema_version": ' + b"9" * 10_000 + b"}"),
    "record that is no JSON": _record_in_header("{"),
    "record that is a list": _record_in_header("[]"),
    "record of another model": _record_in_header(json.dumps({"kind": "classifier"})),
    "record alone, no JSON": _record_alone("{"),
    "record alone, a list": _record_alone("[]"),
    "record alone, nested": _record_alone(_DEEP.decode()),
    "record alone, NaN": _record_alone('{"schema_version": NaN}'),
    **{
        f"metadata {place} {str(value)[:30]}": _set(place, value)
        for place, value in (
            ("schema_version", 99),
            ("schema_version", True),
            ("schema_version", "1"),
            ("kind", "program"),
            ("encoder", None),
            ("encoder", []),
            ("preprocess", {}),
            ("preprocess", None),
            ("licence", 5),
            ("step", "x"),
            ("provenance", "text"),
            ("provenance", None),
            ("metrics", []),
            ("num_classes", -1),
            ("class_names", [1]),
            ("positions", "up"),
            ("encoder.depth", 10**9),
            ("encoder.depth", -1),
            ("encoder.embed_dim", 10**9),
            ("encoder.num_heads", 0),
            ("encoder.num_heads", 7),
            ("encoder.image_size", [10**9, 10**9]),
            ("encoder.image_size", []),
            ("encoder.image_size", "x"),
            ("encoder.patch_size", 0),
            ("encoder.patch_size", -5),
            ("encoder.in_chans", 10**6),
            ("encoder.mlp_ratio", float("nan")),
            ("encoder.mlp_ratio", 1e300),
            ("encoder.unknown", 1),
            ("preprocess.mean", [float("nan")]),
            ("preprocess.std", [0.0]),
            ("preprocess.std", []),
            ("preprocess.image_size", [0, 0]),
            ("preprocess.image_size", [10**9, 10**9]),
            ("preprocess.crop_pct", float("inf")),
            ("preprocess.crop_pct", 1e-9),
            ("preprocess.crop_pct", -1),
            ("preprocess.interpolation", "../x"),
        )
    },
}
