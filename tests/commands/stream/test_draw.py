"""Patches drawn on frames, and the video of them."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

from mae_deploy.commands.stream.draw import PATCH, WHOLE, annotated, written_video
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.runtime.streams.stream import Seen

SQUASH = Preprocess(image_size=(6, 10), crop_mode="squash", crop_pct=1.0)
FRAME = np.full((90, 150, 3), 100, np.uint8)
"""A patch of 2 pixels is seen in 30 by 30 of it."""


def seen(*keep: int) -> Seen:
    return Seen({}, keep=np.array(keep, int), age=np.zeros(15), cost=0.0, event=None, grid=(3, 5))


def test_computed_patches_are_tinted_and_the_others_are_not() -> None:
    drawn = annotated(FRAME, seen(7, 14), SQUASH, 2, "")
    blocks = drawn.reshape(3, 30, 5, 30, 3)[:, 6:-6, :, 6:-6].astype(int)  # without outlines
    tinted = {(1, 2), (2, 4)}
    for row in range(3):
        for column in range(5):
            expected = np.array(PATCH) * 0.35 + 100 * 0.65 if (row, column) in tinted else np.full(3, 100)
            if (row, column) != (0, 0):  # where the text stands
                np.testing.assert_allclose(blocks[row, :, column].reshape(-1, 3), np.tile(expected, (324, 1)), atol=1)
    assert tuple(drawn[30, 75]) == PATCH
    assert (FRAME == 100).all()


def test_a_whole_frame_has_a_border_alone() -> None:
    drawn = annotated(FRAME, seen(*range(15)), SQUASH, 2, "")
    assert tuple(drawn[60, 0]) == tuple(drawn[60, 149]) == tuple(drawn[89, 75]) == WHOLE
    assert (drawn[40:80, 10:140] == 100).all()


def test_the_crop_is_where_the_model_sees_it() -> None:
    wide = np.full((60, 200, 3), 100, np.uint8)
    drawn = annotated(wide, seen(7), Preprocess(image_size=(6, 10), crop_pct=1.0), 2, "")
    rows, columns = np.nonzero((drawn != 100).any(axis=2)[24:36])
    assert set(columns.tolist()) >= set(range(90, 110))  # the middle patch of a box 100 wide
    assert len(rows) == 12 * 20 + 12 * 2  # and the thin line at both sides of the box


def test_the_video_has_the_size_of_its_first_frame_and_none_is_left_where_it_fails(tmp_path: Path) -> None:
    with written_video(tmp_path / "a.mp4", 12.5) as video:
        video.add(FRAME[:, :-1])
        video.add(np.zeros((20, 30, 3), np.uint8))
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.average_rate) == (148, 90, 12.5)
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert [round(float(frame.mean()), -1) for frame in frames] == [100, 0]
    with pytest.raises(RuntimeError, match="stop"), written_video(tmp_path / "b.mp4", None) as video:
        raise RuntimeError("stop")
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
