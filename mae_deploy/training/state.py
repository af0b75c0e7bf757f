"""Everything that a resumed run needs beside the weights, as safetensors and JSON: nothing to unpickle."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mae_deploy.files import read_json, write_json
from mae_deploy.training.optim import ParamGroup

REST = "rest.safetensors"


@dataclass(slots=True)
class Progress:
    """How far a run is."""

    step: int = 0
    """Optimiser steps taken; data order, augmentation, masking and dropout follow from it and the seed."""
    best: float | None = None
    """Best value of the metric that picks the best checkpoint."""
    scaler: dict[str, Any] | None = None
    """State of the fp16 loss scaler."""
    processes: int = 1
    """Processes that share each batch; another number would see the data in another order."""


def save_state(folder: Path, groups: list[ParamGroup], optimizer: torch.optim.Optimizer, progress: Progress) -> None:
    """Write the optimiser's tensors under parameter names, and the progress."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for name, parameter in _named(groups):
        for key, value in optimizer.state[parameter].items():
            tensors[f"{name}/{key}"] = torch.as_tensor(value).detach().cpu().contiguous()
    save_file(tensors, folder / "optimizer.safetensors")
    write_json(folder / "progress.json", dataclasses.asdict(progress))


def load_progress(folder: Path) -> Progress:
    """Read the progress."""
    return Progress(**read_json(folder / "progress.json"))


def load_optimizer(folder: Path, groups: list[ParamGroup], optimizer: torch.optim.Optimizer) -> None:
    """Put the saved tensors back into the optimiser's state."""
    tensors = load_file(folder / "optimizer.safetensors")
    states: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, slot = key.rpartition("/")
        states.setdefault(name, {})[slot] = tensor
    for name, parameter in _named(groups):
        optimizer.state[parameter] = {
            slot: tensor if slot == "step" and parameter.device.type == "cpu" else tensor.to(parameter.device) for slot, tensor in states.get(name, {}).items()
        }


def save_rest(folder: Path, model: nn.Module, saved: nn.Module) -> None:
    """Write the tensors of `model` that are not in its part `saved` (a projector, say), if there are any."""
    known = {tensor.data_ptr() for tensor in saved.state_dict().values()}
    rest = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items() if tensor.data_ptr() not in known}
    if rest:
        save_file(rest, folder / REST)


def load_rest(folder: Path, model: nn.Module) -> None:
    """Put back what `save_rest` wrote."""
    if (folder / REST).is_file():
        model.load_state_dict(load_file(folder / REST), strict=False)


def _named(groups: list[ParamGroup]) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, parameter) for group in groups for name, parameter in zip(group["names"], group["params"], strict=True)]
