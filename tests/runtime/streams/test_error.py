"""The estimate of a stream's error: what it is where tokens walk at random, and when there is none."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mae_deploy.images.read import Array
from mae_deploy.runtime.streams.camera import Camera, Choice
from mae_deploy.runtime.streams.config import StreamConfig
from mae_deploy.runtime.streams.error import TokenError

N, D = 100, 64


def refreshed(in_turn: Array, by_difference: Array, difference: Array) -> Any:
    ids = np.concatenate([in_turn, by_difference])
    return SimpleNamespace(ids=ids, in_turn=in_turn, by_difference=by_difference, difference=difference)


def begun(rng: np.random.Generator, tokens: Array) -> TokenError:
    """After many frames whose tokens are 1 from their mean in every direction, or the other way."""
    error = TokenError()
    for _ in range(600):
        error.follow(tokens + rng.choice([-1.0, 1.0], tokens.shape))
    return error


def test_tokens_that_walk_with_their_age_and_difference_are_as_far_as_they_are() -> None:
    """Every token walks 0.01 in energy a frame and dimension, and its pixels 2 grey levels a frame."""
    rng = np.random.default_rng(0)
    error = begun(rng, rng.normal(size=(N, D)))
    age = rng.integers(1, 9, N)
    found = []
    for _ in range(30):
        moved = rng.normal(size=(N, D)) * np.sqrt(0.01 * age)[:, None]
        in_turn, by_difference = np.split(rng.permutation(N)[:20], 2)
        update = refreshed(in_turn, by_difference, 2.0 * age)
        snr = error.snr(moved, update, age)
        assert snr is not None
        left = np.setdiff1d(np.arange(N), update.ids)
        found.append((snr, 10 * np.log10(N * D / np.square(moved[left]).sum())))
    snr, true = found[-1]
    assert snr == pytest.approx(true, abs=0.5)  # of 10 patches each time


def test_it_is_lower_where_more_has_moved_and_nothing_moved_is_no_error() -> None:
    rng = np.random.default_rng(1)
    error, age = begun(rng, rng.normal(size=(N, D))), np.full(N, 3)
    update = refreshed(np.arange(5), np.arange(5, 10), np.ones(N))
    assert error.snr(np.zeros((N, D)), update, age) == 99.0
    moved = rng.normal(size=(N, D))
    little, much = (error.snr(by * moved, update, age) for by in (0.1, 0.3))
    assert little is not None
    assert much is not None
    assert much < little < 99


def test_without_a_sample_or_tokens_there_is_none() -> None:
    update = refreshed(np.arange(5), np.arange(5, 10), np.ones(N))
    age, moved = np.full(N, 3), np.ones((N, D))
    assert TokenError().snr(moved, update, age) is None
    bare = TokenError()
    for _ in range(3):
        bare.follow(np.zeros((N, D), np.float32))  # of a graph that gives no tokens
    assert bare.snr(moved, update, age) is None
    error = begun(np.random.default_rng(0), np.zeros((N, D)))
    assert error.snr(moved, refreshed(np.arange(0), np.arange(5), np.ones(N)), age) is None


def test_a_stream_refreshes_less_where_it_is_near_and_all_where_it_is_not() -> None:
    rng = np.random.default_rng(2)
    side, P = 10, 2
    config = StreamConfig(refresh=0.4)

    def patches(scale: float) -> list[int]:
        """How many are computed at each frame of a still whose tokens move by so much when they are computed."""
        camera = Camera(config, (side, side), P, bypass=0.9, step=1, prefix=1)
        counts = []
        for _ in range(60):
            pixels = rng.integers(100, 104, (side * P, side * P, 3), np.uint8)
            choice: Choice = camera.choose(None, pixels, pixels.shape[:2], None, None)
            moved = np.zeros((N, D))
            moved[choice.ids] = scale * rng.normal(size=(len(choice.ids), D))
            camera.learn(choice, moved)
            camera.error.follow(rng.choice([-1.0, 1.0], (N, D)))
            camera.settle(choice)
            counts.append(len(choice.ids))
        return counts[1:]

    assert patches(1.0)[-1] == 40
    assert patches(0.01)[-1] == 8  # a fifth of them, and none below
