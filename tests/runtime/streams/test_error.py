"""What error a stream expects of its tokens, when it cannot tell, and what it does about it."""

from __future__ import annotations

import numpy as np
import pytest

from mae_deploy.images.read import Array
from mae_deploy.runtime.selection import Scene, Selection, Selector
from mae_deploy.runtime.streams.camera import Camera, Choice
from mae_deploy.runtime.streams.config import StreamConfig
from mae_deploy.runtime.streams.error import TokenError

N, D = 100, 64


def begun(tokens: Array) -> TokenError:
    """After many frames whose tokens are 1 from their mean in every direction, or the other way."""
    rng, error = np.random.default_rng(0), TokenError()
    for _ in range(600):
        error.follow(tokens + rng.choice([-1.0, 1.0], tokens.shape))
    return error


def expected(error: TokenError, difference: Array, age: Array) -> Array:
    found = error.expected(difference, age)
    assert found is not None
    return found


def test_patches_that_differ_little_and_much_are_each_as_far_as_their_like_were() -> None:
    """Up to 4 grey levels a token is 0.01 off in energy, above it is 5; ages are alike."""
    rng, error = np.random.default_rng(0), begun(np.zeros((N, D)))
    age = np.full(N, 3)
    for _ in range(30):
        difference = rng.choice([1.0, 2.0, 8.0, 20.0], 20)
        error.learn(np.where(difference < 4, 0.01, 5.0), difference, age[:20], np.arange(5))
    found = expected(error, np.repeat([0.0, 1.0, 2.0, 8.0, 20.0, 90.0], 2), age[:12])
    np.testing.assert_allclose(found, np.repeat([0.01, 0.01, 0.01, 5, 5, 5], 2), rtol=1e-6)
    assert 0.01 < expected(error, np.array([4.0]), age[:1])[0] < 5
    assert error.snr(20.0) == pytest.approx(10 * np.log10(N * D / 20), abs=0.5)  # the mean in time lags


def test_old_tokens_are_farther_and_larger_differences_no_nearer() -> None:
    error, one = begun(np.zeros((N, D))), np.ones(10)
    error.learn(3 * one, one, 4 * one, np.arange(5))
    error.learn(one, 5 * one, 4 * one, np.arange(5))
    young, old = expected(error, np.ones(2), np.array([1, 16]))
    assert old == pytest.approx(2 * young)  # a quarter of the way from 1 to 16
    assert expected(error, np.array([5.0]), np.array([4]))[0] == pytest.approx(3)


def test_patches_in_turn_that_all_moved_tell_at_once_of_all_the_others() -> None:
    error, age, difference = begun(np.zeros((N, D))), np.ones(10), np.repeat([1.0, 9.0], 5)
    for _ in range(40):
        error.learn(np.repeat([0.1, 2.0], 5), difference, age, np.arange(5))
    error.learn(np.repeat([3.0, 2.0], 5), difference, age, np.arange(5))  # thirty times as far as ever
    quiet, moving = expected(error, np.array([1.0, 9.0]), np.ones(2))
    assert quiet > 1.5
    assert moving > 20


def test_an_audit_corrects_half_of_what_it_finds_in_decibels_and_no_more_than_four_times() -> None:
    error, one = begun(np.zeros((N, D))), np.ones(4)
    error.learn(one, one, one, np.arange(0))
    error.correct(true=4.0, expected=1.0)
    assert expected(error, one, one)[0] == pytest.approx(2)
    error.correct(true=1e6, expected=1.0)
    assert expected(error, one, one)[0] == pytest.approx(4)
    error.correct(true=0.0, expected=1.0)  # nothing to learn from
    assert expected(error, one, one)[0] == pytest.approx(4)


def test_without_a_sample_or_tokens_there_is_none_and_nothing_moved_is_no_error() -> None:
    one = np.ones(4)
    assert begun(np.zeros((N, D))).expected(one, one) is None
    bare = TokenError()
    for _ in range(3):
        bare.follow(np.zeros((N, D), np.float32))  # of a graph that gives no tokens
    bare.learn(0 * one, one, one, np.arange(2))
    assert bare.expected(one, one) is None
    still = begun(np.zeros((N, D)))
    for _ in range(3):
        still.learn(0 * one, one, one, np.arange(2))
    assert still.snr(float(expected(still, one, one).sum())) == 99.0


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
            camera.learn(choice, scale * rng.normal(size=(len(choice.ids), D)))
            camera.error.follow(rng.choice([-1.0, 1.0], (N, D)))
            camera.settle(choice)
            counts.append(len(choice.ids))
        return counts[1:]

    assert patches(1.0)[-1] == 40
    assert patches(0.01)[-1] == 4  # a tenth of them, and none below


def test_rules_are_eased_where_tokens_are_nearer_than_they_need_be_and_not_otherwise() -> None:
    side, P = 10, 2

    def eased(scale: float, target_snr: float) -> list[float]:
        found = []

        class Recorded(Selection):
            def start(self) -> Selector:
                def select(scene: Scene) -> Array:
                    found.append(scene.ease)
                    return np.zeros(scene.num_patches)

                return select

        rng = np.random.default_rng(3)
        config = StreamConfig(select=Recorded(), target_snr=target_snr)
        camera = Camera(config, (side, side), P, bypass=0.9, step=1, prefix=1)
        for index in range(60):
            pixels = rng.integers(100, 104, (side * P, side * P, 3), np.uint8)
            choice = camera.choose(None, pixels, pixels.shape[:2], None, None)
            by = scale if index < 50 else 3.0
            camera.learn(choice, by * rng.normal(size=(len(choice.ids), D)))
            camera.error.follow(rng.choice([-1.0, 1.0], (N, D)))
            camera.settle(choice)
        return found

    near = eased(0.001, 13.0)
    assert near[0] == 1
    assert near[49] == 4
    assert near[53] == 1  # as soon as patches show that it is needed
    assert set(eased(1.0, 13.0)) == set(eased(0.001, 99.0)) == {1.0}
