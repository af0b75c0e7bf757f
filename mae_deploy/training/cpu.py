"""What a training run sets up on a CPU: memory that is kept, and a word on BF16."""

from __future__ import annotations

from functools import cache

from mae_deploy.machine import set_malloc
from mae_deploy.progress import notice
from mae_deploy.training.device import CPU, bf16_gain, multiplies_bf16


@cache
def keep_freed_memory() -> None:
    """Let the C library keep what a step frees for the next one.

    glibc gives buffers of more than 32 MB, and the top of its heap, back to the system; a step of ViT-B on 32 images
    then takes 0.3 to 1.2 million page faults, a tenth of its time.
    """
    set_malloc(keeps=2**31 - 1)


@cache
def advise_bf16() -> None:
    """Say once how much faster this CPU multiplies BF16, if it has instructions for it."""
    if multiplies_bf16(CPU):
        notice(
            "bf16:",
            f"this CPU multiplies BF16 matrices {bf16_gain(CPU):.1f} times as fast as FP32: --precision bf16 uses that",
        )
