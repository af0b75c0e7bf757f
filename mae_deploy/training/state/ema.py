"""An exponential moving average of the weights, with torch's own update."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from mae_deploy.training.state.sharding import local


class WeightAverage:
    """The average of a model's floating-point tensors, whole or sharded as they are in the model."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        saved = model.state_dict().keys()
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        self.current: dict[str, Tensor] = {
            name: tensor for name, tensor in tensors.items() if name in saved and tensor.is_floating_point()
        }
        self.average = {name: tensor.detach().clone() for name, tensor in self.current.items()}

    def update(self, step: int) -> None:
        """Take in the weights after a step, counted from 1; early steps weigh more, so that a short run forgets its
        random start.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        get_ema_multi_avg_fn(decay)(self._averages(), self._currents(), step)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """The model holds the average within the block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for current, average in zip(self._currents(), self._averages(), strict=True):
            kept = current.clone()
            current.copy_(average)
            average.copy_(kept)

    def _averages(self) -> list[Tensor]:
        return [local(tensor) for tensor in self.average.values()]

    def _currents(self) -> list[Tensor]:
        return [local(tensor) for tensor in self.current.values()]
