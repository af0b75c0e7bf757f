"""Find weights files and read them strictly; no code that a file carries is run."""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from mae_deploy.checkpoint import Positions, read_safetensors
from mae_deploy.errors import CheckFailed, ConfigError
from mae_deploy.file_kinds import look_at
from mae_deploy.files import read_json, sha256
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.weights.read.state_dict import choose_state_dict
from mae_deploy.weights.read.unpickle import read_pickle

MODEL_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""What the weights in a model folder are called, in the order of preference; an index names the shards that hold
them."""

_INDEX = ".index.json"
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")
"""What weights files end with."""
_GIVE = "give a .pth, .pt, .bin or .safetensors file, or a model folder of timm or Hugging Face"
_OTHER_FOLDERS = (
    ("manifest.json", "a bundle: give the checkpoint that it was exported from"),
    ("config.yaml", "a run without a checkpoint yet"),
    ("*.distcp", "a checkpoint of torch.distributed in parts: save it whole where it was trained"),
    ("zero_to_fp32.py", "a checkpoint of DeepSpeed in parts: save it whole where it was trained"),
    ("adapter_model.*", "an adapter (LoRA) without its model: merge both where it was trained"),
    ("tf_model.h5", "a model folder with TensorFlow's weights only"),
    ("flax_model.msgpack", "a model folder with Flax's weights only"),
    ("saved_model.pb", "a TensorFlow SavedModel"),
    ("*.index", "a TensorFlow checkpoint"),
    ("*.onnx", "a folder with an ONNX graph: give the checkpoint that it was exported from"),
)
"""Folders that are known by a file in them."""


GUESSED = "guessed"
"""Word by which what nothing tells of the preprocessing is known."""


@dataclass(slots=True)
class Source:
    """Weights as they were found, on their way to the original's names. Where a fact of the model is None, the tensors
    tell it.
    """

    file: Path
    """The weights file, or the index of its shards."""
    sha256: str
    tensors: dict[str, Tensor]
    settings: dict[str, Any]
    """config.json beside the file, else the training arguments in it."""
    beside: dict[str, Any] = field(default_factory=dict)
    """What the file holds beside the tensors: training's records, the words of a safetensors header."""
    layout: str = "original or timm"
    architecture: str | None = None
    """timm's name of the model."""
    image_size: tuple[int, int] | None = None
    """Height and width that the position embeddings were made for, if they are as many."""
    num_heads: int | None = None
    decoder_num_heads: int | None = None
    pool: str | None = None
    """What the head reads: avg, cls, mean or map (`models.vit.Pool`)."""
    name: str | None = None
    """Of the encoder, where it is none of the original's."""
    beyond_plain: dict[str, Any] = field(default_factory=dict)
    """Settings of the encoder in which its family differs from the original's (`models.config.BEYOND_PLAIN`)."""
    norm_pix_loss: bool | None = None
    """Whether the decoder predicts normalised pixels."""
    class_names: tuple[str, ...] | None = None
    preprocess: Preprocess | None = None
    preprocess_from: str | None = None
    """What tells `preprocess`; None: nothing does."""
    licence: str | None = None
    own_licence: str | None = None
    """What a file of ours says: it may bear any name."""
    parent: dict[str, Any] = field(default_factory=dict)
    """The provenance that a file of ours records."""
    positions: Positions = "bicubic"
    """How its position embeddings are taken from one grid to another."""
    renamed: int = 0
    names: dict[str, str] = field(default_factory=dict)
    """The file's own names of tensors that were renamed one by one."""
    folded: list[str] = field(default_factory=list)
    """What the model computes with, and ours holds in other tensors."""
    dropped: list[str] = field(default_factory=list)
    """Tensors that the encoder's outputs do not depend on."""
    notes: list[str] = field(default_factory=list)
    """Where ours differs, short of the model itself."""


def find_weights(path: Path) -> Path:
    """The weights file that `path` is, or that the model folder `path` holds.

    Raises:
        ConfigError: there is none.
    """
    found = next((path / name for name in MODEL_FILES if (path / name).is_file()), path)
    if not found.is_file():
        raise ConfigError(f"no weights at {path}{_instead(path)}", hint=_how_to_get(path))
    return found


def read_source(file: Path, *, average: bool = False, key: str | None = None) -> Source:
    """Read a weights file, its shards if it is an index, and config.json beside it.

    Args:
        average: take the running average of the weights where the file has one, as timm does.
        key: under which of its keys the file has the weights; None: the usual ones.

    Raises:
        ConfigError: config.json is not JSON, or nothing is under the key.
        CheckFailed: the weights are damaged, carry code, or are not a state dict.
    """
    settings = read_settings(file.with_name("config.json"))
    if file.name.endswith(_INDEX):
        content, fingerprint = _read_shards(_shards(file))
    else:
        content, fingerprint = read_content(file), sha256(file)
    if isinstance(content, dict) and isinstance(content.get("args"), argparse.Namespace):
        settings = {**vars(content["args"]), **settings}
    chosen = choose_state_dict(content, file, average=average, key=key)
    return Source(file, fingerprint, chosen.tensors, settings, chosen.beside, notes=chosen.notes)


def read_settings(path: Path) -> dict[str, Any]:
    """The content of a JSON file, nothing where there is none.

    Raises:
        ConfigError: it is not JSON, no settings by name, or what is there is no file.
    """
    if not os.path.lexists(path):
        return {}
    if not path.is_file():
        raise ConfigError(f"{path} is no file, or a link to none")
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} holds no settings by name")
    return settings


def check_values(settings: Mapping[str, Any], kinds: Mapping[str, Sequence[str]], where: str) -> None:
    """Whether what stands under known names is of its kind.

    Args:
        kinds: the names of each of `_KINDS`.
        where: whose settings, for the message.

    Raises:
        ConfigError: it is not.
    """
    for kind, names in kinds.items():
        for name in names:
            if name in settings and not _KINDS[kind](settings[name]):
                raise ConfigError(f"{where} has {name} {settings[name]!r:.80}, which is no {kind}")


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a finite number."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


_KINDS: dict[str, Callable[[Any], bool]] = {
    "count": lambda value: type(value) is int and 1 <= value <= 1_000_000,
    "positive number": lambda value: is_number(value) and value > 0,
    "true or false": lambda value: value is None or type(value) is bool,
    "numbers": lambda value: isinstance(value, list | tuple) and all(map(is_number, value)),
    "text": lambda value: isinstance(value, str),
}
"""What values are, in words."""


def count_blocks(tensors: dict[str, Tensor], prefix: str) -> int:
    """How many numbered blocks there are under `prefix`."""
    return len({match.group(1) for name in tensors if (match := re.match(rf"{prefix}\.(\d+)\.", name))})


def tensor_of(source: Source, name: str, dims: int) -> Tensor:
    """The tensor of this name.

    Raises:
        CheckFailed: there is none, or it has another number of dimensions.
    """
    tensor = source.tensors.get(name)
    if tensor is None or tensor.ndim != dims:
        found = ", ".join(list(source.tensors)[:4])
        raise CheckFailed(f"{source.file} is not a ViT: no tensor '{name}' with {dims} dimensions (found {found} …)")
    return tensor


def _shards(index: Path) -> list[Path]:
    content = read_json(index)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not places:
        raise CheckFailed(f"{index} names no shards (weight_map)")
    names = sorted({str(name) for name in places.values()})
    for name in names:
        if Path(name).name != name or not index.with_name(name).is_file():
            raise CheckFailed(f"{index} names the shard {name}, which is not beside it")
    return [index.with_name(name) for name in names]


def _read_shards(shards: list[Path]) -> tuple[Any, str]:
    """All shards as one state dict, and the hash of what `sha256sum` prints for them."""
    tensors: dict[str, Any] = {}
    for shard in shards:
        tensors |= choose_state_dict(read_content(shard), shard, average=False).tensors
    sums = "".join(f"{sha256(shard)}  {shard.name}\n" for shard in shards)
    return tensors, hashlib.sha256(sums.encode()).hexdigest()


def read_content(file: Path) -> Any:
    """What a weights file holds, whatever its name: of a safetensors file, the tensors under `model` and beside them
    the words of the header.

    Raises:
        CheckFailed: it is something else, damaged, or wants to run something.
    """
    try:
        kind = look_at(file)
    except OSError as error:
        raise CheckFailed(f"cannot read {file}: {error.strerror}") from error
    if kind.weights is None:
        raise CheckFailed(f"{file} is {kind.words}", hint=kind.hint)
    if kind.weights == "pickle":
        return read_pickle(file)
    tensors, words = read_safetensors(file)
    return {**words, "model": tensors}


# --- where there is no weights file ----------------------------------------------------------------------------------


def _instead(path: Path) -> str:
    """What is there in its place."""
    if not path.is_dir():
        return ", which is no file or folder" if path.exists() else ""
    names = sorted(entry.name for entry in path.iterdir())
    found = next((words for name, words in _OTHER_FOLDERS if fnmatch.filter(names, name)), None)
    return f", which is {found}" if found else f", a folder with {', '.join(names[:4]) or 'nothing in it'}"


def _how_to_get(path: Path) -> str:
    """How to give what was meant."""
    if path.is_dir():
        inside = sorted(entry.name for entry in path.iterdir() if entry.suffix in _SUFFIXES)
        return f"give the file itself: {path / inside[0]}" if inside else _GIVE
    text = path.as_posix()
    if re.match(r"https?:/", text):
        return "nothing is downloaded: fetch it first, for example with curl -LO, and give the file"
    name = re.sub(r"^(hf-hub:|hf:/*|timm/)", lambda match: "timm/" if match[1] == "timm/" else "", text)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and path.suffix not in _SUFFIXES:
        return f"nothing is downloaded: hf download {name} --local-dir FOLDER fetches a model of Hugging Face's hub"
    return _GIVE
