"""What `--device` and `--precision` mean to torch: the one rule for each, of every command that computes with it."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch

from mae_deploy.errors import MissingDependency
from mae_deploy.machine import default_threads
from mae_deploy.training.config import Device, TrainingPrecision

ResolvedPrecision = Literal["fp32", "bf16", "fp16"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(device: Device) -> torch.device:
    """Where to compute: auto is CUDA where there is a device, else the CPU, on which torch then uses no more threads
    than the machine grants (OMP_NUM_THREADS says otherwise).

    Raises:
        MissingDependency: cuda was asked for, and there is no CUDA device.
    """
    if device != "cpu" and torch.cuda.is_available():
        return torch.device("cuda")
    if device == "cuda":
        raise MissingDependency("--device cuda, but torch sees no CUDA device", hint="use --device auto or cpu")
    threads = default_threads()
    if threads is not None and threads < torch.get_num_threads() and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads)
    return torch.device("cpu")


def resolve_precision(
    precision: TrainingPrecision, device: torch.device, *, frozen: bool = False, option: str = "--precision"
) -> ResolvedPrecision:
    """The arithmetic: auto is bf16 where the device multiplies in it, else fp32; on a CPU only for a frozen network,
    so that training on a CPU does not depend on which it is.

    Raises:
        MissingDependency: fp16 on a CPU.
    """
    on_cpu = device.type == "cpu"
    if precision == "fp16" and on_cpu:
        raise MissingDependency(f"{option} fp16 needs a CUDA device", hint=f"use {option} bf16 or fp32")
    if precision != "auto":
        return precision
    if on_cpu:
        return "bf16" if frozen and cpu_multiplies_bf16() else "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has instructions for products in BF16."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def autocast(precision: TrainingPrecision, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """What to enter for arithmetic in this precision.

    Raises:
        MissingDependency: fp16 on a CPU.
    """
    resolved = resolve_precision(precision, device)
    return nullcontext if resolved == "fp32" else lambda: torch.autocast(device.type, DTYPES[resolved])
