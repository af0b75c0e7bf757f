"""Weights files as training scripts leave them seldom, and what can be wrong with those."""

from __future__ import annotations

import json
import pickle
import struct
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save

from mae_deploy.checkpoint import METADATA, WEIGHTS
from tests.hostile.pictures import BROKEN, HARMLESS

Write = Callable[[Path, Path], None]
"""Makes the copy of a checkpoint folder rare; the second path must not be there afterwards."""

_NAME = "blocks.0.attn.qkv.weight"

Tensors = dict[str, Any]


def _saved(edit: Callable[[Tensors], Any], **options: Any) -> Write:
    """The folder with its weights in torch.save's form, under a name of safetensors, beside their metadata."""

    def write(folder: Path, _: Path) -> None:
        tensors: Tensors = dict(load((folder / WEIGHTS).read_bytes()))
        (folder / WEIGHTS).unlink()
        (folder / METADATA).unlink()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of kinds of tensors that are still tried out, or going
            content = edit(tensors)
            torch.save({"model": tensors} if content is None else content, folder / "weights.pth", **options)

    return write


def _replaced(make: Callable[[torch.Tensor], Any]) -> Write:
    def edit(tensors: Tensors) -> None:
        tensors[_NAME] = make(tensors[_NAME])

    return _saved(edit)


def _all(make: Callable[[torch.Tensor], Any]) -> Write:
    def edit(tensors: Tensors) -> None:
        tensors.update({name: make(tensor) for name, tensor in tensors.items()})

    return _saved(edit)


def _safetensors(edit: Callable[[dict[str, Any], bytes], tuple[dict[str, Any], bytes]]) -> Write:
    """Header and tensors of a file with a change."""

    def write(folder: Path, _: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header, tensors = edit(json.loads(data[8 : 8 + length]), data[8 + length :])
        words = json.dumps(header).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(words)) + words + tensors)

    return write


def _gap(header: dict[str, Any], tensors: bytes) -> tuple[dict[str, Any], bytes]:
    """64 bytes between all tensors and the header."""
    for name, entry in header.items():
        if name != "__metadata__":
            entry["data_offsets"] = [offset + 64 for offset in entry["data_offsets"]]
    return header, bytes(64) + tensors


def _shared(header: dict[str, Any], tensors: bytes) -> tuple[dict[str, Any], bytes]:
    """Two tensors of one place."""
    header["norm.bias"]["data_offsets"] = header["norm.weight"]["data_offsets"]
    return header, tensors


def _with(tensors: Callable[[], dict[str, torch.Tensor]]) -> Write:
    def write(folder: Path, _: Path) -> None:
        found = load((folder / WEIGHTS).read_bytes())
        (folder / WEIGHTS).write_bytes(save({**found, **tensors()}, metadata={}))

    return write


def _spaced(folder: Path, _: Path) -> None:
    """The header with blanks behind it, as alignment leaves them."""
    data = (folder / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    (folder / WEIGHTS).write_bytes(
        struct.pack("<Q", length + 64) + data[8 : 8 + length] + b" " * 64 + data[8 + length :]
    )


def _typed(tensor: torch.dtype) -> Write:
    def write(folder: Path, _: Path) -> None:
        found = load((folder / WEIGHTS).read_bytes())
        (folder / WEIGHTS).write_bytes(save({name: value.to(tensor) for name, value in found.items()}, metadata=None))

    return write


class _Subclass(torch.Tensor):
    """A tensor of a class of its own, which a file names and nobody here has."""


def _metadata(change: Callable[[str], str | bytes]) -> Write:
    def write(folder: Path, _: Path) -> None:
        words = change((folder / METADATA).read_text())
        (folder / METADATA).write_bytes(words if isinstance(words, bytes) else words.encode())

    return write


def _storages(tensors: Tensors) -> None:
    """All tensors as views of one storage."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors.values()])
    start = 0
    for name, tensor in tensors.items():
        tensors[name] = flat[start : start + tensor.numel()].view(tensor.shape)
        start += tensor.numel()


def _quantized(tensor: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


_PLAIN: dict[str, Write] = {
    "file of torch.save": _saved(lambda tensors: None),
    "file of torch.save in its older form": _saved(lambda tensors: None, _use_new_zipfile_serialization=False),
    "state dict alone": _saved(lambda tensors: OrderedDict(tensors)),
    "parameters": _all(lambda tensor: torch.nn.Parameter(tensor)),
    "tensors that need gradients": _all(lambda tensor: tensor.requires_grad_()),
    "tensors in BF16": _all(lambda tensor: tensor.bfloat16()),
    "tensors in FP16": _all(lambda tensor: tensor.half()),
    "tensors in FP64": _all(lambda tensor: tensor.double()),
    "views of one storage": _saved(_storages),
    "a tensor that is transposed": _replaced(lambda tensor: tensor.t().contiguous().t()),
    "records of training beside them": _saved(
        lambda tensors: {
            "model": tensors,
            "epoch": 3,
            "best": np.float64(0.5),
            "losses": np.zeros(3),
            "names": ["a"],
            "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]},
            "scaler": {"scale": 65536.0, "growth_tracker": 0},
            "rng": torch.get_rng_state(),
            "half a character": "\ud800",
        }
    ),
    "8-bit floats": _all(lambda tensor: tensor.to(torch.float8_e4m3fn)),
    "a dictionary in itself": _saved(lambda tensors: tensors.update(again=tensors)),
    "names of data parallelism": _saved(
        lambda tensors: {"model": {f"module.{name}": tensor for name, tensor in tensors.items()}}
    ),
}
_SAFE: dict[str, Write] = {
    "safetensors in BF16": _typed(torch.bfloat16),
    "safetensors in FP16": _typed(torch.float16),
    "safetensors in FP64": _typed(torch.float64),
    "header with blanks behind it": _spaced,
    "metadata with a byte-order mark": _metadata(lambda text: b"\xef\xbb\xbf" + text.encode()),
    "metadata in UTF-16": _metadata(lambda text: text.encode("utf-16")),
    "metadata with line ends of Windows": _metadata(lambda text: text.replace("\n", "\r\n")),
    "metadata in one line": _metadata(lambda text: json.dumps(json.loads(text))),
}
_BROKEN: dict[str, Write] = {
    "file of torch.save by protocol 4": _saved(lambda tensors: None, pickle_protocol=4),
    "sparse tensors": _replaced(lambda tensor: tensor.to_sparse()),
    "sparse tensors in rows": _replaced(lambda tensor: tensor.to_sparse_csr()),
    "sparse tensors with indices beyond their size": _replaced(
        lambda tensor: torch.sparse_coo_tensor(
            torch.tensor([[10**9], [0]]), torch.ones(1), tuple(tensor.shape), check_invariants=False
        )
    ),
    "quantised tensors": _replaced(_quantized),
    "complex tensors": _replaced(lambda tensor: tensor.to(torch.complex64)),
    "whole numbers": _replaced(lambda tensor: tensor.to(torch.int32)),
    "tensors without content": _replaced(lambda tensor: tensor.to("meta")),
    "nested tensors": _replaced(lambda tensor: torch.nested.nested_tensor([tensor[0], tensor[1, :3]])),
    "a tensor of a class of its own": _replaced(lambda tensor: tensor.as_subclass(_Subclass)),
    "a number in place of a tensor": _replaced(lambda tensor: 5),
    "nothing in place of a tensor": _replaced(lambda tensor: None),
    "a NumPy array in place of a tensor": _replaced(lambda tensor: tensor.numpy()),
    "NaN in FP16": _all(lambda tensor: (tensor * float("inf")).half()),
    "names that are numbers": _saved(lambda tensors: {"model": dict(enumerate(tensors.values()))}),
    "names that are tuples": _saved(lambda tensors: {"model": {(name, 1): value for name, value in tensors.items()}}),
    "a list": _saved(lambda tensors: list(tensors.values())),
    "a tensor": _saved(lambda tensors: tensors[_NAME]),
    "nothing": _saved(lambda tensors: {}),
    "text": _saved(lambda tensors: "weights"),
    "a module": _saved(lambda tensors: torch.nn.Linear(3, 3)),
    "an optimiser alone": _saved(lambda tensors: {"optimizer": {"state": {}, "param_groups": []}}),
    "gaps between tensors": _safetensors(_gap),
    "two tensors of one place": _safetensors(_shared),
    "a tensor of another type by its header": _safetensors(
        lambda header, tensors: ({**header, "norm.bias": {**header["norm.bias"], "dtype": "I32"}}, tensors)
    ),
    "10^5 tensors more": _with(lambda: {f"x{number}": torch.zeros(1) for number in range(100_000)}),
    "a tensor of no elements more": _with(lambda: {"x": torch.zeros(0, 10**9)}),
    "a tensor of a name of 1 MB": _with(lambda: {"x" * (1 << 20): torch.zeros(1)}),
    "a tensor whose name speaks to the terminal": _with(lambda: {"\x1b[2J": torch.zeros(1)}),
    "a tensor of 60 dimensions": _with(lambda: {"norm.weight": torch.ones(12).view(*[1] * 59, 12)}),
    "metadata with a name twice": _metadata(lambda text: text.rstrip()[:-1] + ', "step": 1, "step": 2}'),
    "metadata with something behind it": _metadata(lambda text: text + "x"),
    "metadata of NaN": _metadata(lambda text: text.replace('"step": ', '"step": NaN, "x": ', 1)),
    "metadata whose name is half a character": _metadata(lambda text: text.replace('"step"', '"\\ud800"', 1)),
}


def _pickled(folder: Path, _: Path) -> None:
    (folder / METADATA).unlink()
    (folder / WEIGHTS).write_bytes(pickle.dumps({"a": np.zeros(3)}))


RARE_WEIGHTS: dict[str, Write] = {
    **{f"{HARMLESS}{name}": write for name, write in _SAFE.items()},
    **{f"plain: {name}": write for name, write in _PLAIN.items()},
    **{f"{BROKEN}{name}": write for name, write in _BROKEN.items()},
    f"{BROKEN}pickle of an array": _pickled,
}
"""Plain ones have no metadata: `import` needs options for what the tensors do not tell."""
