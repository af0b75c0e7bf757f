"""What `--device` and `--precision` mean to torch: the one rule for each, of every command that computes with it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any, Literal

import torch

from mae_deploy.errors import MissingDependency
from mae_deploy.machine import default_threads
from mae_deploy.progress import notice
from mae_deploy.runtime.cuda.driver import gpus
from mae_deploy.runtime.timing import measure
from mae_deploy.training.config import Device, TrainingPrecision

ResolvedPrecision = Literal["fp32", "bf16", "fp16"]

CPU = torch.device("cpu")

_GEMM = 768
"""Side of the matrices that FP32 and BF16 are compared on."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(device: Device) -> torch.device:
    """Where to compute: auto is CUDA where a device computes, else the CPU, on which torch then uses no more threads
    than the machine grants (OMP_NUM_THREADS says otherwise). Why a GPU that is there is not used is said once.

    Raises:
        MissingDependency: cuda was asked for, and there is no CUDA device that computes.
    """
    if device != "cpu":
        problem = reason_against_cuda()
        if problem is None:
            return torch.device("cuda")
        if device == "cuda":
            raise MissingDependency(f"--device cuda, but {problem}", hint="use --device auto or cpu")
        if gpus():
            _say_cpu(problem)
    threads = default_threads()
    if threads is not None and threads < torch.get_num_threads() and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads)
    return torch.device("cpu")


def reason_against_cuda() -> str | None:
    """Why torch does not compute on a GPU here; None where it does."""
    with warnings.catch_warnings(record=True) as said:  # such as that the driver is too old
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return _trial()
    why = "".join(f" ({' '.join(str(warning.message).split())})" for warning in said[:1])
    return f"torch sees no CUDA device{why}"


@cache
def _trial() -> str | None:
    """Why a product on the GPU fails, as where torch has no kernels for one so old; None where it does not."""
    try:
        x = torch.ones(8, 8, device="cuda")
        (x @ x).sum().item()
    except RuntimeError as error:
        return f"torch {torch.__version__} cannot compute on the GPU: {' '.join(str(error).split())}"
    return None


@cache
def _say_cpu(why: str) -> None:
    notice("CPU:", f"--device auto computes on it: {why}")


def resolve_precision(
    precision: TrainingPrecision, device: torch.device, *, frozen: bool = False, option: str = "--precision"
) -> ResolvedPrecision:
    """The arithmetic: auto is bf16 where the device multiplies in it, else fp32; on a CPU only for a frozen network,
    so that training on a CPU does not depend on which it is. Where bf16 is asked for and would be emulated, one line
    says how much slower it is.

    Raises:
        MissingDependency: fp16 on a CPU.
    """
    on_cpu = device.type == "cpu"
    if precision == "fp16" and on_cpu:
        raise MissingDependency(f"{option} fp16 needs a CUDA device", hint=f"use {option} bf16 or fp32")
    if precision == "bf16" and not multiplies_bf16(device):
        _say_emulated(option, device.type)
    if precision != "auto":
        return precision
    return "bf16" if multiplies_bf16(device) and (frozen or not on_cpu) else "fp32"


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for products in BF16."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def bf16_gain(device: torch.device) -> float:
    """FP32's time over BF16's for a product of square matrices."""
    x = torch.randn(_GEMM, _GEMM, device=device)
    y = x.bfloat16()

    def product(z: torch.Tensor) -> None:
        torch.nn.functional.linear(z, z)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    timings = measure({z.dtype: partial(product, z) for z in (x, y)}, repeats=5, warmup=1)
    return min(timings[x.dtype].seconds) / min(timings[y.dtype].seconds)


@cache
def _say_emulated(option: str, kind: str) -> None:
    if os.environ.get("RANK", "0") == "0":  # of several processes the first speaks
        slower = 1 / bf16_gain(torch.device(kind))
        notice(
            "bf16:",
            f"{option} bf16 is emulated: this {'CPU' if kind == 'cpu' else 'GPU'} has no products in BF16, which take"
            f" {slower:.1f} times as long as in FP32; {option} fp32 is faster",
        )


def compute_deterministically(wanted: bool) -> None:
    """From now on let torch take only kernels that give the same bits each time, or any again.

    cuBLAS adds up in one order only within a workspace of a fixed size, which it reads from the environment when it is
    first used: before any product on a GPU.
    """
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted)
    torch.backends.cudnn.deterministic = wanted
    if wanted:
        torch.backends.cudnn.benchmark = False


def autocast(precision: TrainingPrecision, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """What to enter for arithmetic in this precision.

    Raises:
        MissingDependency: fp16 on a CPU.
    """
    resolved = resolve_precision(precision, device)
    return nullcontext if resolved == "fp32" else lambda: torch.autocast(device.type, DTYPES[resolved])
