"""Weights of a simple feature pyramid: random, or from a file with Detectron2's names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mae_deploy.checkpoint import OWN_LICENCE, UNKNOWN_LICENCE
from mae_deploy.errors import CheckFailed, ConfigError
from mae_deploy.models.pyramid import OUT_CHANNELS, SimpleFeaturePyramid
from mae_deploy.seeding import derive_seed
from mae_deploy.weights.read.check_names import check_names
from mae_deploy.weights.read.check_numbers import check_numbers
from mae_deploy.weights.read.files import read_source

_NAME = re.compile(r"((?:.*\.)?)(simfp_\d+\..+)")
"""Where the pyramid stands in a detector, such as `backbone.`, and the name of a tensor in it."""


@dataclass(frozen=True, slots=True)
class Pyramid:
    """A pyramid in evaluation mode, with what goes into the record of whatever is derived from it."""

    module: SimpleFeaturePyramid
    record: dict[str, Any]
    """Where its weights come from."""
    licence: str
    """What its weights may be used for."""


def random_pyramid(width: int, seed: int, out_channels: int = OUT_CHANNELS) -> Pyramid:
    """An untrained pyramid, to build and time what stands on it; the same seed gives the same weights, and torch's own
    state stays.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(seed, "pyramid"))
        module = SimpleFeaturePyramid(width, out_channels)
    return Pyramid(module.eval(), {"source": "random", "seed": seed}, OWN_LICENCE)


def load_pyramid(path: Path, width: int) -> Pyramid:
    """Read a trained pyramid, alone or out of a whole detector: .safetensors, or a .pth of Detectron2; the file's other
    tensors are left aside.

    Raises:
        ConfigError: no such file.
        CheckFailed: the file is damaged, carries code, or its pyramid is not exactly one for maps `width` wide.
    """
    if not path.is_file():
        raise ConfigError(
            f"no pyramid weights at {path}", hint="give a .safetensors or .pth file, or 'random' for untrained weights"
        )
    if path.suffix == ".pkl":  # Detectron2's model zoo pickles NumPy arrays
        raise CheckFailed(
            f"refused to unpickle {path}: a .pkl can run code",
            hint="give a .pth as Detectron2's DetectionCheckpointer saves it, or a .safetensors file",
        )
    source = read_source(path)
    tensors = _pyramid_tensors(source.tensors, path)
    last = tensors.get("simfp_4.0.weight")
    with torch.device("meta"):  # nothing is allocated or initialised that the weights replace
        module = SimpleFeaturePyramid(width, last.shape[0] if last is not None and last.ndim == 4 else OUT_CHANNELS)
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    check_names(
        tensors,
        expected,
        path,
        hint=f"it must be Detectron2's SimpleFeaturePyramid with norm='LN' on an encoder {width} wide",
    )
    check_numbers(tensors, path)
    module.load_state_dict(tensors, assign=True)
    return Pyramid(module.eval(), {"source": path.name, "source_sha256": source.sha256}, UNKNOWN_LICENCE)


def _pyramid_tensors(tensors: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """The one pyramid among the tensors of a detector, in float32 and under its own names."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if match := _NAME.fullmatch(name):
            found.setdefault(match[1], {})[match[2]] = tensor.float()
    if not found:
        raise CheckFailed(
            f"{file} holds no feature pyramid: none of its {len(tensors)} tensors is named simfp_… (found"
            f" {', '.join(list(tensors)[:4])} …)"
        )
    if len(found) > 1:
        raise CheckFailed(
            f"{file} holds {len(found)} feature pyramids: {', '.join(f'{prefix}simfp_…' for prefix in found)}",
            hint="give a file with one",
        )
    return next(iter(found.values()))
