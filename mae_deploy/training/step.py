"""One optimiser step, and what a stage's loss is given in it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from mae_deploy.data.dataset import Batch
from mae_deploy.seeding import derive_seed, seed_everything, uniform_rows
from mae_deploy.training.monitor.timing import StepTimer
from mae_deploy.training.plan import RunPlan
from mae_deploy.training.state.sharding import Network, whole


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One micro-batch of one process."""

    images: Tensor
    """`(B, C, H, W)`, normalised, on the device."""
    labels: Tensor
    """int64 `(B,)`, on the device."""
    seed: int = 0
    """The run's seed."""
    step: int = 0
    """Optimiser steps before this one."""
    first: int = 0
    """Place of the first image in the effective batch."""
    effective: int = 0
    """Images of the effective batch, over all processes and accumulated batches; 0 where this batch is all."""
    done: float = 0.0
    """Share of the run's steps before this one, in [0, 1)."""
    items: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """int64 `(B,)`, on the CPU: number of each image in its data set; -1 where a stream has none."""
    view: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """int64 `(B,)`, on the CPU: number of each among the image's fixed views; 0 where every epoch has views of its
    own."""
    timer: StepTimer = field(default_factory=lambda: StepTimer(torch.device("cpu")), repr=False, compare=False)
    """Of the step that this batch is a part of."""
    _calls: Iterator[int] = field(default_factory=itertools.count, repr=False, compare=False)

    def rand(self, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1), `(B, *shape)` on the device.

        An image's row depends on the seed, the step, its place in the effective batch and the count of calls, so any
        number of processes and any accumulation draw the same. Rows of the whole effective batch are drawn for that:
        for small shapes.
        """
        B, device = len(self.images), self.images.device
        generator = torch.Generator(device).manual_seed(derive_seed(self.seed, "rand", self.step, next(self._calls)))
        rows = torch.rand(max(self.effective, self.first + B), *shape, generator=generator, device=device)
        return rows[self.first : self.first + B]

    def image_rand(self, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1), `(B, *shape)` on the device, that depend on the seed, the image and its fixed view
        only; each call gives the same.
        """
        rows = uniform_rows(self.seed, "image", math.prod(shape), self.items.numpy(), self.view.numpy())
        return to_device(torch.from_numpy(rows).reshape(-1, *shape), self.images.device)

    def timed(self, part: str) -> AbstractContextManager[None]:
        """Within the block, time counts as that of a part of the step, such as the teacher, which is then shown and
        logged beside the rest.
        """
        return self.timer.part(part)


Loss = Callable[[nn.Module, StepBatch], dict[str, Tensor]]
"""`(model, batch)` to scalars; `loss` is minimised, the others are logged."""


@dataclass(frozen=True, slots=True)
class StepNumbers:
    """What is known of a step, still on the device."""

    names: tuple[str, ...]
    """Of the loss's parts."""
    num_flags: int
    values: Tensor
    """The parts' means, the sums of the flags, the gradient's norm, fp16's loss scale (else 1), this process's own
    losses."""
    timer: StepTimer


class Stepper:
    """One optimiser step of all processes together: forward, backward, the guard's check, the update; nothing waits for
    the device.
    """

    def __init__(
        self,
        loss: Loss,
        network: Network,
        optimizer: torch.optim.Optimizer,
        normalise: nn.Module,
        plan: RunPlan,
        *,
        clip_grad: float | None,
        seed: int,
    ) -> None:
        self.loss = loss
        self.network = network
        self.optimizer = optimizer
        self.normalise = normalise
        self.plan = plan
        self.clip_grad = clip_grad
        self.seed = seed
        self.accelerator = network.accelerator
        self._parameters: list[nn.Parameter] = [
            parameter for group in optimizer.param_groups for parameter in group["params"]
        ]
        self._buffers = [buffer for buffer in network.model.buffers() if buffer.is_floating_point()]

    def take(self, batches: Iterable[Batch], step: int, lr: float, flags: Callable[[], Sequence[float]]) -> StepNumbers:
        """Take one step; it changes nothing where the loss or the gradient is not finite.

        Args:
            step: steps before this one.
            lr: the schedule's learning rate.
            flags: numbers of this process, which are summed over all; asked for after the last batch.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self.network.trained.train()
        buffers = [buffer.clone() for buffer in self._buffers]
        timer = StepTimer(self.accelerator.device)
        parts = [self._accumulate(batch, step, micro, timer) for micro, batch in enumerate(batches)]
        own = torch.stack([part["loss"] for part in parts])
        means = torch.stack([torch.stack([part[name] for part in parts]).mean() for name in parts[0]])
        asked = flags()
        told = to_device(torch.tensor(asked, dtype=torch.float32), self.accelerator.device)
        reduced: Any = self.accelerator.reduce(torch.cat([means / self.accelerator.num_processes, told]), "sum")
        loss = reduced[list(parts[0]).index("loss")]
        scaler: Any = self.accelerator.scaler
        scale: Tensor = (
            scaler._scale.clone() if scaler is not None else torch.ones_like(loss)
        )  # get_scale() would wait for the device
        norm, finite = self._update(loss)
        for buffer, before in zip(self._buffers, buffers, strict=True):
            buffer.copy_(torch.where(finite, buffer, before))
        return StepNumbers(tuple(parts[0]), len(asked), torch.cat([reduced, torch.stack([norm, scale]), own]), timer)

    def loss_of(self, model: nn.Module, batch: Batch, step: int) -> float:
        """The loss of one micro-batch with a bare model as it is now, the mean over processes; nothing is trained, but
        the forward pass is that of training, gradients and all, which parts of a loss rely on.
        """
        model.train()
        given = self._given(batch, step, 0, StepTimer(self.accelerator.device))
        with self.accelerator.autocast():
            loss = self.loss(model, given)["loss"]
        mean: Any = self.accelerator.reduce(loss.detach().float(), "mean")
        return float(mean)

    def _given(self, batch: Batch, step: int, micro: int, timer: StepTimer) -> StepBatch:
        """What the loss is given."""
        plan, accelerator, device = self.plan, self.accelerator, self.accelerator.device
        shared = accelerator.num_processes * plan.batch_size
        return StepBatch(
            self.normalise(batch.images.to(device, non_blocking=True)),
            batch.labels.to(device, non_blocking=True),
            seed=self.seed,
            step=step,
            first=micro * shared + accelerator.process_index * plan.batch_size,
            effective=plan.accum_iter * shared,
            done=step / plan.total_steps,
            items=batch.items,
            view=batch.views,
            timer=timer,
        )

    def _accumulate(self, batch: Batch, step: int, micro: int, timer: StepTimer) -> dict[str, Tensor]:
        """Forward and backward of one micro-batch; returns the loss's parts."""
        accelerator, accum_iter = self.accelerator, self.plan.accum_iter
        given = self._given(batch, step, micro, timer)
        seed_everything(derive_seed(self.seed, "step", step, micro, accelerator.process_index))
        with self.network.accumulate(last=micro == accum_iter - 1):
            with accelerator.autocast():
                parts = self.loss(self.network.trained, given)
            accelerator.backward(parts["loss"] / accum_iter)
        return {name: value.detach().float() for name, value in parts.items()}

    def _update(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Clip and step, unless the loss or the gradient is not finite; returns the gradient's norm and whether both
        are finite.
        """
        optimizer, scaler = self.optimizer, self.accelerator.scaler
        if scaler is not None:
            scaler.unscale_(optimizer)
        norm = get_total_norm([parameter.grad for parameter in self._parameters if parameter.grad is not None])
        total = whole(norm).float()
        finite = loss.isfinite() & total.isfinite()
        if self.clip_grad is not None:
            clip_grads_with_norm_(self._parameters, self.clip_grad, norm)
        if isinstance(optimizer, torch.optim.AdamW):
            # The fused kernels read this on the device; GradScaler tells them of an overflow in the same way.
            optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
            optimizer.step()
        elif bool(finite):
            optimizer.step()
        if scaler is not None:
            scaler.update()
        optimizer.zero_grad()
        return total, finite


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device, without waiting for it, which a copy from ordinary memory does."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values
