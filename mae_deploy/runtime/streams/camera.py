"""What is remembered of one camera beside keys and values, and what is decided of its next frame.

N patches of side P in rows and columns; K of them are computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mae_deploy.errors import ConfigError
from mae_deploy.images.read import Array
from mae_deploy.runtime.selection.base import Scene, largest
from mae_deploy.runtime.streams.config import StreamConfig
from mae_deploy.runtime.streams.error import NO_ERROR, TokenError
from mae_deploy.runtime.streams.shift import SHARE, common

FIRST, WIDE, CUT, RESIZED = "first frame", "much changed", "scene cut", "frame size changed"
"""Why a frame was computed whole."""

_LEAST, _FIRST = 0.025, 0.5
"""The least need, and that at first; 1 is all of the refresh."""
_SAMPLE = 0.1
"""The least part of the refresh that is done, since it is what the error is told from: where less is needed, rules are
eased instead."""
_RISE, _FALL = 1.0, 0.5
"""How fast the need follows what is missing, and what is to spare, in decibels: what is missing is worth most at the
first frame that says so."""
_TURN, _TURN_SHARE = 3, 0.25
"""How many of the refreshed patches are the oldest: at least so many, and this share. The others are those of which the
largest error is expected."""
_TIGHTEST = 3
"""How many times a stream doubles its refresh after audits that it failed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What is to be computed of a frame."""

    frame: Any
    """As `Preprocess.converted` gives it."""
    pixels: Array
    """`(H, W, C)`, roughly as the model sees it."""
    grey: Array
    """`(H, W)`: of `pixels`."""
    ids: Array
    """`(K,)`: the patches; all N where the frame is computed whole."""
    in_turn: Array
    """`(R,)`: those of `ids` that nothing but their age called for: a fair sample of those that did not change."""
    difference: Array
    """`(N,)`: of the pixels to those that were last computed; 0 for the first frame."""
    reason: str | None = None
    """Why the frame is computed whole; None where it is not, or where a rule took all patches."""


class Camera:
    """One camera's pixels, ages and rules."""

    def __init__(
        self, config: StreamConfig, grid: tuple[int, int], patch_size: int, *, bypass: float, step: int, prefix: int
    ) -> None:
        """Begin a camera that has seen nothing.

        Args:
            bypass: the share of the patches above which a frame is computed whole.
            step: K patches and what stands before them are a multiple of it, as engines want it; see `crossover.step`.
            prefix: tokens before the patches, CLS and registers.
        """
        self._config = config
        self._grid = grid
        self._patch_size = patch_size
        self._bypass = bypass
        self._step, self._prefix = step, prefix
        self.tightness = 0
        """How often the refresh is doubled."""
        self.begin()

    @property
    def num_patches(self) -> int:
        """N."""
        return self._grid[0] * self._grid[1]

    def begin(self) -> None:
        """Forget everything."""
        self._select = self._config.select.start()
        self.index = 0
        self._frame_size: tuple[int, int] | None = None
        self._computed: tuple[Array, Array] | None = None
        """Pixels and their grey, each patch as it was when it was last computed."""
        self._owed, self._need = 0.0, _FIRST if self._config.target_snr < NO_ERROR else 1.0
        self.error = TokenError()
        self._expected: float | None = None
        self.age: Array | None = None

    def choose(
        self,
        frame: Any,
        pixels: Array,
        frame_size: tuple[int, int],
        tokens: Array | None,
        patches: Callable[[Array], Array | None] | None,
    ) -> Choice:
        """What to compute of a frame whose pixels `(H, W, C)` are roughly what the model sees of it."""
        resized = self._frame_size is not None and frame_size != self._frame_size
        if resized:
            self.begin()
        self._frame_size = frame_size
        scene = Scene(
            pixels=pixels,
            patch_size=self._patch_size,
            index=self.index,
            computed=None if self._computed is None else self._computed[0],
            computed_grey=None if self._computed is None else self._computed[1],
            age=self.age,
            tokens=tokens,
            frame_size=frame_size,
            patches=patches,
            ease=max(1.0, _SAMPLE / self._need),
        )
        scores = np.asarray(self._select(scene))
        if scores.shape != (self.num_patches,) or scores.dtype.kind not in "biuf":
            raise ConfigError(
                f"the rule gives {scores.dtype} {scores.shape}", hint=f"a number for each of {self.num_patches} patches"
            )
        difference = scene.difference
        if difference is None:
            return self._whole(frame, scene, RESIZED if resized else FIRST)
        if np.mean(difference > self._config.cut_difference) > self._config.cut:
            return self._whole(frame, scene, CUT)
        wanted = np.flatnonzero(scores)
        if len(wanted) == self.num_patches:
            return self._whole(frame, scene, None)
        most, turn = self._refreshed(wanted, difference)
        ids = np.sort(np.concatenate([wanted, most, turn]))
        if len(ids) > self._bypass * self.num_patches:
            return self._whole(frame, scene, WIDE)
        return Choice(frame=frame, pixels=pixels, grey=scene.grey, ids=ids, in_turn=turn, difference=difference)

    def filled(self, choice: Choice, most: int) -> Choice:
        """The choice with so many patches, by the oldest of those that are left."""
        turn = self._oldest(choice.ids, most - len(choice.ids))
        ids = np.sort(np.concatenate([choice.ids, turn]))
        return replace(choice, ids=ids, in_turn=np.concatenate([choice.in_turn, turn]))

    def learn(self, choice: Choice, moved: Array) -> None:
        """Compute more or less from now on, by how far an update has moved the tokens `(K, D)` that it computed."""
        self._expected = None
        if self.age is None or len(choice.ids) == self.num_patches:
            return
        turned = np.searchsorted(choice.ids, choice.in_turn)
        if (alike := common(moved[turned])) is not None:
            moved[turned] -= SHARE * alike  # which the shift makes good
        self.error.learn(
            np.einsum("ki,ki->k", moved, moved), choice.difference[choice.ids], self.age[choice.ids], turned
        )
        expected = self.error.expected(choice.difference, self.age)
        if expected is not None:
            expected[choice.ids] = 0
            self._expected = float(expected.sum())
            missing = (self._config.target_snr - self.error.snr(self._expected)) / 10
            rate = _RISE if missing > 0 else _FALL
            self._need = float(np.clip(self._need * 10 ** (rate * missing), _LEAST, 1))

    def audited(self, true: float) -> None:
        """What an audit of the frame has found: the energy of the tokens' error."""
        if self._expected is not None:
            self.error.correct(true, self._expected)

    def settle(self, choice: Choice) -> None:
        """Remember what was computed."""
        if self._computed is None or len(choice.ids) == self.num_patches:
            self._computed = choice.pixels.copy(), choice.grey.copy()
        else:
            P, (rows, columns) = self._patch_size, self._grid
            row, column = np.divmod(choice.ids, columns)
            for computed, seen in zip(self._computed, (choice.pixels, choice.grey), strict=True):
                shape = (rows, P, columns, P, *seen.shape[2:])
                computed.reshape(shape)[row, :, column] = seen.reshape(shape)[row, :, column]
        self.age = np.ones(self.num_patches, np.int64) if self.age is None else self.age + 1
        self.age[choice.ids] = 1
        self.index += 1

    def settle_again(self, choice: Choice) -> None:
        """Remember that the same frame was computed whole as well."""
        self._computed = choice.pixels.copy(), choice.grey.copy()
        self.age = np.ones(self.num_patches, np.int64)

    def tighten(self) -> None:
        """Refresh twice as much, after an audit that failed."""
        self.tightness, self._need = min(self.tightness + 1, _TIGHTEST), 1.0

    def relax(self) -> None:
        """Back by one such step, after an audit that passed."""
        self.tightness = max(self.tightness - 1, 0)

    def _whole(self, frame: Any, scene: Scene, reason: str | None) -> Choice:
        everything = np.arange(self.num_patches)
        nothing, same = everything[:0], np.zeros(self.num_patches)
        return Choice(
            frame=frame,
            pixels=scene.pixels,
            grey=scene.grey,
            ids=everything,
            in_turn=nothing,
            difference=same,
            reason=reason,
        )

    def _refreshed(self, wanted: Array, difference: Array) -> tuple[Array, Array]:
        """The patches that no rule wants and that are computed all the same: those of which the largest error is
        expected, by their difference `(N,)` and age, and the oldest of the others.
        """
        assert self.age is not None
        count = self._refresh(len(wanted))
        turn = min(count - count // 2, max(_TURN, round(_TURN_SHARE * count)))
        expected = self.error.expected(difference, self.age)
        left = difference.copy() if expected is None else expected
        left[wanted] = 0
        most = np.flatnonzero(largest(left, count - turn))
        return most, self._oldest(np.concatenate([wanted, most]), count - len(most))

    def _refresh(self, wanted: int) -> int:
        """How many patches to refresh beside so many that are wanted.

        As many as make, with them and the prefix, the nearest multiple of `step`; what that is more or less than the
        share asked for is made good at the next frames. Where nothing is wanted, they wait until there are enough for
        two `step`s: a graph takes its time however few they are.
        """
        N = self.num_patches
        self._owed += min(1.0, self._config.refresh * 2**self.tightness) * max(self._need, _SAMPLE) * N
        if not wanted and self._owed < max(1, 2 * self._step - self._prefix):
            return 0
        least = self._prefix + wanted
        tokens = max(round((least + self._owed) / self._step), -(-least // self._step)) * self._step
        count = min(N, tokens - self._prefix) - wanted
        self._owed = min(self._owed - count, N - wanted - count)
        return count

    def _oldest(self, but: Array, count: int) -> Array:
        """So many of the patches that are not among `but`, ascending."""
        assert self.age is not None
        age = self.age.astype(np.float64)
        age[but] = 0
        return np.flatnonzero(largest(age, count))
