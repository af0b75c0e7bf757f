"""A file is what its bytes say, whatever it is called."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from safetensors.torch import save_file

from mae_deploy.file_kinds import look_at

TENSORS = {"norm.weight": torch.arange(7.0), "head.bias": torch.arange(3.0)}


def zipped(path: Path, *names: str) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, name)


def tarred(path: Path, *names: str) -> None:
    with tarfile.open(path, "w") as archive:
        for name in names:
            content = pickle.dumps(name)
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def onnx_graph(path: Path) -> None:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", ends[:1], ends[1:])
    onnx.save(helper.make_model(graph, producer_name="pytorch"), path)


def script(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and its files are still about
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(path))


def written(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def cut(save: Callable[[Path], object], share: float) -> Callable[[Path], object]:
    def save_part(path: Path) -> None:
        save(path)
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])

    return save_part


def save_pickle(path: Path) -> None:
    torch.save(TENSORS, path)


def save_safetensors(path: Path) -> None:
    save_file(TENSORS, path)


OTHERS = {
    "an empty file": written(b""),
    "full of zeros": written(bytes(9000)),
    "a Git LFS pointer": written(b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 343279349\n"),
    "a git-annex pointer": written(b"/annex/objects/SHA256E-s1--ab.pth\n"),
    "a DVC pointer": written(b"outs:\n- md5: ab\n  path: mae.pth\n"),
    "a web page": written(b"\n<!DOCTYPE html>\n<html lang='en'>\xc3\xa9"),
    "an XML file": written(b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>"),
    "a JSON file": written(b'{"error": "Repository not found"}'),
    "a text file that begins with 'Not Found'": written(b"Not Found\n"),
    "an ONNX graph": onnx_graph,
    "a TensorFlow SavedModel": written(b"\x08\x01\x12\x05graph"),
    "a TensorFlow graph": written(b"\x0a\x11\x0a\x01x\x12\x0bPlaceholder"),
    "a part of a TensorFlow checkpoint": written(b"index" + bytes.fromhex("57fb808b247547db")),
    "a TensorFlow Lite": written(b"\x1c\0\0\0TFL3" + bytes(50)),
    "an HDF5 file": written(b"\x89HDF\r\n\x1a\n" + bytes(50)),
    "a Keras model": lambda path: zipped(path, "config.json", "model.weights.h5"),
    "a MessagePack file, as Flax": written(b"\x82\xa6params\x81\xa5Dense\xff"),
    "a GGUF file": written(b"GGUF\x03\0\0\0"),
    "a Core ML model": written(b"\x08\x07\x12\x02ab\xa2\x1f\x02ab"),
    "a TensorRT engine": written(b"ftrt\xff\xff"),
    "an archive of NumPy arrays": lambda path: zipped(path, "a.npy", "b.npy"),
    "a zip archive of 2 files (a.md, mae.pth)": lambda path: zipped(path, "a.md", "mae.pth"),
    "a tar archive of 1 file (mae.pth)": lambda path: tarred(path, "mae.pth"),
    "of the tar form of early PyTorch": lambda path: tarred(path, "sys_info", "pickle", "tensors", "storages"),
    "a gzip archive": written(gzip.compress(b"weights")),
    "a TorchScript program": script,
    "a torch.package archive": lambda path: zipped(path, "p/.data/version", "p/.data/python_version"),
    "the beginning of a zip archive": cut(save_pickle, 0.5),
    "cut off: its header tells of ": cut(save_safetensors, 0.9),
    "cut off: its header tells": cut(save_safetensors, 0.2),
    "neither a safetensors file nor a file of torch.save (it begins with the bytes 41 e8": written(b"A\xe8 \xe8"),
    "neither a safetensors file nor": written(b"\xff"),
}


@pytest.mark.parametrize("words", OTHERS)
@pytest.mark.parametrize("name", ["mae.pth", "model.safetensors"])
def test_other_files_are_no_weights(tmp_path: Path, name: str, words: str) -> None:
    OTHERS[words](tmp_path / name)
    kind = look_at(tmp_path / name)
    assert kind.words.startswith(words)
    assert kind.weights is None
    assert kind.hint is not None
    assert "torch.load" not in kind.hint
    assert "\n" not in kind.words + kind.hint


@pytest.mark.parametrize("name", ["mae.pth", "model.safetensors"])
def test_weights_are_weights_under_either_name(tmp_path: Path, name: str) -> None:
    save_pickle(tmp_path / name)
    assert look_at(tmp_path / name).weights == "pickle"
    torch.save(TENSORS, tmp_path / name, _use_new_zipfile_serialization=False)
    assert look_at(tmp_path / name).weights == "pickle"
    save_safetensors(tmp_path / name)
    assert look_at(tmp_path / name).weights == "safetensors"
    save_file({}, tmp_path / name)
    assert look_at(tmp_path / name).weights == "safetensors"


@pytest.mark.parametrize("protocol", [2, 5])
def test_bare_pickles_are_looked_at_and_not_run(tmp_path: Path, protocol: int) -> None:
    (tmp_path / "a.pth").write_bytes(pickle.dumps({"a": np.zeros(2)}, protocol))
    assert look_at(tmp_path / "a.pth").weights == "pickle"


@pytest.mark.parametrize(
    ("content", "stands_in"),
    [
        (b"", True),
        (b"<html>", True),
        (b"version https://git-lfs.github.com/spec/v1\n", True),
        (json.dumps([1]).encode(), False),
        (b"words", False),
    ],
)
def test_what_stands_in_for_a_file(tmp_path: Path, content: bytes, stands_in: bool) -> None:
    (tmp_path / "metadata.json").write_bytes(content)
    assert look_at(tmp_path / "metadata.json").stands_in is stands_in


def test_names_in_archives_stay_on_one_line(tmp_path: Path) -> None:
    zipped(tmp_path / "a.pth", "a\nb\x1b[31m")
    assert look_at(tmp_path / "a.pth").words == "a zip archive of 1 file (a?b?[31m)"
