"""Find weights files and read them strictly; no code that a file carries is run."""

from __future__ import annotations

import argparse
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from mae_deploy.errors import CheckFailed, ConfigError
from mae_deploy.files import read_json, sha256
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.models.position import interpolate_position_embedding
from mae_deploy.weights.read.unpickle import read_pickle

MODEL_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""What the weights in a model folder are called, in the order of preference; an index names the shards that hold
them."""

_INDEX = ".index.json"
_WRAPPERS = ("model", "state_dict", "model_state")
_AVERAGES = ("state_dict_ema", "model_ema")
"""Where training scripts put the running average of the weights."""
_HEAVY = ("optimizer", "ema_state_dict", *_AVERAGES)
"""What stands beside the weights, is as large, and says nothing about them."""


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
    """What the head reads, avg or cls."""
    norm_pix_loss: bool | None = None
    """Whether the decoder predicts normalised pixels."""
    class_names: tuple[str, ...] | None = None
    preprocess: Preprocess | None = None
    licence: str | None = None
    own_licence: str | None = None
    """What a file of ours says: it may bear any name."""
    parent: dict[str, Any] = field(default_factory=dict)
    """The provenance that a file of ours records."""
    resample: Callable[[Tensor, tuple[int, int], tuple[int, int]], Tensor] = interpolate_position_embedding
    """Takes position embeddings `(1, 1 + N, D)` from one grid to another."""
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
        raise ConfigError(
            f"no weights at {path}",
            hint="give a .pth, .pt, .bin or .safetensors file, or a model folder of timm or Hugging Face",
        )
    return found


def read_source(file: Path, *, average: bool = False) -> Source:
    """Read a weights file, its shards if it is an index, and config.json beside it.

    Args:
        average: take the running average of the weights where the file has one, as timm does.

    Raises:
        ConfigError: config.json is not JSON.
        CheckFailed: the weights are damaged, carry code, or are not a state dict.
    """
    settings = read_settings(file.with_name("config.json"))
    if file.name.endswith(_INDEX):
        content, fingerprint = _read_shards(_shards(file))
    else:
        content, fingerprint = _read(file), sha256(file)
    if isinstance(content, dict) and isinstance(content.get("args"), argparse.Namespace):
        settings = {**vars(content["args"]), **settings}
    beside: dict[str, Any] = {}
    for key in (*(_AVERAGES if average else ()), *_WRAPPERS):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            beside |= {name: value for name, value in content.items() if name not in (key, *_HEAVY)}
            content = content[key]
    if not isinstance(content, dict) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckFailed(f"{file} holds no state dict of tensors")
    tensors = {re.sub(r"^(module\.|_orig_mod\.)+", "", str(name)): tensor for name, tensor in content.items()}
    if len(tensors) < len(content):
        raise CheckFailed(f"{file} holds the same tensors twice: with and without the prefix of a wrapper")
    return Source(file, fingerprint, tensors, settings, beside)


def read_settings(path: Path) -> dict[str, Any]:
    """The content of a JSON file, nothing where there is none.

    Raises:
        ConfigError: it is not JSON, or no settings by name.
    """
    settings = read_json(path) if path.is_file() else {}
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} holds no settings by name")
    return settings


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
        raise CheckFailed(f"not a ViT: no tensor '{name}' with {dims} dimensions (found {found} …)")
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
        part = _read(shard)
        if not isinstance(part, dict):
            raise CheckFailed(f"{shard} holds no state dict of tensors")
        tensors |= part["model"] if shard.suffix == ".safetensors" else part
    sums = "".join(f"{sha256(shard)}  {shard.name}\n" for shard in shards)
    return tensors, hashlib.sha256(sums.encode()).hexdigest()


def _read(file: Path) -> Any:
    return _read_safetensors(file) if file.suffix == ".safetensors" else read_pickle(file)


def _read_safetensors(file: Path) -> dict[str, Any]:
    """The tensors, under `model`, and beside them the words of the header."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as content:
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118  (no mapping)
            return {**(content.metadata() or {}), "model": tensors}
    except (SafetensorError, OSError) as error:
        raise CheckFailed(f"cannot read {file}: {error}") from error
