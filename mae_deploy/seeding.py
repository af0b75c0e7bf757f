"""Random numbers as a function of what they are for, so that a resumed run draws the same ones with no state to save."""

from __future__ import annotations

import random
import zlib

import numpy as np

from mae_deploy.errors import ConfigError


def derive_seed(seed: int, purpose: str, *counters: int) -> int:
    """A 63-bit seed for one purpose and one place in a run: the same arguments always give the same seed.

    Raises:
        ConfigError: the seed is negative.
    """
    if seed < 0:
        raise ConfigError(f"--seed {seed} must be at least 0")
    entropy = np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), *counters])
    return int(entropy.generate_state(1, np.uint64)[0] >> np.uint64(1))


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (every device that is in use) in this process."""
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    # Not torch.manual_seed: while CUDA is not initialised, it formats a stack trace on each call.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
