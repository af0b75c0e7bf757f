"""How far a stream's tokens are from those of whole frames: what an audit measures, and what can be told without one.

Shapes: N patches, K of them computed, D width.
"""

from __future__ import annotations

import numpy as np

from mae_deploy.images.read import Array
from mae_deploy.runtime.streams.shift import energy

NO_ERROR = 99.0
"""Decibels: the most that is told."""
_MEMORY, _SIGNAL = 0.98, 0.95
"""Weight of the past in the mean of a camera's tokens in time, and in the energy of their deviation from it."""
_QUIET = 0.01
"""Where tokens hardly change in time, the signal is this share of their variance over the frame."""
_BINS, _FIRST_BIN = 20, 0.125
"""Half octaves of the difference in grey levels, and the least."""
_RECENT = 0.95
"""Weight of the past of a bin against each patch that was computed since."""
_WALK = 0.25
"""Power of the age with which an error grows: 1 where tokens walk at random, 0 where their pixels tell all."""
_SURPRISE = 1.5
"""How many times what was expected patches in turn must have moved, together, for all to be expected to move more:
their number is small."""
_LEAST = 1e-30
_CORRECTION = 4.0
"""By how many times audits correct what is expected, at most."""


class TokenError:
    """One camera's signal, and the error to expect of tokens that are not computed.

    Every patch that is computed shows how far its token was from the true one. That is written down by the difference
    of its pixels, in half octaves, over a power of its age. So each camera learns from which difference on pixels
    matter: on one, leaves move by six grey levels and mean nothing, on another three are a person's shoulder. An object
    that changes the context of all is seen first in patches that were computed in turn. What is expected is right to 1
    to 2 dB on the median frame of six halves of clips, and too near by 6 dB on the two where nothing moves.
    """

    def __init__(self) -> None:
        self.mean: Array | None = None
        """`(N, D)`: of the tokens in time; None before the first."""
        self._signal = 0.0
        self._seen, self._energy = np.zeros(_BINS), np.zeros(_BINS)
        self._correction = 1.0

    def follow(self, tokens: Array) -> None:
        """A frame's tokens `(N, D)`, whoever computed them."""
        if self.mean is None:
            self.mean = tokens.copy()
            return
        self.mean += (1 - _MEMORY) * (tokens - self.mean)
        now = signal(tokens, self.mean)
        self._signal += (1 - _SIGNAL) * (now - self._signal) if self._signal else now

    def learn(self, moved: Array, difference: Array, age: Array, in_turn: Array) -> None:
        """What the patches that were computed show.

        Args:
            moved: `(K,)`, the energy of what the update has changed of each token.
            difference: `(K,)`, mean absolute grey difference of the pixels to those that were computed before.
            age: `(K,)`, how many frames before.
            in_turn: which of these K were computed for their age alone, indices `(R,)`.
        """
        if (expected := self._of(difference[in_turn], age[in_turn])) is not None and expected.any():
            self._energy *= max(1.0, float(moved[in_turn].sum() / expected.sum()) / _SURPRISE)
        bins = np.round(_bin(difference)).astype(np.int64)
        count = np.bincount(bins, minlength=_BINS)
        kept = _RECENT**count
        self._seen = kept * self._seen + count
        self._energy = kept * self._energy + np.bincount(bins, moved / age**_WALK, minlength=_BINS)

    def expected(self, difference: Array, age: Array) -> Array | None:
        """`(N,)`: the energy of each token's error where it is not computed; None while that cannot be told."""
        found = self._of(difference, age) if self._signal else None
        return None if found is None else self._correction * found

    def snr(self, error: float) -> float:
        """The signal-to-noise ratio of a frame's tokens whose error has this energy, in dB."""
        return decibels(self._signal, error)

    def correct(self, true: float, expected: float) -> None:
        """Half of what an audit has found, in decibels: the energy of the error, and that which was expected."""
        if true > 0 and expected > 0:
            found = self._correction * (true / expected) ** 0.5
            self._correction = min(max(found, 1 / _CORRECTION), _CORRECTION)

    def _of(self, difference: Array, age: Array) -> Array | None:
        known = np.flatnonzero(self._seen)
        if not len(known):
            return None
        means = np.log(np.maximum(self._energy[known] / self._seen[known], _LEAST))
        # Pixels that differ more are expected to be no nearer.
        found: Array = np.exp(np.interp(_bin(difference), known, np.maximum.accumulate(means))) * age**_WALK
        return found


def temporal_snr(true: Array, found: Array, mean: Array) -> float:
    """Energy of tokens' `(N, D)` deviation from their mean in time over that of the error, in dB."""
    return decibels(signal(true, mean), energy(true - found))


def signal(tokens: Array, mean: Array) -> float:
    """The energy of tokens' `(N, D)` deviation from their mean in time. Where the scene is at rest, and hardly anything
    deviates, a hundredth of their variance over the frame stands for it.
    """
    return max(energy(tokens - mean), _QUIET * energy(tokens - tokens.mean(axis=0)))


def decibels(signal: float, error: float) -> float:
    """Their ratio, at most `NO_ERROR`."""
    return NO_ERROR if error == 0 or signal == 0 else min(NO_ERROR, 10 * float(np.log10(signal / error)))


def _bin(difference: Array) -> Array:
    found: Array = np.clip(2 * np.log2(np.maximum(difference, _FIRST_BIN) / _FIRST_BIN), 0, _BINS - 1)
    return found
