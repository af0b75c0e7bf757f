"""LARS, with which the paper trains linear probes.

You, Gitman and Ginsburg, Large Batch Training of Convolutional Networks: https://arxiv.org/abs/1708.03888
As in MoCo v3 and the MAE authors' code, vectors (biases) are neither scaled nor decayed. timm's Lars scales them too
and adds an eps to the gradient's norm, so its steps are other ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mae_deploy.training.optim.groups import ParamGroup


class Lars(torch.optim.Optimizer):
    """Momentum SGD whose gradient is scaled, for each matrix, to `trust_coefficient` times the length of the
    weights.
    """

    def __init__(self, groups: list[ParamGroup], *, momentum: float = 0.9, trust_coefficient: float = 0.001) -> None:
        super().__init__(
            groups, {"lr": 0.0, "weight_decay": 0.0, "momentum": momentum, "trust_coefficient": trust_coefficient}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; the momentum holds scaled gradients, not yet multiplied by the learning rate."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        gradient = parameter.grad
        if parameter.ndim > 1:
            gradient = gradient.add(parameter, alpha=group["weight_decay"])
            length, change = parameter.norm(), gradient.norm()
            # No `if`: it would wait for the GPU. Where either length is zero, the gradient stays as it is.
            trust = torch.where(
                (length > 0) & (change > 0), group["trust_coefficient"] * length / change, torch.ones_like(length)
            )
            gradient = gradient * trust
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        momentum = state["momentum_buffer"].mul_(group["momentum"]).add_(gradient)
        parameter.add_(momentum, alpha=-group["lr"])
