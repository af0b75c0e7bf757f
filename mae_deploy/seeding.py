"""Random numbers as a function of what they are for, so that a resumed run draws the same ones with no state to
save.
"""

from __future__ import annotations

import random
import sys
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from mae_deploy.errors import ConfigError

_STRIDE = np.uint64(0x9E3779B97F4A7C15)
_MIXERS = ((np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)), (np.uint64(27), np.uint64(0x94D049BB133111EB)))
"""SplitMix64's constants (Steele, Lea and Flood, Fast splittable pseudorandom number generators, 2014)."""


def derive_seed(seed: int, purpose: str, *counters: int) -> int:
    """A 63-bit seed for one purpose and one place in a run: the same arguments always give the same seed.

    Raises:
        ConfigError: the seed is negative.
    """
    _check(seed)
    entropy = np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), *counters])
    return int(entropy.generate_state(1, np.uint64)[0] >> np.uint64(1))


def random_patches(
    num_patches: int, num_keep: int, items: Iterable[int], seed: int
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Random `ids_keep (B, K)`, int64: an image's patches depend on the seed and its number alone, and those for a
    smaller K are among those for a larger.

    Raises:
        ConfigError: the seed is negative.
    """
    _check(seed)
    return np.stack([np.random.default_rng((seed, item)).permutation(num_patches)[:num_keep] for item in items])


def uniform_rows(seed: int, purpose: str, count: int, *counters: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Uniform numbers in [0, 1), `(B, count)`: a row is a function of the seed, the purpose and its entry of each
    `(B,)` counter, on any machine.

    SplitMix64's hash of a counter, in place of a generator a row, which would take 20 times as long.
    """
    rows = np.full((len(counters[0]), 1), derive_seed(seed, purpose), dtype=np.uint64)
    for counter in counters:
        rows = _mix(rows + counter.astype(np.uint64)[:, None] * _STRIDE)
    bits = _mix(rows + np.arange(1, count + 1, dtype=np.uint64) * _STRIDE)
    bits >>= np.uint64(40)
    uniform: npt.NDArray[np.float32] = bits.astype(np.float32) * np.float32(2**-24)
    return uniform


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and, where it is loaded, torch (every device that is in use) in this process."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch = sys.modules.get("torch")  # not imported: the device side, which has no torch, draws its patches here too
    if torch is None:
        return
    # Not torch.manual_seed: while CUDA is not initialised, it formats a stack trace on each call.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


def _check(seed: int) -> None:
    if seed < 0:
        raise ConfigError(f"--seed {seed} must be at least 0")


def _mix(bits: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """SplitMix64's finaliser, in place: every bit of the input moves half of the output's."""
    for shift, factor in _MIXERS:
        bits ^= bits >> shift
        bits *= factor
    bits ^= bits >> np.uint64(31)
    return bits
