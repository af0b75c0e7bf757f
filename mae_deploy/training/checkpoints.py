"""Writing a run's checkpoints and going back to one: weights, optimiser, moving average and progress, whole or not at
all.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mae_deploy.checkpoint import Metadata, write_checkpoint
from mae_deploy.files import atomic_path, point_link, remove
from mae_deploy.training.job import TrainingJob
from mae_deploy.training.state.ema import WeightAverage
from mae_deploy.training.state.progress import (
    OPTIMIZER,
    REST,
    STATE,
    TRAINED,
    Progress,
    damage,
    load_optimizer,
    optimizer_tensors,
    prefix_of,
    read_weights,
    save_progress,
    split_weights,
    write_tensors,
)
from mae_deploy.training.state.run_folder import RunFolder
from mae_deploy.training.state.sharding import Network, like, load_whole, whole_tensors


class Checkpoints:
    """The run's state between the devices and the disk; only the main process writes."""

    network: Network
    optimizer: torch.optim.Optimizer
    average: WeightAverage | None

    def __init__(self, job: TrainingJob, folder: RunFolder, state: Progress, *, keep: int) -> None:
        """Load the last checkpoint's weights into the job's model, if there is one."""
        self.folder = folder
        self.state = state
        self.keep = keep
        self.prefix = prefix_of(job.model, job.saved)
        """Of the names of the part of the model that a checkpoint is of."""
        self.start = whole_tensors(job.model.state_dict(), keep=state.good is None)
        """The weights before the first step, to go back to while there is no good checkpoint."""
        self.resumed = folder.last.resolve() if folder.last is not None else None
        """Resolved: `last` moves on before every process has read it."""
        if self.resumed is not None:
            load_whole(job.model, read_weights(self.resumed, self.prefix)[0])

    def assemble(self, network: Network, optimizer: torch.optim.Optimizer, average: WeightAverage | None) -> None:
        """Take what is built around the model, and load the rest of the last checkpoint."""
        self.network, self.optimizer, self.average = network, optimizer, average
        if self.resumed is None:
            return
        load_optimizer(self.resumed, optimizer)
        if average is not None:
            self._set_average(read_weights(self.resumed, self.prefix)[1])
        if self.state.scaler is not None and network.accelerator.scaler is not None:
            network.accelerator.scaler.load_state_dict(self.state.scaler)

    def shown(self) -> AbstractContextManager[Any]:
        """The model holds what is evaluated and exported within the block: the moving average, where there is one."""
        return self.average.shown() if self.average is not None else nullcontext()

    def save(self, metadata: Metadata, *, best: bool, finished: bool) -> None:
        """Write `step-N` aside, rename it, then move `best` and `last`. Every process comes here, and only where
        tensors are sharded, waits.
        """
        state, accelerator = self.state, self.network.accelerator
        state.candidate = state.step
        if accelerator.scaler is not None:
            state.scaler = accelerator.scaler.state_dict()
        main = accelerator.is_main_process
        target = self.folder.checkpoints / f"step-{state.step}"
        if main or self.network.sharded:
            contents = self._gather(keep=main)
            if main and damage(target) is not None:
                remove(target)  # what a copy or a full disk has damaged
                with atomic_path(target) as aside:
                    self._write(aside, contents, replace(metadata, step=state.step))
                    save_progress(aside / STATE, state)
        if main:
            if best:
                point_link(self.folder.checkpoints / "best", target.name)
            point_link(self.folder.checkpoints / "last", target.name)
            self.folder.prune(self.keep, spare=None if finished else state.good)

    def num_bytes(self) -> int:
        """Of a checkpoint's tensors, once a step was taken."""
        model = list(self.network.model.state_dict().values())
        tensors = model * (1 if self.average is None else 2) + list(optimizer_tensors(self.optimizer).values())
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def confirm(self, step: int) -> None:
        """A step's loss was finite: if the last checkpoint was written right before it, its weights are good."""
        state = self.state
        if state.candidate is not None and state.candidate == step - 1:
            state.good, state.candidate = state.candidate, None
            self.start = {}
            if self.network.accelerator.is_main_process:
                self.folder.prune(self.keep, spare=state.good)

    def go_back(self) -> str:
        """Load the last good checkpoint, or the state of the start; returns its name. Every process reads it from the
        run folder.
        """
        state = self.state
        state.candidate = None
        self.network.accelerator.wait_for_everyone()  # until the main process has written it
        path = None if state.good is None else self.folder.checkpoints / f"step-{state.good}"
        weights, averaged = (self.start, None) if path is None else read_weights(path, self.prefix)
        load_whole(self.network.model, weights)
        load_optimizer(path, self.optimizer)
        if self.average is not None:
            self._set_average(averaged or weights)
        return "the start" if path is None else path.name

    @torch.no_grad()
    def _set_average(self, tensors: dict[str, Tensor] | None) -> None:
        """Take whole tensors as the moving average."""
        assert self.average is not None
        assert tensors is not None
        for name, tensor in self.average.average.items():
            tensor.copy_(like(tensor, tensors[name]))

    def _gather(self, *, keep: bool) -> dict[str, dict[str, Tensor]]:
        """Whole tensors of everything that is written, by file."""
        model = self.network.model
        with self.shown():
            shown, rest = split_weights(whole_tensors(model.state_dict(), keep=keep), self.prefix)
        trained = whole_tensors(model.state_dict(), keep=keep) if self.average is not None else {}
        return {
            "": shown,
            REST: rest,
            TRAINED: trained,
            OPTIMIZER: whole_tensors(optimizer_tensors(self.optimizer), keep=keep),
        }

    def _write(self, folder: Path, contents: dict[str, dict[str, Tensor]], metadata: Metadata) -> None:
        write_checkpoint(folder, contents.pop(""), metadata)
        for name, tensors in contents.items():
            write_tensors(folder / STATE / name, tensors)
