"""Frames of several sources: files in step, live ones as they come."""

from __future__ import annotations

from pathlib import Path

import pytest

from mae_deploy.errors import MaeDeployError
from mae_deploy.runtime.video import open_video
from mae_deploy.runtime.video.together import together
from tests.runtime.video.tiny_video import moving_square, silent, write_video


def test_files_go_in_step_until_the_last_has_ended(tmp_path: Path) -> None:
    ends: list[tuple[int, MaeDeployError | None]] = []
    paths = [write_video(tmp_path / f"{n}.mp4", [moving_square(i) for i in range(n)]) for n in (5, 2, 3)]
    with open_video(paths[0]) as one, open_video(paths[1]) as two, open_video(paths[2]) as three:
        rounds = [
            {number: frame.index for number, frame in frames.items()}
            for frames in together([one, two, three], lambda number, error: ends.append((number, error)))
        ]
    assert rounds == [{0: 0, 1: 0, 2: 0}, {0: 1, 1: 1, 2: 1}, {0: 2, 2: 2}, {0: 3}, {0: 4}]
    assert ends == [(1, None), (2, None), (0, None)]


@pytest.mark.parametrize("file", [0, 1])
def test_a_camera_that_says_nothing_keeps_nobody_waiting(file: int, tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.ts", [moving_square(i) for i in range(40)], codec="mpeg2video")
    with silent(path.read_bytes()) as url, open_video(url, timeout=30) as camera, open_video(path) as opened:
        videos = [camera, camera]
        videos[file] = opened
        seen = [
            frames[file].index
            for frames in together(videos, lambda *_: camera.stop())  # when the file has ended
            if file in frames
        ]
    assert seen == list(range(40))
