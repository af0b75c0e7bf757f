"""What calibration learns of the inputs of Linears in one pass over the images.

Magnitudes are counted, for each channel, by a float's own exponent and first three bits of mantissa: 256 bins reach
from 2^-20 to 2^12. So one pass serves any range, and any scaling of channels that SmoothQuant chooses afterwards. ONNX
Runtime's collectors keep one equidistant histogram a tensor and all arrays that went into it; each scaling would be
another pass. Shapes: D channels, G histograms (D, or 1 for all channels).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import numpy as np
import torch
from timm.layers import Attention
from torch import Tensor, nn

from mae_deploy.errors import CheckFailed
from mae_deploy.images.read import Array
from mae_deploy.models.quantization.histogram import LEVELS, Histogram, Method
from mae_deploy.models.quantization.layers import layer_before
from mae_deploy.models.quantization.rounding import FP8, INT8, AttentionScales, Rounding, linear_of

_BINS = 256
_SHIFT = 20
"""Of a float's 23 bits of mantissa, 3 remain: eight bins an octave."""
_FIRST = (127 - 20) << 3
"""The bin of 2^-20. What is smaller falls into it too, and what is larger than the last bin into the last."""
_EDGES = (np.arange(_FIRST, _FIRST + _BINS + 1, dtype=np.int32) << _SHIFT).view(np.float32).astype(np.float64)
_EDGES[0] = 0

_NORMS = ("q_norm", "k_norm")
"""Of queries and keys, in timm's attention."""

_EQUAL_BINS = 64 * LEVELS
"""Bins of the histogram from which a range is chosen."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ActivationStats:
    """The input of one Linear over all calibration images and tokens."""

    absmax: Array
    """float64 `(D,)`."""
    mean: Array
    """float64 `(D,)`."""
    mean_square: Array
    """float64 `(D,)`."""
    counts: Array
    """int64 `(G, 256)`: how many magnitudes fell in each bin."""
    divisor: Array
    """float64 `(D,)`: what the channels were divided by since they were counted."""

    def divided_by(self, divisor: Array) -> ActivationStats:
        """The statistics of `x / divisor`, a factor `(D,)` for each channel; only where each has its histogram."""
        assert len(self.counts) == len(divisor)
        return replace(
            self,
            absmax=self.absmax / divisor,
            mean=self.mean / divisor,
            mean_square=self.mean_square / divisor**2,
            divisor=self.divisor * divisor,
        )

    @property
    def outlier_ratio(self) -> float:
        """The largest magnitude over the root mean square, of the whole tensor; 0 where all is zero."""
        rms = float(np.sqrt(self.mean_square.mean()))
        return float(self.absmax.max()) / rms if rms > 0 else 0.0

    def histogram(self) -> Histogram:
        """The magnitudes of all channels."""
        limit = float(self.absmax.max())
        edges = np.linspace(0, limit, _EQUAL_BINS + 1)
        cumulative = np.zeros(len(edges))
        groups = (
            array.reshape(len(self.counts), -1).max(axis=1) for array in (self.absmax * self.divisor, self.divisor)
        )
        for counts, largest, divisor in zip(self.counts, *groups, strict=True):
            own_edges = np.minimum(_EDGES, largest)
            own_edges[-1] = largest
            cumulative += np.interp(edges * divisor, own_edges, np.concatenate([[0], np.cumsum(counts)]))
        return Histogram(np.diff(cumulative), limit)


def activation_scales(
    stats: Mapping[str, ActivationStats], method: Method = "mse", percentile: float = 99.99, rounding: Rounding = INT8
) -> dict[str, float]:
    """For each Linear the scale of its input, `x ≈ stored * scale`: the threshold over 127; for FP8, whose step grows
    with the number, the largest over 448.
    """
    if rounding is FP8:
        return {name: float(rounding.scales(entry.absmax.max())) for name, entry in stats.items()}
    return {
        name: float(rounding.scales(entry.histogram().threshold(method, percentile))) for name, entry in stats.items()
    }


def attention_scales(
    model: nn.Module, absmax: Mapping[str, Array], divisors: Mapping[str, Array], rounding: Rounding = INT8
) -> dict[str, AttentionScales]:
    """For each attention the scales of q, k and v, by their largest magnitudes: to clip them gains nothing beside the
    rounding of the softmax.

    Rotary positions turn pairs of channels: what comes of them is at most as large as the pair is long.

    Args:
        absmax: `Observer.attention_absmax`.
        divisors: what the input of each proj, and with it v, is divided by (`models.quantization.smoothing`).
    """
    found = {}
    for name, values in absmax.items():
        q, k, v = values.reshape(3, -1)
        attention = cast(Attention, model.get_submodule(name))
        if getattr(model, "rope", None) is not None and name.startswith("blocks."):
            q, k = (np.linalg.norm(part.reshape(attention.num_heads, 2, -1), axis=1) for part in (q, k))
        if isinstance(attention.norm, nn.Identity):  # else the norm takes the division
            v = v / divisors.get(f"{name}.proj", 1.0)
        parts = q * attention.scale, k, v
        found[name] = cast(AttentionScales, tuple(float(rounding.scales(part.max())) for part in parts))
    return found


class Observer:
    """Statistics of the inputs of Linears, gathered from every forward pass within `watching`."""

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        # What takes no factor, as fc2 behind GELU, needs no histogram of each channel.
        tensors, self._model = model.state_dict(), model
        self._tallies = {name: _Tally(per_channel=layer_before(tensors, name) is not None) for name in names}
        self._attention: dict[str, Tensor] = {}
        self._normed: dict[tuple[str, str], Tensor] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the model within the block."""
        linears = {name: linear_of(self._model, name) for name in self._tallies}
        hooks = [linear.register_forward_pre_hook(partial(self._see_input, name)) for name, linear in linears.items()]
        for name in (name for name in linears if name.endswith("qkv")):
            hooks.append(linears[name].register_forward_hook(partial(self._see_qkv, name)))
            attention = name.removesuffix(".qkv")
            hooks += [
                self._model.get_submodule(f"{attention}.{norm}").register_forward_hook(
                    partial(self._see_normed, attention, norm)
                )
                for norm in _NORMS
            ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def stats(self) -> dict[str, ActivationStats]:
        """Of each Linear that was watched and ran.

        Raises:
            CheckFailed: NaN or infinity.
        """
        return {name: tally.stats(name) for name, tally in self._tallies.items() if tally.num_rows}

    def attention_absmax(self) -> dict[str, Array]:
        """The largest magnitudes of queries and keys, behind their norms where there are such, and of values, float64
        `(3 * D,)`, by the name of the attention, such as `blocks.0.attn`.
        """
        found = {}
        for name, absmax in self._attention.items():
            parts = zip((*_NORMS, "v"), absmax.chunk(3), strict=True)
            found[name] = torch.cat([self._normed.get((name, norm), part) for norm, part in parts])
        return {name: absmax.double().cpu().numpy() for name, absmax in found.items()}

    def see(self, name: str, values: Tensor) -> None:
        """Count one input of a Linear, `(..., D)`."""
        self._tallies[name].add(values.detach().float().flatten(0, -2))

    def _see_input(self, name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.see(name, inputs[0])

    def _see_qkv(self, name: str, _: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        attention, absmax = name.removesuffix(".qkv"), output.detach().flatten(0, -2).abs().amax(dim=0)
        self._attention[attention] = torch.maximum(absmax, self._attention.get(attention, absmax))

    def _see_normed(self, attention: str, norm: str, module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        if not isinstance(module, nn.Identity):
            absmax = output.detach().abs().amax(dim=(0, 2)).flatten()  # (B, H, T, d) -> (D,)
            self._normed[attention, norm] = torch.maximum(absmax, self._normed.get((attention, norm), absmax))


class _Tally:
    """Running statistics of one tensor."""

    def __init__(self, *, per_channel: bool) -> None:
        self._per_channel = per_channel
        self.num_rows = 0

    def add(self, values: Tensor) -> None:
        """Count float32 `(n, D)`."""
        found = (
            self._counts(values),
            values.abs().amax(dim=0),
            *(part.sum(dim=0, dtype=torch.float64) for part in (values, values.square())),
        )
        if self.num_rows == 0:
            self._counted, self._absmax, self._total, self._total_square = found
        else:
            self._counted += found[0]
            self._absmax = torch.maximum(self._absmax, found[1])
            self._total += found[2]
            self._total_square += found[3]
        self.num_rows += len(values)

    def stats(self, name: str) -> ActivationStats:
        """What was counted so far.

        Raises:
            CheckFailed: NaN or infinity; the message has the name.
        """
        counts, absmax, total, total_square = (
            value.cpu().numpy() for value in (self._counted, self._absmax.double(), self._total, self._total_square)
        )
        if not np.isfinite(total_square).all():
            raise CheckFailed(f"the input of {name} has NaN or infinite values on the calibration images")
        return ActivationStats(
            absmax=absmax,
            mean=total / self.num_rows,
            mean_square=total_square / self.num_rows,
            counts=counts.reshape(-1, _BINS),
            divisor=np.ones(len(absmax)),
        )

    def _counts(self, values: Tensor) -> Tensor:
        D = values.shape[1]
        bins = (
            values.view(torch.int32)
            .bitwise_and(0x7FFFFFFF)
            .bitwise_right_shift_(_SHIFT)
            .sub_(_FIRST)
            .clamp_(0, _BINS - 1)
        )
        if self._per_channel:
            bins += torch.arange(D, dtype=torch.int32, device=bins.device) * _BINS
        return torch.bincount(bins.flatten(), minlength=_BINS * (D if self._per_channel else 1))
