"""Streams: features of whole frames from what changed, refreshes and audits, and cameras that misbehave."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from mae_deploy.cli import main
from mae_deploy.errors import ConfigError
from mae_deploy.images.read import Array
from mae_deploy.images.video_image import VideoImage
from mae_deploy.runtime.backbone import Backbone
from mae_deploy.runtime.cache import TokenCache
from mae_deploy.runtime.selection import Every, Motion, Region
from mae_deploy.runtime.streams.camera import CUT, FIRST, RESIZED, WIDE
from mae_deploy.runtime.streams.error import temporal_snr
from mae_deploy.runtime.streams.stream import DriftError
from tests.export.tiny_exports import write_checkpoint
from tests.models.tiny_models import ENCODER, tiny_encoder

N, P = ENCODER.num_patches, ENCODER.patch
SIZE = ENCODER.image_size
STILL: dict[str, Any] = {"bypass": 0.8, "audit": 0.0, "refresh": 0.0, "target_snr": 99.0, "shift": False}
"""Nothing but what changed."""


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backbone]:
    root = tmp_path_factory.mktemp("stream")
    checkpoint = write_checkpoint(root / "checkpoint", tiny_encoder())
    assert main(["export", str(checkpoint), "--out", str(root / "cached"), "--tokens", "cached"]) == 0
    with Backbone.load(root / "cached") as loaded:
        yield loaded


def background(seed: int = 0) -> Array:
    """A frame of the model's size, no crop: smooth enough to be told from noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(60, 190, (SIZE[0] // P, SIZE[1] // P, 3), np.uint8)
    frame: Array = coarse.repeat(P, axis=0).repeat(P, axis=1)
    return frame


def changed(frame: Array, *patches: int, by: int = 60) -> Array:
    found: Array = frame.copy()
    for patch in patches:
        row, column = divmod(patch, SIZE[1] // P)
        found[row * P : (row + 1) * P, column * P : (column + 1) * P] += np.uint8(by)
    return found


def whole(backbone: Backbone, frame: Array) -> dict[str, Array]:
    return backbone.run_cropped(backbone.preprocess.crop(frame)[None])


def test_the_feature_map_is_the_whole_frames_tokens_in_their_places(backbone: Backbone) -> None:
    stream, frame = backbone.stream(**STILL), background()
    stream(frame)
    seen = stream(changed(frame, 1, 13))
    rows, columns = SIZE[0] // P, SIZE[1] // P
    assert seen.feature_map.shape == (1, ENCODER.width, rows, columns)
    for patch in (1, 13, 4):  # two that were computed, one that was not
        row, column = divmod(patch, columns)
        np.testing.assert_array_equal(seen["feature_map"][0, :, row, column], seen.tokens[0, patch])
    assert "feature_map" not in dict(seen)
    with pytest.raises(AttributeError, match="no output 'p2'"):
        _ = seen.p2


def test_the_first_frame_is_whole_and_exact(backbone: Backbone) -> None:
    seen = backbone.stream(**STILL)(background())
    assert (seen.event, seen.cost) == (FIRST, 1.0)
    assert (seen.age == 0).all()
    for name, value in whole(backbone, background()).items():
        np.testing.assert_allclose(seen[name], value, atol=2e-5)


def test_a_frame_that_is_the_same_costs_nothing_and_gives_the_same_to_the_bit(backbone: Backbone) -> None:
    stream = backbone.stream(**STILL)
    first = stream(background())
    for age in (1, 2):
        again = stream(background())
        assert (again.cost, len(again.keep)) == (0.0, 0)
        assert (again.age == age).all()
        for name in first:
            np.testing.assert_array_equal(again[name], first[name])


def test_what_changed_is_computed_and_the_rest_kept(backbone: Backbone) -> None:
    stream = backbone.stream(**STILL)
    first = stream(background())
    seen = stream(changed(background(), 3, 4))
    assert {3, 4} <= set(seen.keep.tolist())
    assert 0 < seen.cost < 1
    kept = np.setdiff1d(np.arange(N), seen.keep)
    np.testing.assert_array_equal(seen["tokens"][0, kept], first["tokens"][0, kept])
    assert np.abs(seen["tokens"][0, 3] - first["tokens"][0, 3]).max() > 1e-3
    np.testing.assert_allclose(seen["pooled"], seen["tokens"].mean(axis=1), atol=1e-6)
    assert (seen.age[seen.keep] == 0).all()
    assert (seen.age[kept] == 1).all()


def test_results_belong_to_the_caller(backbone: Backbone) -> None:
    stream = backbone.stream(**STILL)
    first = stream(background())
    before = {name: value.copy() for name, value in first.items()}
    stream(changed(background(), 1))
    for name, value in first.items():
        np.testing.assert_array_equal(value, before[name])


def test_the_refresh_computes_every_patch_in_turn(backbone: Backbone) -> None:
    stream = backbone.stream(**{**STILL, "refresh": 0.25})
    stream(background())
    seen = [stream(background()) for _ in range(4)]
    assert set(np.concatenate([one.keep for one in seen]).tolist()) == set(range(N))
    assert seen[-1].age.max() <= 3


def test_half_of_the_refresh_goes_to_what_changed_most(backbone: Backbone) -> None:
    """By less than the threshold; the other half in turn."""
    stream = backbone.stream(**{**STILL, "refresh": 4 / N, "bypass": 1.0})
    stream(background())
    faint = changed(changed(background(), 6, by=3), 11, by=2)
    seen = stream(faint)
    assert {6, 11} <= set(seen.keep.tolist())
    assert len(seen.keep) == 4
    assert set(stream(faint).keep.tolist()) & {6, 11} == set()


def test_the_shift_brings_what_is_not_computed_nearer(backbone: Backbone) -> None:
    frame, moved = background(), changed(background(), *range(N // 3))
    given: dict[str, Any] = {**STILL, "refresh": 0.2}
    plain, shifted = backbone.stream(**given), backbone.stream(**{**given, "shift": True})
    for stream in (plain, shifted):
        stream(frame)
    ours, theirs = shifted(moved), plain(moved)
    np.testing.assert_array_equal(ours.keep, theirs.keep)
    np.testing.assert_array_equal(ours["tokens"][0, ours.keep], theirs["tokens"][0, ours.keep])
    true = whole(backbone, moved)["tokens"][0]
    assert np.square(true - ours["tokens"][0]).sum() < np.square(true - theirs["tokens"][0]).sum()


def test_much_change_makes_a_whole_frame(backbone: Backbone) -> None:
    stream = backbone.stream(**{**STILL, "bypass": 0.3, "cut": 1.0})
    stream(background())
    seen = stream(changed(background(), *range(N // 2)))
    assert (seen.event, seen.cost) == (WIDE, 1.0)
    np.testing.assert_allclose(
        seen["tokens"], whole(backbone, changed(background(), *range(N // 2)))["tokens"], atol=2e-5
    )


def test_a_cut_another_size_and_a_black_frame_go_on_and_say_what_happened(backbone: Backbone) -> None:
    stream = backbone.stream(**{**STILL, "cut_difference": 10.0})
    stream(background())
    assert stream(255 - background()).event == CUT
    assert stream(np.zeros((SIZE[0], SIZE[1], 3), np.uint8)).event == CUT
    large = background(3).repeat(2, axis=0).repeat(2, axis=1)
    seen = stream(large)
    assert seen.event == RESIZED
    np.testing.assert_allclose(seen["cls"], whole(backbone, large)["cls"], atol=2e-5)


def test_the_bypass_is_measured_once(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    from mae_deploy.runtime.streams import crossover

    asked = []

    def counted(backbone: Backbone) -> float:
        asked.append(1)
        return 0.5

    monkeypatch.setattr(crossover, "_measured", {})
    monkeypatch.setattr(crossover, "_measure", counted)
    for _ in range(2):
        backbone.stream()
    assert asked == [1]


def test_the_measured_bypass_is_a_share(backbone: Backbone) -> None:
    from mae_deploy.runtime.streams.crossover import measured_bypass

    assert 0 <= measured_bypass(backbone) <= 1


@pytest.mark.parametrize(("whole", "expected"), [(5.0, 0.4375), (0.5, 0.0), (9.0, 0.85), (2.0 / 0.9, 0.125)])
def test_the_bypass_is_where_a_line_reaches_a_whole_frame(whole: float, expected: float) -> None:
    from mae_deploy.runtime.streams.crossover import crossing

    assert crossing((0.125, 2.0), (0.5, 5.0), whole) == pytest.approx(expected)
    assert crossing((0.125, 1.0), (0.5, 1.0), 2.0) == 0.85  # as fast whatever it computes


AUDITED: dict[str, Any] = {**STILL, "refresh": 0.1, "audit": 1.0}


class TestAudit:
    def sound(self, backbone: Backbone, **given: Any) -> Any:
        """A stream of a few frames."""
        stream = backbone.stream(**{**AUDITED, **given})
        for index in range(3):
            stream(changed(background(), index))
        return stream

    def drifted(self, backbone: Backbone, **given: Any) -> Any:
        """One into whose cache a drift was planted."""
        stream = self.sound(backbone, **given)
        for name in stream.cache.rows:
            stream.cache.rows[name][:] += 3
        stream.cache.tokens[:] += 3
        return stream

    def test_a_planted_drift_is_found_and_mended(self, backbone: Backbone) -> None:
        stream, sound, frame = self.drifted(backbone), self.sound(backbone), changed(background(), 5)
        found, without = ([each(frame) for _ in range(40)] for each in (stream, sound))
        audits = [seen for seen in found if seen.snr is not None]
        assert audits[0].snr < 6 < audits[-1].snr
        np.testing.assert_allclose(audits[0]["tokens"], whole(backbone, frame)["tokens"], atol=2e-5)
        at = next(index for index, seen in enumerate(found) if seen.snr is not None)
        assert len(without[at + 1].keep) < len(found[at + 1].keep)  # it refreshes more

    def test_it_raises_where_asked_to(self, backbone: Backbone) -> None:
        stream = self.drifted(backbone, on_drift="error")

        def many() -> None:
            for _ in range(40):
                stream(changed(background(), 5))

        with pytest.raises(DriftError, match=r"the stream's tokens are -?\d+\.\d dB from those of the whole"):
            many()
        assert stream(changed(background(), 5)).cost < 1.5  # and goes on

    def test_the_camera_is_called_as_it_was_named(self, backbone: Backbone) -> None:
        options: dict[str, Any] = {**AUDITED, "audit": 1.0, "min_snr": 99.0, "on_drift": "error"}
        pool = backbone.stream_pool(["yard", "rtsp://gate"], **options)

        def many() -> None:
            for index in range(20):
                pool([background(), changed(background(), index % N)])

        with pytest.raises(DriftError, match=r"^rtsp://gate, frame \d+: the stream's"):
            many()
        with pytest.raises(ConfigError, match=r"^gate has no frame yet"):
            backbone.stream_pool(["yard", "gate"], **options)([background(), None])
        with pytest.raises(ConfigError, match="not 'yard'"):
            backbone.stream_pool("yard", **options)

    def test_a_refresh_that_was_doubled_to_whole_frames_is_tried_with_less_again(self, backbone: Backbone) -> None:
        """Whole frames are not audited: such a stream would stay at a whole frame's cost for good."""
        stream = backbone.stream(**{**AUDITED, "refresh": 0.2, "audit": 0.5, "min_snr": 99.5})  # no audit passes
        found = [stream(changed(background(), index % N)) for index in range(60)]
        first = next(index for index, seen in enumerate(found) if index and seen.event == WIDE)
        assert sum(seen.snr is not None for seen in found[:first]) >= 2
        later = [seen for seen in found[first:] if seen.event is None]
        assert len(later) > 5
        assert sum(seen.snr is not None for seen in later) > 1

    def test_its_share_of_the_computation_is_kept(self, backbone: Backbone) -> None:
        stream = backbone.stream(**{**AUDITED, "audit": 0.25, "bypass": 1.0, "cut": 1.0})
        found = [stream(changed(background(), index % N)) for index in range(60)]
        audits = sum(seen.snr is not None for seen in found)
        own = sum(seen.cost for seen in found) - audits
        assert audits == pytest.approx(0.25 * own, abs=1)


def test_snr() -> None:
    rng = np.random.default_rng(0)
    mean = rng.normal(size=(N, 8))
    true = mean + rng.normal(size=(N, 8))
    assert temporal_snr(true, mean, mean) == pytest.approx(0)
    assert temporal_snr(true, true, mean) == 99
    assert temporal_snr(true, true + 0.1 * (true - mean), mean) == pytest.approx(20)
    at_rest = temporal_snr(mean, mean + 1e-3, mean)
    assert 20 < at_rest < 99


class TestPool:
    def test_each_camera_is_as_if_it_were_alone(self, backbone: Backbone) -> None:
        given: dict[str, Any] = {**STILL, "refresh": 0.2}
        pool = backbone.stream_pool(2, **given)
        alone = [backbone.stream(**given) for _ in range(2)]
        for index in range(4):
            frames = [changed(background(0), index), changed(background(9), index, index + 5)]
            for ours, stream, frame in zip(pool(frames), alone, frames, strict=True):
                true, one = whole(backbone, frame)["tokens"], stream(frame)
                if len(ours.keep) == len(one.keep):
                    np.testing.assert_allclose(ours["tokens"], one["tokens"], atol=2e-5)
                assert np.square(true - ours["tokens"]).sum() <= 1.5 * np.square(true - one["tokens"]).sum() + 1e-6

    def test_a_camera_that_vanishes_keeps_its_features_and_comes_back(self, backbone: Backbone) -> None:
        pool = backbone.stream_pool(2, **STILL)
        with pytest.raises(ConfigError, match="camera 1 has no frame yet"):
            pool([background(), None])
        first = pool([background(0), background(1)])
        gone = pool([changed(background(0), 2), None])
        np.testing.assert_array_equal(gone[1]["tokens"], first[1]["tokens"])
        assert gone[1].cost == 0
        gone[1]["tokens"][:] = 0  # the caller's
        np.testing.assert_array_equal(pool([None, None])[1]["tokens"], first[1]["tokens"])
        back = pool([None, changed(background(1), 7)])
        assert 7 in back[1].keep

    def test_cameras_side_by_side_that_need_as_much_are_one_batch(
        self, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pool = backbone.stream_pool(4, **STILL)
        first = [background(seed) for seed in range(4)]
        moved = [(2, 3, 5, 6, 8), (2, 3, 5, 6, 8, 12), (4,)]
        then = [changed(frame, *patches) for frame, patches in zip(first, moved, strict=False)]
        update = backbone.update
        batches: list[tuple[int, int]] = []

        def recorded(cache: TokenCache, patches: Array, keep: Array) -> Any:
            batches.append((len(cache), keep.shape[1]))
            return update(cache, patches, keep)

        monkeypatch.setattr(backbone, "update", recorded)
        seen = [pool(frames) for frames in (first, [*then, None])]
        monkeypatch.undo()
        alone = []
        for before, frame in zip(first, then, strict=False):
            stream = backbone.stream(**STILL)
            stream(before)
            alone.append(stream(frame))
        few, more, one = (len(found.keep) for found in alone)
        assert few < more
        assert batches == [(4, N), (2, more), (1, one)]
        assert len(seen[1][0].keep) == more  # more than it needs: the oldest
        for camera in (1, 2):
            np.testing.assert_array_equal(seen[1][camera].keep, alone[camera].keep)
            np.testing.assert_allclose(seen[1][camera]["tokens"], alone[camera]["tokens"], atol=2e-5)

    def test_another_number_of_frames_is_refused(self, backbone: Backbone) -> None:
        with pytest.raises(ConfigError, match="1 frames for 2 cameras"):
            backbone.stream_pool(2, **STILL)([background()])

    def test_threads_take_turns(self, backbone: Backbone) -> None:
        stream, failures = backbone.stream(**STILL), []

        def work(seed: int) -> None:
            try:
                for index in range(5):
                    stream(changed(background(), seed, index))
            except Exception as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []


def test_a_region_of_a_larger_frame(backbone: Backbone) -> None:
    stream = backbone.stream(**{**STILL, "select": Region((0, 0, 0.01, 1)) & Motion()})
    frame = background().repeat(2, axis=0).repeat(2, axis=1)
    stream(frame)
    moved = frame.copy()
    moved[:, :4] += 50
    moved[:, -4:] += 50
    kept = stream(moved).keep
    assert len(kept) > 0
    assert (kept % (SIZE[1] // P) == 0).all()


def test_every_is_the_cheap_opponent(backbone: Backbone) -> None:
    stream = backbone.stream(**{**STILL, "select": Every(3)})
    assert [stream(changed(background(), index)).cost for index in range(5)] == [1, 0, 0, 1, 0]


def test_memory_does_not_grow(backbone: Backbone) -> None:
    import tracemalloc

    stream = backbone.stream(**{**STILL, "refresh": 0.2, "audit": 0.2})
    frames = [changed(background(), index) for index in range(4)]
    for index in range(20):
        stream(frames[index % 4])
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for index in range(200):
        stream(frames[index % 4])
    after = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert after - before < 200_000


@pytest.mark.parametrize(
    "options", [{"refresh": 1.5}, {"audit": -1}, {"bypass": 2}, {"on_drift": "ignore"}, {"cut": -0.1}], ids=str
)
def test_options_that_cannot_be(backbone: Backbone, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        backbone.stream(**options)


def test_a_frame_in_its_own_pixel_format_is_followed_as_its_rgb_pixels_are(backbone: Backbone) -> None:
    ours, ordinary = backbone.stream(**STILL), backbone.stream(**STILL)
    for frame in (background(), changed(background(), 3, 4)):
        seen, expected = ours(VideoImage.from_array(frame, "rgb24")), ordinary(frame)
        np.testing.assert_array_equal(seen.keep, expected.keep)
        assert (
            np.square(seen["tokens"] - expected["tokens"]).sum() < 1e-3 * np.square(expected["tokens"]).sum()
        )  # 30 dB
    direct, ordinary_cls = backbone(VideoImage.from_array(background(), "rgb24")), whole(backbone, background())["cls"]
    assert np.square(direct["cls"] - ordinary_cls).sum() < 1e-3 * np.square(ordinary_cls).sum()
