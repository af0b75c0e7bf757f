"""Rules for patches: what each takes, how they combine, and that two cameras do not share what they remember."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mae_deploy.errors import ConfigError
from mae_deploy.images.read import Array
from mae_deploy.runtime.selection import (
    Budget,
    Every,
    Grid,
    Motion,
    Oldest,
    Random,
    Region,
    Saliency,
    Scene,
    Selection,
)
from mae_deploy.runtime.selection.region import as_mask

P, ROWS, COLUMNS = 4, 3, 5
N = ROWS * COLUMNS


def scene(pixels: Array | None = None, **given: object) -> Scene:
    frame = np.full((ROWS * P, COLUMNS * P, 3), 100, np.uint8) if pixels is None else pixels
    return Scene(pixels=frame, patch_size=P, **given)  # type: ignore[arg-type]


def painted(*patches: int, value: int = 200) -> Array:
    """A grey frame with some patches of another value."""
    frame = np.full((ROWS * P, COLUMNS * P, 3), 100, np.uint8)
    for patch in patches:
        row, column = divmod(patch, COLUMNS)
        frame[row * P : (row + 1) * P, column * P : (column + 1) * P] = value
    return frame


def taken(scores: Array) -> list[int]:
    ids: list[int] = np.flatnonzero(scores).tolist()
    return ids


ALL = list(range(N))
SEEN = {"age": np.arange(1, N + 1), "tokens": np.eye(N), "computed": painted()}


@pytest.mark.parametrize(
    "rule",
    [Motion(), Region((0, 0, 1, 1)), Saliency(), Grid(), Random(), Oldest(), Every(3), Budget(of=Random(), at_most=2)],
    ids=lambda rule: type(rule).__name__,
)
def test_scores_are_finite_and_never_negative_and_a_camera_remembers_for_itself(rule: Selection) -> None:
    first, second = rule.start(), rule.start()
    for index in range(4):
        now = scene(painted(index), index=index, **SEEN)
        scores = first(now)
        assert scores.shape == (N,)
        assert np.isfinite(scores).all()
        assert (scores >= 0).all()
        np.testing.assert_array_equal(scores, second(now))


class TestMotion:
    def test_everything_is_taken_before_anything_was_computed(self) -> None:
        assert taken(Motion().start()(scene())) == ALL

    def test_what_differs_from_what_was_computed_is_taken_however_slowly_it_came(self) -> None:
        select = Motion(threshold=4, noise=0).start()
        for value in (101, 102, 103, 104):
            assert taken(select(scene(painted(7, value=value), computed=painted()))) == []
        assert taken(select(scene(painted(7, value=105), computed=painted()))) == [7]

    def test_the_larger_change_scores_more(self) -> None:
        frame = np.maximum(painted(2, value=130), painted(9, value=250))
        scores = Motion().start()(scene(frame, computed=painted()))
        assert scores[9] > scores[2] > 0

    def test_a_noisy_patch_needs_more(self) -> None:
        select, rng = Motion(threshold=4, noise=3).start(), np.random.default_rng(0)
        found = []
        for _ in range(60):
            frame = painted().astype(np.int16)
            frame[:P, :P] += rng.integers(-40, 41, (P, P, 1), np.int16)
            found.append(taken(select(scene(frame.astype(np.uint8), computed=painted()))))
        assert found[1] == [0]
        assert found[-1] == []

    def test_a_patch_that_was_taken_stays_until_it_is_well_below(self) -> None:
        select = Motion(threshold=10, noise=0, hysteresis=0.5).start()
        assert taken(select(scene(painted(3, value=111), computed=painted()))) == [3]
        assert taken(select(scene(painted(3, value=106), computed=painted()))) == [3]
        assert taken(select(scene(painted(3, value=104), computed=painted()))) == []
        assert taken(select(scene(painted(3, value=106), computed=painted()))) == []

    def test_a_camera_that_needs_less_allows_larger_differences(self) -> None:
        select = Motion(threshold=6, hysteresis=1).start()
        before, now = (np.full((8, 8, 3), value, np.uint8) for value in (100, 110))
        for ease, taken in ((1.0, True), (1.6, True), (1.7, False)):
            scene = Scene(pixels=now, patch_size=4, computed=before, ease=ease)
            assert select(scene).any() == taken

    def test_dilation_takes_the_neighbours_and_does_not_wrap_around(self) -> None:
        select = Motion(dilation=1).start()
        assert taken(select(scene(painted(4), computed=painted()))) == [3, 4, 8, 9]

    def test_a_frame_of_another_size_starts_afresh(self) -> None:
        select = Motion().start()
        select(scene())
        assert len(select(Scene(pixels=np.zeros((8, 8, 3), np.uint8), patch_size=P))) == 4


class TestRegion:
    def test_boxes_in_pixels_and_in_shares(self) -> None:
        assert taken(Region((4, 0, 8, 4)).start()(scene())) == [1]
        assert taken(Region((0.2, 0, 0.4, 1 / 3)).start()(scene())) == [1]
        assert taken(Region([(0, 0, 4, 4), (16, 8, 20, 12)]).start()(scene())) == [0, N - 1]

    def test_a_polygon_takes_what_it_touches(self) -> None:
        assert taken(Region([(0, 0), (20, 0), (20, 4), (0, 4)]).start()(scene())) == [0, 1, 2, 3, 4]
        assert 0 in taken(Region([(1, 1), (1.2, 1), (1.1, 1.2)]).start()(scene()))

    def test_a_mask_of_the_frame_goes_through_the_models_crop(self) -> None:
        asked = []

        def patches(mask: Array) -> Array:
            asked.append(mask.shape)
            return np.array([2, 3])

        mask = np.zeros((100, 200), bool)
        mask[10, 10] = True
        select = Region(mask).start()
        now = scene(frame_size=(100, 200), patches=patches)
        assert taken(select(now)) == taken(select(now)) == [2, 3]
        assert asked == [(100, 200)]

    def test_what_the_model_does_not_see_is_nothing(self) -> None:
        assert taken(Region((0, 0, 1, 1)).start()(scene(frame_size=(100, 200), patches=lambda mask: None))) == []

    @pytest.mark.parametrize(
        "where", [(3, 3, 3, 9), (5, 5, 1, 1), [1, 2, 3], "box", np.ones((2, 2), bool), (90, 90, 99, 99)]
    )
    def test_what_is_no_region_is_refused(self, where: object) -> None:
        with pytest.raises(ConfigError):
            as_mask(where, (12, 20))


class TestWhenAndHowMany:
    def test_every(self) -> None:
        select = Every(3).start()
        assert [len(taken(select(scene(index=index)))) for index in range(5)] == [N, 0, 0, N, 0]

    def test_grid_takes_each_patch_once_in_a_round(self) -> None:
        select = Grid(step=2).start()
        rounds = [taken(select(scene())) for _ in range(4)]
        assert sorted(patch for ids in rounds for patch in ids) == ALL

    def test_random_takes_its_share_and_others_each_time(self) -> None:
        select = Random(keep=0.2, seed=1).start()
        found = [taken(select(scene())) for _ in range(8)]
        assert {len(ids) for ids in found} == {3}
        assert len({tuple(ids) for ids in found}) > 1

    def test_oldest_comes_round(self) -> None:
        select, age, seen = Oldest(keep=0.2).start(), np.full(N, 1), []
        for _ in range(5):
            ids = taken(select(scene(age=age)))
            seen += ids
            age = age + 1
            age[ids] = 1
        assert sorted(seen) == ALL

    def test_saliency_takes_what_stands_out(self) -> None:
        tokens = np.zeros((N, 8))
        tokens[[4, 11]] = 5
        assert taken(Saliency(keep=2 / N).start()(scene(tokens=tokens))) == [4, 11]

    @pytest.mark.parametrize(("at_most", "expected"), [(1, [9]), (2, [2, 9]), (0.05, [9]), (99, [2, 9])])
    def test_a_budget_keeps_what_matters_most(self, at_most: float, expected: list[int]) -> None:
        frame = np.maximum(painted(2, value=130), painted(9, value=250))
        assert taken(Budget(of=Motion(), at_most=at_most).start()(scene(frame, computed=painted()))) == expected

    def test_either_and_both(self) -> None:
        left, top = Region((0, 0, 4, 12)), Region((0, 0, 20, 4))
        assert taken((left & top).start()(scene())) == [0]
        assert taken((left | top).start()(scene())) == [0, 1, 2, 3, 4, 5, 10]

    @pytest.mark.parametrize(
        "make",
        [
            lambda: Motion(threshold=0),
            lambda: Motion(hysteresis=0),
            lambda: Motion(dilation=-1),
            lambda: Every(0),
            lambda: Grid(step=0),
            lambda: Random(keep=0),
            lambda: Oldest(keep=1.5),
            lambda: Budget(of=Every(1), at_most=1.5),
            lambda: Budget(of=Every(1), at_most=0),
        ],
    )
    def test_impossible_numbers_are_refused(self, make: object) -> None:
        with pytest.raises(ConfigError):
            make()  # type: ignore[operator]


def test_scores_of_a_random_walk_hold_what_they_promise() -> None:
    """Properties over many random scenes: both is never more than either; a budget is never exceeded."""
    rng = np.random.default_rng(0)
    either, both = (Motion() | Random(keep=0.3)).start(), (Motion() & Random(keep=0.3)).start()
    budget = Budget(of=Motion() | Oldest(), at_most=4).start()
    base = scene(rng.integers(0, 256, (ROWS * P, COLUMNS * P, 3), np.uint8))
    for index in range(50):
        moved = replace(
            base,
            pixels=rng.integers(0, 256, base.pixels.shape, np.uint8),
            computed=base.pixels,
            index=index,
            age=rng.integers(1, 9, N),
        )
        assert set(taken(both(moved))) <= set(taken(either(moved)))
        assert len(taken(budget(moved))) <= 4
