"""Bundles that mean harm, each written from a whole one; the manifest has the right hash of every file."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from mae_deploy.runtime.manifest import GOLDEN_FILE, GRAPH_FILE, MANIFEST_FILE, file_entry
from tests.hostile.graphs import GRAPHS

Write = Callable[[Path], object]
"""Makes the copy of a bundle hostile."""


def _sign(folder: Path) -> None:
    """Record the hashes of the files as they now are."""
    path = folder / MANIFEST_FILE
    manifest = json.loads(path.read_text(encoding="utf-8"))
    for name in manifest["files"]:
        if (folder / name).is_file():
            manifest["files"][name] = file_entry(folder / name)
    path.write_text(json.dumps(manifest), encoding="utf-8")


def _manifest(edit: Callable[[dict[str, Any]], Any]) -> Write:
    def write(folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        edit(manifest)
        (folder / MANIFEST_FILE).write_text(json.dumps(manifest), encoding="utf-8")

    return write


def _set(place: str, value: Any) -> Write:
    def edit(manifest: Any) -> None:
        *path, last = [int(part) if part.isdigit() else part for part in place.split(".")]
        for part in path:
            manifest = manifest[part]
        manifest[last] = value

    return _manifest(edit)


def _words(change: Callable[[str], str]) -> Write:
    """The manifest's own text with a change."""

    def write(folder: Path) -> None:
        path = folder / MANIFEST_FILE
        path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")

    return write


def _named(name: str, key: str) -> Write:
    """The manifest names another file, which is there, and knows its hash."""

    def edit(manifest: dict[str, Any]) -> None:
        old = manifest[key]["file"]
        manifest[key]["file"] = name
        manifest["files"][name] = manifest["files"].pop(old)

    return _manifest(edit)


def _instead(name: str, make: Callable[[Path], object]) -> Write:
    """Something else in the place of a file."""

    def write(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return write


def _link_to(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


def _golden(edit: Callable[[dict[str, Any]], Any]) -> Write:
    def write(folder: Path) -> None:
        with np.load(folder / GOLDEN_FILE) as archive:
            arrays: dict[str, Any] = {name: archive[name] for name in archive.files}
        edit(arrays)
        np.savez(folder / GOLDEN_FILE, **arrays)
        _sign(folder)

    return write


def _golden_member(name: str, content: Callable[[Any], None]) -> Write:
    """A member of the archive of its own making."""

    def write(folder: Path) -> None:
        with np.load(folder / GOLDEN_FILE) as archive:
            arrays = {found: archive[found] for found in archive.files if found != name}
        with zipfile.ZipFile(folder / GOLDEN_FILE, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive_:
            for found, array in arrays.items():
                with archive_.open(f"{found}.npy", "w") as entry:
                    np.save(entry, array)
            with archive_.open(f"{name}.npy", "w", force_zip64=True) as entry:
                content(entry)
        _sign(folder)

    return write


def _npy_header(shape: str, descr: str = "'<f4'") -> bytes:
    words = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    words += b" " * (-(len(words) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(words).to_bytes(2, "little") + words


def _bomb(entry: Any) -> None:
    entry.write(_npy_header(f"(4, {3 << 28})"))
    for _block in range(3 << 10):
        entry.write(bytes(1 << 20))


def _objects(entry: Any) -> None:
    np.lib.format.write_array(entry, np.array([{"a": 1}] * 4, dtype=object), allow_pickle=True)


def _graph(edit: Callable[[onnx.ModelProto], Any]) -> Write:
    def write(folder: Path) -> None:
        model = onnx.load(folder / GRAPH_FILE)
        edit(model)
        (folder / GRAPH_FILE).write_bytes(model.SerializeToString())
        _sign(folder)

    return write


def _external(location: str) -> Write:
    """A weight that lies in another file."""

    def edit(model: onnx.ModelProto) -> None:
        tensor = next(tensor for tensor in model.graph.initializer if tensor.raw_data)
        length = len(tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", "0"), ("length", str(length))):
            tensor.external_data.add(key=key, value=value)

    return _graph(edit)


def _foreign(domain: str, operator: str) -> Write:
    def edit(model: onnx.ModelProto) -> None:
        node = next(node for node in model.graph.node if node.op_type == "Add")
        node.op_type, node.domain = operator, domain
        model.opset_import.append(helper.make_opsetid(domain, 1))

    return _graph(edit)


def _dims(size: int) -> Write:
    def edit(model: onnx.ModelProto) -> None:
        model.graph.initializer[0].dims[0] = size

    return _graph(edit)


def _raw(content: Callable[[bytes], bytes]) -> Write:
    def write(folder: Path) -> None:
        (folder / GRAPH_FILE).write_bytes(content((folder / GRAPH_FILE).read_bytes()))
        _sign(folder)

    return write


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _garbage(model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and tensor.raw_data:
            tensor.raw_data = np.full(len(tensor.raw_data) // 4, np.nan, np.float32).tobytes()


_DEEP = "[" * 100_000 + "]" * 100_000

BUNDLES: dict[str, Write] = {
    "manifest that is a folder": _instead(MANIFEST_FILE, Path.mkdir),
    "manifest that is a pipe": _instead(MANIFEST_FILE, _pipe),
    "manifest that is a device": _instead(MANIFEST_FILE, _link_to("/dev/zero")),
    "manifest that is empty": _words(lambda text: ""),
    "manifest that is a list": _words(lambda text: "[]"),
    "manifest nested 100,000 deep": _words(lambda text: _DEEP),
    "manifest with a deep value": _words(lambda text: text[:-2] + f', "x": {_DEEP}}}'),
    "manifest with a key twice": _words(lambda text: text.rstrip()[:-1] + ', "precision": "fp16"}'),
    "manifest with a file twice": _words(
        lambda text: text.replace('"files": {', f'"files": {{"{GRAPH_FILE}": {{"sha256": "{"0" * 64}", "size": 1}},')
    ),
    "manifest of a huge number": _words(lambda text: text.replace('"num_patches": 10', '"num_patches": ' + "9" * 5000)),
    "manifest cut off": _words(lambda text: text[: len(text) // 2]),
    "manifest of bytes": lambda folder: (folder / MANIFEST_FILE).write_bytes(bytes(range(256))),
    "manifest of 64 MB": _words(lambda text: text.rstrip()[:-1] + ', "x": "' + "x" * (64 << 20) + '"}'),
    "graph above the folder": _named("../outside.onnx", "graph"),
    "graph by its whole path": _named("/etc/passwd", "graph"),
    "graph by a Windows path": _named("C:\\Windows\\win.ini", "graph"),
    "graph behind a NUL": _named("encoder.onnx\0.png", "graph"),
    "golden above the folder": _named("sub/../../outside.npz", "golden"),
    "graph that is a link to a device": _instead(GRAPH_FILE, _link_to("/dev/zero")),
    "graph that is a link to /etc/passwd": _instead(GRAPH_FILE, _link_to("/etc/passwd")),
    "graph that is a link to itself": _instead(GRAPH_FILE, _link_to(GRAPH_FILE)),
    "graph that is a pipe": _instead(GRAPH_FILE, _pipe),
    "graph that is a folder": _instead(GRAPH_FILE, Path.mkdir),
    "graph of 1 TB": _instead(GRAPH_FILE, _sparse),
    "golden that is a pipe": _instead(GOLDEN_FILE, _pipe),
    "golden of 1 TB": _instead(GOLDEN_FILE, _sparse),
    "golden bomb": _golden_member("images", _bomb),
    "golden bomb beside the samples": _golden_member("other", _bomb),
    "golden of objects": _golden_member("images", _objects),
    "golden of 10^12 numbers": _golden_member("images", lambda entry: entry.write(_npy_header("(4, 10**12)"))),
    "golden of 10^12 numbers, a number": _golden_member(
        "images", lambda entry: entry.write(_npy_header(f"(4, {10**12})") + bytes(64))
    ),
    "golden of a shape below zero": _golden_member("images", lambda entry: entry.write(_npy_header("(4, -1)"))),
    "golden of a type that runs": _golden_member(
        "images", lambda entry: entry.write(_npy_header("(4,)", "__import__('os').system('touch /tmp/x')"))
    ),
    "golden of a deep header": _golden_member(
        "images", lambda entry: entry.write(_npy_header("(" * 9000 + ")" * 9000))
    ),
    "golden of text": _golden(lambda arrays: arrays.update(images=np.array(["a"] * 4))),
    "golden of NaN": _golden(lambda arrays: arrays["images"].fill(np.nan)),
    "golden of NaN outputs": _golden(lambda arrays: [a.fill(np.nan) for n, a in arrays.items() if a.dtype.kind == "f"]),
    "golden of other shapes": _golden(lambda arrays: arrays.update(images=arrays["images"][:, :, :3])),
    "golden of one number": _golden(lambda arrays: arrays.update(images=np.float32(1))),
    "golden of other patches": _golden(lambda arrays: arrays.update(ids_keep=arrays["ids_keep"] + 10**6)),
    "golden of patches below zero": _golden(lambda arrays: arrays.update(ids_keep=arrays["ids_keep"] - 10**15)),
    "golden of outputs of another shape": _golden(lambda arrays: arrays.update(cls=arrays["cls"][:, :5])),
    "golden of complex outputs": _golden(lambda arrays: arrays.update(cls=arrays["cls"].astype(np.complex64))),
    "golden of text outputs": _golden(lambda arrays: arrays.update(cls=np.array(["a"] * len(arrays["cls"])))),
    "golden that is no archive": _instead(GOLDEN_FILE, lambda path: path.write_bytes(b"PK\x03\x04garbage")),
    "golden frame of text": _golden(lambda arrays: arrays.update(frame=np.array("a"), frame_image=np.array("b"))),
    "golden frame without its image": _golden(lambda arrays: arrays.update(frame=np.zeros((4, 4, 3), np.uint8))),
    "weights above the folder": _external("../outside.data"),
    "weights by their whole path": _external("/etc/passwd"),
    "weights in the manifest": _external(MANIFEST_FILE),
    "weights in a device": _external("/dev/zero"),
    "weights in no file": _external("absent.data"),
    "weights in the golden samples": _external(GOLDEN_FILE),
    "weights of no name": _external(""),
    "operator of another domain": _foreign("com.hostile", "Run"),
    "operator that is not": _foreign("", "Hostile"),
    "weight of 10^12 rows": _dims(10**12),
    "weight of rows below zero": _dims(-1),
    "weight of 2^62 rows": _dims(2**62),
    "graph of NaN": _graph(_garbage),
    **{f"graph with {name}": _graph(edit) for name, edit in GRAPHS.items()},
    "graph without outputs": _graph(lambda model: model.graph.ClearField("output")),
    "graph without nodes": _graph(lambda model: model.graph.ClearField("node")),
    "graph that runs in a circle": _graph(
        lambda model: model.graph.node[0].input.__setitem__(0, model.graph.node[-1].output[0])
    ),
    "graph of opset 10^6": _graph(lambda model: setattr(model.opset_import[0], "version", 10**6)),
    "graph of IR 10^6": _graph(lambda model: setattr(model, "ir_version", 10**6)),
    "graph of another input": _graph(lambda model: setattr(model.graph.input[0], "name", "other")),
    "graph cut off": _raw(lambda data: data[: len(data) // 2]),
    "graph of zeros": _raw(lambda data: bytes(len(data))),
    "graph that is empty": _raw(lambda data: b""),
    "graph of text": _raw(lambda data: b"#!/bin/sh\ntouch /tmp/x\n"),
    "graph of lengths without an end": _raw(lambda data: b"\x3a" + b"\xff" * 4000),
    "graph nested 10,000 deep": _raw(lambda data: b"\x3a\x80\x80\x80\x01" * 10_000),
    **{
        f"{place} {str(value)[:30]}": _set(place, value)
        for place, value in (
            ("schema_version", 99),
            ("schema_version", True),
            ("schema_version", 2.0),
            ("schema_version", None),
            ("kind", "program"),
            ("model", None),
            ("model", []),
            ("model.image_size", [10**9, 10**9]),
            ("model.image_size", [25]),
            ("model.image_size", [0, 0]),
            ("model.image_size", [-25, -10]),
            ("model.image_size", [25.0, 10]),
            ("model.patch_size", 0),
            ("model.patch_size", 10**18),
            ("model.embed_dim", 10**12),
            ("model.embed_dim", 0),
            ("model.embed_dim", -12),
            ("model.depth", 10**12),
            ("model.depth", 0),
            ("model.depth", -1),
            ("model.num_heads", 0),
            ("model.num_heads", 10**9),
            ("model.mlp_ratio", float("nan")),
            ("model.mlp_ratio", 10**400),
            ("model.name", "\x1b[2J\x1b]0;x\x07"),
            ("model.in_chans", 10**12),
            ("num_patches", 10**12),
            ("num_patches", -1),
            ("batch", 10**12),
            ("batch", 0),
            ("batch", -1),
            ("keep", 10**12),
            ("keep", 0),
            ("keep", -5),
            ("profile", {}),
            ("profile.B", [1, 1, 10**12]),
            ("profile.B", [0, 0, 0]),
            ("profile.B", []),
            ("profile.B", [3, 2, 1]),
            ("profile.K", [1, 1, 10**12]),
            ("profile.Z", [1, 1, 1]),
            ("precision", "fp4"),
            ("token_mode", "full"),
            ("token_mode", "cached"),
            ("token_mode", "ragged"),
            ("typing", "none"),
            ("engine", "tensorrt"),
            ("engine", "/bin/sh"),
            ("class_names", ["a"] * 10**5),
            ("class_names", [1]),
            ("class_names", ["\x1b[31m"]),
            ("licence", "\x1b[2J"),
            ("licence", None),
            ("licence", "x" * 10**6),
            ("quantization", {}),
            ("preprocess", {}),
            ("preprocess", None),
            ("preprocess.mean", [float("nan")] * 3),
            ("preprocess.mean", [float("inf")] * 3),
            ("preprocess.std", [0.0] * 3),
            ("preprocess.std", [1e-320] * 3),
            ("preprocess.std", [-1.0] * 3),
            ("preprocess.std", [float("nan")] * 3),
            ("preprocess.image_size", [10**6, 10**6]),
            ("preprocess.channels", 0),
            ("preprocess.channels", 10**9),
            ("preprocess.crop_pct", 0.0),
            ("preprocess.crop_pct", 1e-9),
            ("preprocess.crop_pct", float("nan")),
            ("preprocess.crop_pct", -1.0),
            ("preprocess.crop_pct", 1e9),
            ("preprocess.interpolation", "__class__"),
            ("preprocess.pixel_max", 0.0),
            ("preprocess.pixel_max", float("nan")),
            ("preprocess.pixel_max", -1.0),
            ("preprocess.unknown", 1),
            ("graph", {}),
            ("graph.file", ""),
            ("graph.file", "."),
            ("graph.file", 5),
            ("graph.opset", -1),
            ("graph.inputs", []),
            ("graph.inputs.0.shape", ["B", 3, 10**12, 10]),
            ("graph.inputs.0.shape", ["B", -3, 25, 10]),
            ("graph.inputs.0.shape", []),
            ("graph.inputs.0.dtype", "object"),
            ("graph.inputs.0.dtype", "float64"),
            ("graph.inputs.0.name", "x" * 10**6),
            ("graph.outputs", []),
            ("graph.outputs.0.shape", ["B", 10**12]),
            ("graph.outputs.0.shape", [-1]),
            ("graph.outputs.0.dtype", "object"),
            ("graph.outputs.0.name", "../x"),
            ("graph.outputs.0.name", "images"),
            ("graph.outputs.0.name", "\x1b[2J"),
            ("graph.blocks", ["a", "a"]),
            ("graph.blocks", ["absent"] * 2),
            ("golden.num_samples", 0),
            ("golden.num_samples", 10**12),
            ("golden.num_samples", -1),
            ("golden.file", "."),
            ("tolerance", {}),
            ("tolerance", {"cosine": float("nan")}),
            ("tolerance", {"cosine": float("-inf")}),
            ("tolerance", {"max_abs": float("inf")}),
            ("tolerance", {"max_abs": float("nan")}),
            ("tolerance", {"max_abs": -1}),
            ("tolerance", {"unknown": 1}),
            ("tolerance", {"cosine": "x"}),
            ("tolerance", {"cosine": 2}),
            ("parity", None),
            ("parity", {"a": float("nan")}),
            ("provenance", []),
            ("provenance", {"checkpoint": 5}),
            ("provenance", {"export": "x"}),
            ("engines", [{}]),
            ("engines", None),
            ("files", {}),
            ("files", None),
            ("files", {"a": "b"}),
            ("files.encoder\u202eonnx", {"sha256": "0", "size": 1}),
            ("files.x", {"sha256": "0" * 64, "size": -1}),
            ("files.x", {"sha256": "\x1b" * 64, "size": 1}),
        )
    },
}


def npz_bytes(**arrays: Any) -> bytes:
    """An archive of arrays."""
    written = io.BytesIO()
    np.savez(written, **arrays)
    return written.getvalue()
