"""What a training run sets up on a CPU: memory that is kept, and a word on BF16."""

from __future__ import annotations

import ctypes
import platform
from functools import cache, partial

import torch

from mae_deploy.progress import notice
from mae_deploy.runtime.timing import measure
from mae_deploy.training.device import cpu_multiplies_bf16

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""mallopt's numbers, from glibc's malloc.h."""

_GEMM = 768
"""Side of the matrices that FP32 and BF16 are compared on."""


@cache
def keep_freed_memory() -> None:
    """Let the C library keep what a step frees for the next one.

    glibc gives buffers of more than 32 MB, and the top of its heap, back to the system; a step of ViT-B on 32 images
    then takes 0.3 to 1.2 million page faults, a tenth of its time. Other C libraries are left as they are.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(_MMAP_THRESHOLD, 2**30)


@cache
def advise_bf16() -> None:
    """Say once how much faster this CPU multiplies BF16, if it has instructions for it."""
    if cpu_multiplies_bf16():
        notice(
            "bf16:",
            f"this CPU multiplies BF16 matrices {bf16_gain():.1f} times as fast as FP32: --precision bf16 uses that",
        )


def bf16_gain() -> float:
    """FP32's time over BF16's for a product of square matrices."""
    x = torch.randn(_GEMM, _GEMM)
    y = x.bfloat16()
    timings = measure({z.dtype: partial(torch.nn.functional.linear, z, z) for z in (x, y)}, repeats=5, warmup=1)
    return min(timings[x.dtype].seconds) / min(timings[y.dtype].seconds)
