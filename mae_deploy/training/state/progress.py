"""Everything that a resumed run needs beside the weights, as safetensors and JSON: nothing to unpickle.

Tensors are whole and named after parameters, so they fit any number of processes, sharded or not.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mae_deploy.checkpoint import WEIGHTS, check_safetensors, read_safetensors, save_tensors
from mae_deploy.config import from_dict
from mae_deploy.errors import CheckFailed, ConfigError, MaeDeployError, reason
from mae_deploy.files import read_json, write_json
from mae_deploy.training.state.sharding import like

STATE = "state"
"""Folder of a checkpoint that holds what follows."""

REST = "rest.safetensors"
"""Tensors of the model that are not in the part that the checkpoint is of (a projector, say)."""

TRAINED = "trained.safetensors"
"""All weights as they are trained, where the checkpoint holds their moving average."""

OPTIMIZER = "optimizer.safetensors"
PROGRESS = "progress.json"

_MOST = 1 << 53
"""No run takes as many steps."""


@dataclass(slots=True)
class Progress:
    """How far a run is, in optimiser steps of its effective batch."""

    step: int = 0
    """Optimiser steps behind us, skipped ones too; data order, augmentation, masking and dropout follow from it and the
    seed."""
    best: float | None = None
    """Best value of the metric that picks the best checkpoint."""
    scaler: dict[str, Any] | None = None
    """State of the fp16 loss scaler."""
    processes: int = 1
    """Processes that share each batch."""
    batch_size: int = 0
    """Images a step in each process, as asked for."""
    accum_iter: int = 1
    """Batches of one optimiser step, as asked for."""
    effective_batch: int = 0
    """Images of one optimiser step; stays what it is on any number of processes."""
    skipped: int = 0
    """Steps that were not taken because a loss or gradient was not finite."""
    consecutive_skips: int = 0
    """Of them, those in a row up to now."""
    rollbacks: int = 0
    """Times that the run went back to an earlier checkpoint."""
    rollback_at: int | None = None
    """Step after which it goes back again."""
    lr_factor: float = 1.0
    """The schedule's learning rate is multiplied by this."""
    good: int | None = None
    """Step of the last checkpoint whose weights gave a finite loss afterwards."""
    candidate: int | None = None
    """Step of the last checkpoint, while that is not known of it."""


def save_progress(folder: Path, progress: Progress) -> None:
    """Write the progress."""
    write_json(folder / PROGRESS, dataclasses.asdict(progress))


def load_progress(folder: Path) -> Progress:
    """Read the progress.

    Raises:
        ConfigError: the file is damaged, or another version's.
    """
    found = read_json(folder / PROGRESS)
    try:
        found.pop("kernels", None)  # which CPU kernels earlier versions chose; the run goes on with PyTorch's own
        progress = from_dict(Progress, found)
    except (AttributeError, TypeError, ConfigError) as error:
        raise ConfigError(f"cannot read {folder / PROGRESS}: {reason(error)}") from error
    for name, value in dataclasses.asdict(progress).items():
        if name != "best" and isinstance(value, int | float) and not 0 <= value <= _MOST:
            raise ConfigError(f"cannot read {folder / PROGRESS}: '{name}' is {value}")
    return progress


def damage(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be resumed from: the file, and what is wrong with it; None: nothing is."""
    try:
        load_progress(checkpoint / STATE)
        for file in sorted({checkpoint / WEIGHTS, *(checkpoint / STATE).glob("*.safetensors")}):
            check_safetensors(file)
    except MaeDeployError as error:
        return str(error)
    return None


# --- weights ---------------------------------------------------------------------------------------------------------


def prefix_of(model: nn.Module, part: nn.Module) -> str:
    """How the names of a part's tensors begin in the whole model."""
    name = next(name for name, module in model.named_modules() if module is part)
    return f"{name}." if name else ""


def split_weights(tensors: dict[str, Tensor], prefix: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of a part under its own names, and the rest."""
    part = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return part, {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}


def read_weights(checkpoint: Path, prefix: str) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """The whole model's tensors as trained, and their moving average where the run keeps one."""
    shown = {prefix + name: tensor for name, tensor in read_safetensors(checkpoint / WEIGHTS)[0].items()} | _read(
        checkpoint / STATE / REST
    )
    trained = _read(checkpoint / STATE / TRAINED)
    return (trained, shown) if trained else (shown, None)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors from any device, if there are any."""
    if tensors:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(path, tensors)


def _read(path: Path) -> dict[str, Tensor]:
    return read_safetensors(path)[0] if path.is_file() else {}


# --- optimiser -------------------------------------------------------------------------------------------------------


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state under parameter names."""
    return {
        f"{name}/{slot}": torch.as_tensor(value)
        for name, parameter in _named(optimizer)
        for slot, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer(checkpoint: Path | None, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's tensors into the optimiser's state, or empty it.

    Raises:
        CheckFailed: one has neither its parameter's shape nor one number, or holds whole numbers, or some parameters
            lack what others have.
    """
    states: dict[str, dict[str, Tensor]] = {}
    for key, tensor in (_read(checkpoint / STATE / OPTIMIZER) if checkpoint is not None else {}).items():
        name, _, slot = key.rpartition("/")
        states.setdefault(name, {})[slot] = tensor
    if len({frozenset(state) for state in states.values()}) > 1:
        raise CheckFailed(f"{checkpoint}: the optimiser's state lacks a part of what it has of other parameters")
    optimizer.state.clear()
    for name, parameter in _named(optimizer):
        for slot, tensor in states.get(name, {}).items():
            if tensor.shape != parameter.shape and tensor.numel() != 1:
                raise CheckFailed(f"{checkpoint}: the optimiser's {name}/{slot} has the shape {tuple(tensor.shape)}")
            if not tensor.is_floating_point():
                raise CheckFailed(f"{checkpoint}: the optimiser's {name}/{slot} is {tensor.dtype}")
        if name in states:
            optimizer.state[parameter] = {slot: _placed(tensor, parameter) for slot, tensor in states[name].items()}


def _placed(tensor: Tensor, parameter: Tensor) -> Tensor:
    """On the parameter's device, and sharded as it is where it has its shape; a count of steps has not."""
    return like(parameter, tensor) if tensor.shape == parameter.shape else tensor.to(parameter.device)


def _named(optimizer: torch.optim.Optimizer) -> list[tuple[str, nn.Parameter]]:
    return [
        (name, parameter)
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
    ]
