"""The background subtractor, on frames whose foreground is known."""

from __future__ import annotations

import numpy as np

from mae_deploy.commands.stream_eval.foreground import foreground
from mae_deploy.images.read import Array

P, ROWS, COLUMNS = 4, 3, 5


def still(frames: int) -> Array:
    rng = np.random.default_rng(0)
    scene = rng.integers(60, 190, (ROWS * P, COLUMNS * P))
    noise = rng.integers(-2, 3, (frames, *scene.shape))
    return (scene + noise).astype(np.uint8)


def test_nothing_moves() -> None:
    assert not foreground(still(20), P).any()


def test_what_moves_is_found_where_it_is_and_leaves_no_ghost() -> None:
    frames = still(30)
    where = np.zeros((30, ROWS, COLUMNS), bool)
    for index, column in enumerate(np.repeat(np.arange(COLUMNS), 6)):
        frames[index, P : 2 * P, column * P : (column + 1) * P] += 60
        where[index, 1, column] = True
    np.testing.assert_array_equal(foreground(frames, P), where.reshape(30, -1))


def test_slow_light_is_background() -> None:
    frames = still(60).astype(int) + np.arange(60)[:, None, None]
    assert not foreground(frames.clip(0, 255).astype(np.uint8), P).any()
