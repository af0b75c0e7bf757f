"""A model that learns while it is rounded as its INT8 graph will round it: fake quantisation with straight-through
gradients.

Jacob et al. 2018: https://arxiv.org/abs/1712.05877 (section 3). Which Linears, which ranges and what SmoothQuant moves
is decided by `models.quantization.policy`, which the exporter follows too. The model's parameters and their names stay
what they are; its Linears compute something else. Shapes: D inputs and O outputs of a Linear.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mae_deploy.errors import CheckFailed
from mae_deploy.images.read import Array
from mae_deploy.models.quantization.activations import ActivationStats, Observer
from mae_deploy.models.quantization.layers import layers_read
from mae_deploy.models.quantization.outliers import tail_penalty
from mae_deploy.models.quantization.policy import Policy
from mae_deploy.models.quantization.rounding import (
    INT8,
    dynamic_round_trip,
    eligible_linears,
    linear_of,
    weight_round_trip,
)
from mae_deploy.models.quantization.smoothing import likely_absmax, smoothed_stats, smoothing_divisor
from mae_deploy.models.vit import Encoder

RangeKind = Literal["none", "dynamic", "static"]

_WEIGHED_IMAGES = 32
"""Images of a batch whose tails are penalised: with all 128, a step takes 1.8 times as long."""

_LEAST_SHARE = 0.2
"""Weight of one more observation of static ranges; the first few weigh the same."""


def quantize_in_training(
    model: Encoder,
    kind: RangeKind,
    policy: Policy,
    *,
    start: float = 0.0,
    until: float = 0.9,
    observed: int = 50,
    penalises: bool = False,
) -> Quantizer:
    """Let the Linears of the encoder's blocks be rounded in training, in place: their class changes, no parameter and
    no name does.

    Args:
        kind: none rounds nothing, so that there is only the penalty.
        start: share of a run from which it rounds.
        until: share of a run from which static ranges stay what they are.
        observed: into how many parts a run is split, from each of which static ranges are taken once.
        penalises: whether heavy tails of what is rounded are added up for `Quantizer.penalty`.
    """
    return Quantizer(model, kind, policy, start=start, until=until, observed=observed, penalises=penalises)


@dataclass(slots=True)
class _Mode:
    """What the Linears of a model do now."""

    penalises: bool
    rounds: bool = False
    observer: Observer | None = None


class Quantizer(nn.Module):
    """Says when the Linears of a model are rounded, and where static ranges come from.

    It has no parameters. Static ranges belong to a run's state; as extra state, and not as buffers that are saved, they
    stay out of a moving average of weights, which would take minutes to forget that there were none.
    """

    def __init__(
        self,
        model: Encoder,
        kind: RangeKind,
        policy: Policy,
        *,
        start: float,
        until: float,
        observed: int,
        penalises: bool,
    ) -> None:
        super().__init__()
        self.kind, self.policy = kind, policy
        self.start, self.until, self.observed = start, until, observed
        self.mode = _Mode(penalises)
        self._model = (model,)
        """In a tuple, so that it is not part of this module."""
        self._places = {
            name: _Place(model, name, policy, self.mode)
            for name in eligible_linears(model)
            if not name.startswith("decoder_")
        }
        self._unread = True
        """Whether static ranges have to be read from the buffers."""
        self.places = nn.ModuleList(self._places.values())
        for name, place in self._places.items():
            linear = linear_of(model, name)
            linear.__class__ = QuantizedLinear
            linear.__dict__["place"] = place  # past nn.Module's own bookkeeping: no submodule either

    @property
    def rounds(self) -> bool:
        """Whether the model is rounded now; so it stays after a training step."""
        return self.mode.rounds

    @contextmanager
    def step(self, step: int, done: float) -> Iterator[None]:
        """Around the forward pass of a training step.

        Args:
            step: steps before this one.
            done: share of the run that is behind it.
        """
        self.mode.rounds = self.kind != "none" and done >= self.start
        observer = Observer(self._model[0], self._places) if self._observes(step, done) else None
        self.mode.observer = observer
        try:
            yield
        finally:
            self.mode.observer = None
        if observer is not None:
            self._learn(observer)

    @contextmanager
    def plain(self) -> Iterator[None]:
        """The model computes in full precision within the block."""
        rounds, self.mode.rounds = self.mode.rounds, False
        try:
            yield
        finally:
            self.mode.rounds = rounds

    def penalty(self) -> Tensor:
        """The mean tail penalty of what the Linears that ran since the last call were given, a float32 scalar."""
        found = [place.penalty for place in self._places.values() if place.penalty is not None]
        for place in self._places.values():
            place.penalty = None
        return torch.stack(found).mean()

    def get_extra_state(self) -> Tensor:
        """Static ranges of all Linears, one after the other: float32."""
        ranges = [part.flatten() for place in self._places.values() for part in place.buffers()]
        return torch.cat(ranges) if ranges else torch.zeros(0)

    def set_extra_state(self, state: Tensor) -> None:
        """Go on with these."""
        for place in self._places.values():
            for part in place.buffers():
                mine, state = state.split([part.numel(), state.numel() - part.numel()])
                part.copy_(mine.view_as(part))
        self._unread = True

    def _observes(self, step: int, done: float) -> bool:
        """Whether static ranges are taken from this step: as soon as the model is to be rounded, then once in each part
        of the run but the last.
        """
        if not (self.policy.static and self.mode.rounds):
            return False
        if self._unread:
            self._adopt()
            self._unread = False
        known = any(place.ranges is not None for place in self._places.values())
        part, before = (
            int(share * self.observed + 1e-9) for share in (done, done * (step - 1) / step if step else 0.0)
        )
        return not known or (part > before and done < self.until)

    def _learn(self, observer: Observer) -> None:
        """Take in what was observed, the same on all processes."""
        with suppress(CheckFailed):  # NaN or infinity: the loop does not take this step either
            self._move(observer.stats())
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self.set_extra_state(_mean_of_processes(self.get_extra_state()))
        self._adopt()
        self._unread = True  # a step that is not taken gives the buffers back as they were

    def _move(self, stats: Mapping[str, ActivationStats]) -> None:
        """Move the ranges towards those that an export would choose."""
        tensors = {name: tensor.cpu() for name, tensor in self._model[0].state_dict().items()}
        divisors = self.policy.divisors(tensors, list(stats), stats)
        moved = {name: self._places[name].move_divisor(divisor) for name, divisor in divisors.items()}
        for name, scale in self.policy.scales(list(stats), smoothed_stats(stats, moved)).items():
            assert scale is not None
            self._places[name].move_scale(scale)

    def _adopt(self) -> None:
        """Round with the static ranges that there are."""
        observations = torch.stack([place.observations for place in self._places.values()]).tolist()
        for place, count in zip(self._places.values(), observations, strict=True):
            place.ranges = (place.scale.clone(), place.divisor.clone()) if count else None


class _Place(nn.Module):
    """What one Linear is rounded with."""

    scale: Tensor
    divisor: Tensor
    observations: Tensor

    def __init__(self, model: Encoder, name: str, policy: Policy, mode: _Mode) -> None:
        super().__init__()
        self.name, self.mode = name, mode
        read = layers_read(model.state_dict(), name)
        self.alpha = policy.smooth_alpha if read else None
        self.static = policy.static
        self.ranges: tuple[Tensor, Tensor] | None = None
        """Scale and divisor of static, in tensors of their own: a backward pass may need them when the buffers have
        moved on."""
        self.penalty: Tensor | None = None
        self._read = {layer: model.get_submodule(layer) for layer in read}
        """The layers whose weights say how large its input is."""
        if policy.static:
            # All float32, as the training loop takes back floating-point buffers with a step that is not taken.
            self.register_buffer("scale", torch.ones(()), persistent=False)
            self.register_buffer("divisor", torch.ones(linear_of(model, name).in_features), persistent=False)
            self.register_buffer("observations", torch.zeros(()), persistent=False)

    @property
    def rounds(self) -> bool:
        """Whether the Linear is rounded now."""
        return self.mode.rounds and (self.ranges is not None or not self.static)

    def forward(self, values: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """A Linear's input `(..., D)` and weight `(O, D)` as its INT8 graph has them; gradients pass as if they were
        not rounded.
        """
        divisor = self._divisor(weight)
        given = values.detach()
        rounded, clipped = (
            (_round_dynamic(given, divisor), None)
            if self.ranges is None
            else _round_static(given, divisor, self.ranges[0])
        )
        return _StraightThrough.apply(values, rounded, clipped), _StraightThrough.apply(
            weight, _round_weight(weight.detach(), divisor), None
        )

    def see(self, values: Tensor, weight: Tensor) -> None:
        """Count a Linear's input where ranges are wanted, and weigh its tails where those are penalised."""
        if self.mode.observer is not None:
            self.mode.observer.see(self.name, values)
        if self.mode.penalises and torch.is_grad_enabled():
            divisor, values = self._divisor(weight), values[:_WEIGHED_IMAGES]
            # A copy: static ranges move between the forward and the backward pass.
            self.penalty = tail_penalty(values if divisor is None else values / divisor.clone())

    @torch.no_grad()
    def move_divisor(self, divisor: Array) -> Array:
        """Towards another one, in logarithms; returns where it is now."""
        self.divisor.copy_(_between(self.divisor, torch.from_numpy(divisor).to(self.divisor), self._share()))
        return self.divisor.double().cpu().numpy()

    @torch.no_grad()
    def move_scale(self, scale: float) -> None:
        """Towards another one, in logarithms."""
        self.scale.copy_(_between(self.scale, torch.full_like(self.scale, scale), self._share()))
        self.observations += 1

    def _share(self) -> Tensor:
        return (1 / (1 + self.observations)).clamp(min=_LEAST_SHARE)

    @torch.no_grad()
    def _divisor(self, weight: Tensor) -> Tensor | None:
        """What the input's channels are divided by, float32 `(D,)`: with static ranges as observed, else by the weights
        of now, as in an export.
        """
        if self.alpha is None:
            return None
        if self.static:
            return None if self.ranges is None else self.ranges[1]
        tensors = {
            f"{name}.{part}": getattr(module, part)
            for name, module in self._read.items()
            for part in ("weight", "bias")
        }
        tensors[f"{self.name}.weight"] = weight
        return smoothing_divisor(weight, likely_absmax(tensors, self.name), self.alpha).float()


class QuantizedLinear(nn.Linear):
    """A Linear that rounds its input and its weight while its place says so."""

    place: _Place

    def forward(self, input: Tensor) -> Tensor:
        """`(..., D) -> (..., O)`."""
        place = self.place
        place.see(input, self.weight)
        if not place.rounds:
            return super().forward(input)
        rounded_input, rounded_weight = place(input, self.weight)
        return F.linear(rounded_input, rounded_weight, self.bias)


class _StraightThrough(torch.autograd.Function):
    """The rounded numbers, with the gradient of those that were rounded; none where they were clipped."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, rounded: Tensor, clipped: Tensor | None) -> Tensor:
        ctx.save_for_backward(clipped)
        ctx.dtype = values.dtype
        return rounded

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, None, None]:
        (clipped,) = ctx.saved_tensors
        return (grad if clipped is None else grad.masked_fill(clipped, 0)).to(ctx.dtype), None, None


def _round_dynamic(values: Tensor, divisor: Tensor | None) -> Tensor:
    """The input as the graph has it, times the divisor that its weight was multiplied by."""
    return (
        dynamic_round_trip(values.float())
        if divisor is None
        else dynamic_round_trip(values.float() / divisor).mul_(divisor)
    )


def _round_static(values: Tensor, divisor: Tensor | None, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The same, and where it is clipped: what would be rounded to less than -128 or more than 127."""
    step = scale if divisor is None else scale * divisor
    scaled = values.float() / step
    clipped = (scaled + 0.5).abs_() > 128
    return INT8.levels(scaled, -128).mul_(step), clipped


def _round_weight(weight: Tensor, divisor: Tensor | None) -> Tensor:
    """The weight as the graph has it, over the divisor that it was multiplied by."""
    return weight_round_trip(weight) if divisor is None else weight_round_trip(weight * divisor).div_(divisor)


def _mean_of_processes(values: Tensor) -> Tensor:
    torch.distributed.all_reduce(values)
    return values / torch.distributed.get_world_size()


def _between(old: Tensor, new: Tensor, share: Tensor) -> Tensor:
    """The weighted geometric mean."""
    return torch.exp((1 - share) * old.log() + share * new.log())
