"""How many patches a camera's frames take: the share asked for on average, in sizes that the engine likes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from mae_deploy.errors import ConfigError
from mae_deploy.images.read import Array
from mae_deploy.runtime.selection import Selection
from mae_deploy.runtime.selection.base import Scene, Selector
from mae_deploy.runtime.streams.camera import Camera, Choice
from mae_deploy.runtime.streams.config import StreamConfig

ROWS, COLUMNS, P = 10, 11, 2
N = ROWS * COLUMNS


class First(Selection):
    """The first so many patches."""

    def __init__(self, count: int) -> None:
        self.count = count

    def start(self) -> Selector:
        return lambda scene: (np.arange(scene.num_patches) < self.count).astype(np.float64)


def choices(wanted: int, refresh: float, step: int, frames: int = 30) -> Iterator[Choice]:
    """Those of a still camera after its first frame."""
    config = StreamConfig(select=First(wanted), refresh=refresh, target_snr=99)
    camera = Camera(config, (ROWS, COLUMNS), P, bypass=0.9, step=step, prefix=1)
    pixels = np.zeros((ROWS * P, COLUMNS * P, 3), np.uint8)
    for index in range(1 + frames):
        choice = camera.choose(None, pixels, pixels.shape[:2], None, None)
        camera.settle(choice)
        if index:
            yield choice


@pytest.mark.parametrize("wanted", [0, 1, 10, 11, 12, 16])
@pytest.mark.parametrize("step", [1, 6])
def test_the_refresh_is_its_share_on_average_and_sizes_are_full(wanted: int, step: int) -> None:
    seen = list(choices(wanted, 0.05, step))
    assert {(1 + len(choice.ids)) % step for choice in seen} <= ({0} if wanted else {0, 1 % step})
    refreshed = sum(len(choice.ids) - wanted for choice in seen)
    assert refreshed == pytest.approx(len(seen) * 0.05 * N, abs=step if wanted else 2 * step)
    assert all(len(set(choice.ids)) == len(choice.ids) for choice in seen)


def test_where_nothing_changes_a_few_patches_wait_for_more() -> None:
    """5.5 a frame are owed: 11 and CLS are two full rows of six."""
    assert [len(choice.ids) for choice in choices(0, 0.05, 6, frames=6)] == [0, 11, 0, 11, 0, 11]


def test_none_grows_old_beside_what_is_always_wanted() -> None:
    seen: set[int] = set()
    for choice in choices(11, 0.05, 6, frames=60):
        seen |= set(choice.ids.tolist())
    assert seen == set(range(N))


def test_without_a_refresh_there_is_only_what_fills_a_size() -> None:
    assert {len(choice.ids) for choice in choices(0, 0.0, 6)} == {0}
    assert {len(choice.ids) for choice in choices(12, 0.0, 6)} == {17}


def test_a_difference_is_that_to_what_was_computed() -> None:
    pixels: Array = np.zeros((ROWS * P, COLUMNS * P, 3), np.uint8)
    assert Scene(pixels=pixels, patch_size=P).difference is None
    changed = pixels.copy()
    changed[:P, P : 2 * P, 0] = 9
    found = Scene(pixels=changed, patch_size=P, computed=pixels).difference
    assert found is not None
    np.testing.assert_allclose(found, np.eye(1, N, 1)[0] * 3)


@pytest.mark.parametrize("scores", [np.ones(N + 1), np.ones((ROWS, COLUMNS)), np.array(1.0), ["x"] * N, [None] * N])
def test_a_rule_that_gives_something_else_is_named(scores: Array) -> None:
    class Wrong(Selection):
        def start(self) -> Selector:
            return lambda scene: scores

    camera = Camera(StreamConfig(select=Wrong()), (ROWS, COLUMNS), P, bypass=0.9, step=1, prefix=1)
    with pytest.raises(ConfigError, match="the rule gives"):
        camera.choose(None, np.zeros((ROWS * P, COLUMNS * P, 3), np.uint8), (ROWS * P, COLUMNS * P), None, None)
