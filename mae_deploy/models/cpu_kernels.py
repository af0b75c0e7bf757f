"""Linear layers and attention in training on a CPU, each by the kernel that is the fastest there.

What PyTorch takes by default is not: MKL's matrix products run on AMD at half (Zen 5) to nine tenths (Zen 4) of
oneDNN's rate, and the fused attention's backward pass loses to attention written out for short sequences. Which is
faster depends on the CPU, the threads and the sizes, so it is measured when a size is first met. All are FP32
arithmetic; they differ in the order of summation. Shapes: M rows (images times tokens), K inputs, N outputs; B images,
H heads, T tokens, D head width.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mae_deploy.errors import MaeDeployError
from mae_deploy.files import read_json, write_json
from mae_deploy.machine import cache_folder, cpu_model

DEFAULT = "default"
"""PyTorch's own choice."""

_SMALLEST = 100e6
"""Floating-point operations; a smaller product takes about a millisecond, and nothing is to be gained."""

_MOST_ROWS = 2048
"""Rows that are measured where there are more: from here on a kernel's rate hardly changes."""

_MOST_IMAGES = 4
"""The same for attention."""

_MOST_TOKENS = 1024
"""Attention written out for more would need gigabytes."""

_ROUNDS = 5
_MARGIN = 0.97
"""Another kernel must take less than this share of the default's time."""

_TOLERANCE = 1e-5
"""Largest difference to the default, relative to its largest value. FP32 sums of 10,000 numbers stay below 2e-6; TF32
and BF16 do not pass."""


class Kernels:
    """What was found to be the fastest, by the kind and size of the product.

    A choice changes the last bits of a loss. So that a run and its continuation, or two runs on one machine, agree to
    the last bit, it is made once: `chosen` is plain data, kept with a run and given to its continuation, and what is
    not in it is looked up in the machine's file.
    """

    def __init__(self, chosen: dict[str, str] | None = None, *, file: Path | None = None) -> None:
        self.chosen = {} if chosen is None else chosen
        """Kernels by PyTorch, CPU, threads, kind and size. Grows as sizes are met."""
        self.file = file or machine_file()
        """Choices of earlier runs on this machine."""
        self.gains: dict[str, float] = {}
        """The default's time over the chosen kernel's, of what was measured here."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Kernels:
        return self  # a copied model goes on with the same choices

    def product(self, kind: str, M: int, K: int, N: int) -> str:
        """The kernel for one of `PRODUCTS`."""
        if 2 * M * K * N < _SMALLEST or not torch.backends.mkldnn.is_available():
            return DEFAULT
        M = min(M, _MOST_ROWS)
        key = f"{_machine()}/{torch.get_num_threads()} threads/{kind}/{_power_of_two(M)}x{K}x{N}"
        return self.chosen.get(key) or self._choose(key, PRODUCTS[kind], lambda: _operands(kind, M, K, N))

    def fused_attention(self, B: int, H: int, T: int, D: int, *, unmeasured: bool) -> bool:
        """Whether the fused kernel is faster than attention written out, forward and backward pass together;
        `unmeasured` where it is not measured.
        """
        if 4 * B * H * T * T * D < _SMALLEST or T > _MOST_TOKENS:
            return unmeasured
        B = min(B, _MOST_IMAGES)
        key = f"{_machine()}/{torch.get_num_threads()} threads/attention/{B}x{H}x{T}x{D}"
        return (
            self.chosen.get(key) or self._choose(key, ATTENTION, lambda: torch.randn(3, B, H, T, D).unbind())
        ) == "fused"

    def summary(self) -> str | None:
        """One line on what was measured since the last time, if anything was."""
        gains, self.gains = list(self.gains.values()), {}
        faster = [gain for gain in gains if gain > 1]
        if not gains:
            return None
        if not faster:
            return "PyTorch's own are the fastest here"
        mean = math.exp(sum(map(math.log, faster)) / len(faster))
        return (
            f"{len(faster)} of {len(gains)} sizes have one that is faster than PyTorch's own, {mean:.2f} times in the"
            " mean; kept with the run"
        )

    def _choose(
        self, key: str, candidates: Mapping[str, Callable[..., Tensor]], operands: Callable[[], Sequence[Tensor]]
    ) -> str:
        name = _read(self.file).get(key, "")
        if name not in candidates:
            with torch.random.fork_rng(devices=[]), torch.enable_grad():
                seconds = measure(candidates, operands())
            default, fastest = next(iter(seconds)), min(seconds, key=seconds.__getitem__)
            name = agreed(key, fastest if seconds[fastest] < _MARGIN * seconds[default] else default)
            name = name if name in seconds else default  # another machine's processes may have more
            self.gains[key] = seconds[default] / seconds[name]
            _remember(self.file, key, name)
        self.chosen[key] = name
        return name


def machine_file() -> Path:
    """Where choices are kept for other runs. Without the file, the next run measures again."""
    return cache_folder("kernels") / "chosen.json"


def _read(file: Path) -> dict[str, str]:
    try:
        found = read_json(file)
    except MaeDeployError:
        found = None  # none yet, or none that can be read: it is measured again
    return {key: name for key, name in found.items() if isinstance(name, str)} if isinstance(found, dict) else {}


def _remember(file: Path, key: str, name: str) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, _read(file) | {key: name})
    except OSError:
        pass  # a home that cannot be written: the run's own record is enough to go on with it


def measure(candidates: Mapping[str, Callable[..., Tensor]], operands: Sequence[Tensor]) -> dict[str, float]:
    """Shortest time of each, taken in turns after a call that is not timed; those that fail here, or compute something
    else, are left out.

    The first is what the others are compared with. The time is that of this thread on the CPU, where the system can
    tell it: it works as long as the others of its pool, and what else runs on the machine is not counted.
    """
    clock = time.thread_time if time.get_clock_info("thread_time").resolution < 1e-5 else time.perf_counter
    seconds: dict[str, float] = {}
    reference = torch.empty(0)
    for number, (name, kernel) in enumerate(candidates.items()):
        try:
            found = kernel(*operands)
        except (
            AttributeError,
            NotImplementedError,
            RuntimeError,
        ):  # the operators of oneDNN are PyTorch's own business, and may change
            continue
        if number == 0:
            reference = found
        if (found - reference).abs().max() <= _TOLERANCE * reference.abs().max():
            seconds[name] = math.inf
    for _ in range(_ROUNDS):
        for name in seconds:
            before = clock()
            candidates[name](*operands)
            seconds[name] = min(seconds[name], clock() - before)
    return seconds


def agreed(key: str, name: str) -> str:
    """The choice of whichever process on this run's store measured first, so that all processes compute the same."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return name
    store = torch.distributed.distributed_c10d._get_default_store()
    found: bytes = store.compare_set(f"mae-deploy/{key}", "", name)
    return found.decode()


# --- products --------------------------------------------------------------------------------------------------------


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x weightᵀ + bias`: `(M, K), (N, K) -> (M, N)`; either may be a transposed view."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]


def _onednn_packed(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same with the weight first copied to the layout that oneDNN reads fastest."""
    return _onednn(x, torch.ops.mkldnn._reorder_linear_weight(weight, len(x)), bias)


PRODUCTS: dict[str, dict[str, Callable[..., Tensor]]] = {
    "forward": {DEFAULT: F.linear, "onednn": _onednn, "onednn packed": _onednn_packed},
    "grad input": {
        DEFAULT: lambda grad, weight: grad.mm(weight),
        "onednn": lambda grad, weight: _onednn(grad, weight.t()),
        "onednn packed": lambda grad, weight: _onednn_packed(grad, weight.t()),
    },
    "grad weight": {
        DEFAULT: lambda grad, x: grad.t().mm(x),
        "onednn": lambda grad, x: _onednn(grad.t(), x.t()),
        "onednn packed": lambda grad, x: _onednn_packed(grad.t(), x.t()),
        "onednn transposed": lambda grad, x: _onednn(x.t(), grad.t()).t().contiguous(),
    },
}
"""The three products of a linear layer: `x (M, K), weight (N, K), bias (N,)`; `grad (M, N), weight (N, K)`;
`grad (M, N), x (M, K)`."""


class _Linear(torch.autograd.Function):
    """`F.linear` of a matrix, each of its three products by the kernel chosen for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, kernels: Kernels) -> Tensor:
        (M, K), N = x.shape, len(weight)
        ctx.save_for_backward(x, weight)
        ctx.kernels = kernels
        return PRODUCTS["forward"][kernels.product("forward", M, K, N)](x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        (M, K), N = x.shape, len(weight)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = PRODUCTS["grad input"][ctx.kernels.product("grad input", M, K, N)](grad, weight)
        if ctx.needs_input_grad[1]:
            grad_weight = PRODUCTS["grad weight"][ctx.kernels.product("grad weight", M, K, N)](grad, x)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0)
        return grad_x, grad_weight, grad_bias, None


class MeasuredLinear(nn.Linear):
    """A linear layer that computes by the kernels chosen for its sizes; elsewhere than on a CPU in FP32 it is
    `nn.Linear`.
    """

    kernels: Kernels

    def forward(self, input: Tensor) -> Tensor:
        """`(..., K) -> (..., N)`."""
        return self.product(input, self.weight)

    def product(self, input: Tensor, weight: Tensor) -> Tensor:
        """The same with another weight than its own, `(N, K)`."""
        if not self.measures(input):
            return F.linear(input, weight, self.bias)
        rows: Tensor = _Linear.apply(input.reshape(-1, input.shape[-1]), weight, self.bias, self.kernels)
        return rows.view(*input.shape[:-1], -1)

    def measures(self, x: Tensor) -> bool:
        """Whether what is computed from x is by measured kernels."""
        return (
            x.is_cpu
            and x.dtype == torch.float32
            and not torch.compiler.is_compiling()
            and not torch.is_autocast_enabled("cpu")
        )


def use_kernels(model: nn.Module, kernels: Kernels) -> None:
    """Let every plain linear layer of a model compute by measured kernels; parameters and names stay what they are."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = MeasuredLinear
        if isinstance(module, MeasuredLinear):
            module.kernels = kernels


# --- attention -------------------------------------------------------------------------------------------------------


def _explicit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    attention: Tensor = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return attention.softmax(dim=-1) @ v


def _with_backward(attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = attention(*leaves)
        out.backward(torch.ones_like(out))
        return out.detach()

    return both


ATTENTION: dict[str, Callable[..., Tensor]] = {
    "fused": _with_backward(F.scaled_dot_product_attention),
    "explicit": _with_backward(_explicit),
}
"""`q, k, v (B, H, T, D) -> (B, H, T, D)`, forward and backward pass."""


# --- what decides ----------------------------------------------------------------------------------------------------


def _operands(kind: str, M: int, K: int, N: int) -> tuple[Tensor, ...]:
    x, weight, bias, grad = torch.randn(M, K), torch.randn(N, K), torch.randn(N), torch.randn(M, N)
    return {"forward": (x, weight, bias), "grad input": (grad, weight), "grad weight": (grad, x)}[kind]


def _power_of_two(number: int) -> int:
    """The next one: sizes that differ little share a choice."""
    return int(1 << (number - 1).bit_length())


@cache
def _machine() -> str:
    return f"torch {torch.__version__}/{cpu_model()}"
