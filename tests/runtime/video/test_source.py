"""Sources of frames: files, images, live streams that break, and what is no source."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from mae_deploy.errors import CheckFailed, ConfigError, MaeDeployError, MissingDependency
from mae_deploy.runtime.video import SourceLost, open_video, source
from mae_deploy.runtime.video.decode import Reader
from tests.runtime.video.tiny_video import SIZE, moving_square, served, silent, write_video

COUNT = 23


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("video") / "square.mp4", [moving_square(i) for i in range(COUNT)])


def test_a_file_gives_every_frame_with_its_time(video: Path) -> None:
    with open_video(video) as opened:
        assert (opened.live, opened.num_frames, opened.rate) == (False, COUNT, 10)
        frames = list(opened)
    assert [frame.index for frame in frames] == list(range(COUNT))
    np.testing.assert_allclose([frame.time or 0 for frame in frames], np.arange(COUNT) / 10, atol=1e-6)
    assert not any(frame.events or frame.dropped for frame in frames)
    error = np.abs(frames[7].rgb().astype(int) - moving_square(7))
    assert error.mean() < 3  # of 255: the codec is lossy; the next frame differs by more
    assert error.mean() < np.abs(frames[7].rgb().astype(int) - moving_square(8)).mean()


def test_every_and_max_frames(video: Path) -> None:
    with open_video(video, every=5) as opened:
        assert opened.num_frames == 5
        assert [frame.index for frame in opened] == [0, 5, 10, 15, 20]
    with open_video(video, every=5, max_frames=2) as opened:
        assert opened.num_frames == 2
        assert [frame.index for frame in opened] == [0, 5]


def test_images_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in (10, 2, 1):
        Image.fromarray(moving_square(number)).save(tmp_path / f"frame{number}.png")
    for given in (tmp_path, tmp_path / "*.png"):
        with open_video(given) as opened:
            assert (opened.num_frames, opened.rate) == (3, None)
            frames = list(opened)
        for frame, number in zip(frames, (1, 2, 10), strict=True):
            assert frame.time is None
            np.testing.assert_array_equal(frame.rgb(), moving_square(number))


def test_an_image_that_cannot_be_read_is_left_out_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(3):
        Image.fromarray(moving_square(number)).save(tmp_path / f"{number}.png")
    (tmp_path / "1.png").write_bytes(b"no image")
    with open_video(tmp_path) as opened:
        frames = list(opened)
    assert len(frames) == 2
    assert "1.png" in frames[1].events[0]
    assert opened.counts.corrupt == 1
    assert "1.png" in capsys.readouterr().err
    for number in (0, 2):
        (tmp_path / f"{number}.png").write_bytes(b"no image")
    with open_video(tmp_path) as opened, pytest.raises(CheckFailed, match="none of the 3 images"):
        list(opened)


def test_what_is_no_source_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(ConfigError, match=r"text\.mp4 is no video"):
        open_video(tmp_path / "text.mp4")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no images below"):
        open_video(tmp_path / "empty")
    with pytest.raises(ConfigError, match="no such file or folder"):
        open_video(tmp_path / "absent.mp4")
    with pytest.raises(MissingDependency, match="the camera 97 cannot be opened"):
        open_video("97")
    with pytest.raises(MaeDeployError, match="cannot be read: Connection refused"):
        open_video("http://127.0.0.1:9/camera")
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        sound = container.add_stream("pcm_s16le", rate=8000)
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        samples.sample_rate = 8000
        container.mux(sound.encode(samples))
    with pytest.raises(ConfigError, match="has no video in it"):
        open_video(tmp_path / "sound.wav")


def test_corrupt_packets_are_skipped_counted_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_video(tmp_path / "broken.mov", [moving_square(i) for i in range(40)], codec="png", keys=1)
    content = bytearray(path.read_bytes())
    places = [place for place in range(len(content)) if content[place : place + 8] == b"\x89PNG\r\n\x1a\n"]
    for index in (11, 12, 30):
        content[places[index] : places[index] + 8] = b"rubbish!"
    path.write_bytes(content)
    with open_video(path) as opened:
        frames = list(opened)
    assert len(frames) == 37
    assert opened.counts.corrupt == 3
    assert [frame.events for frame in frames if frame.events] == [
        ("2 corrupt packets skipped",),
        ("1 corrupt packet skipped",),
    ]
    assert capsys.readouterr().err.count("a packet was skipped") == 1


def test_a_live_stream_that_is_lost_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(source, "_FIRST_WAIT", 0.01)
    first = write_video(tmp_path / "first.ts", [moving_square(i) for i in range(9)], codec="mpeg2video").read_bytes()
    large = [moving_square(i, (96, 128)) for i in range(7)]
    second = write_video(tmp_path / "second.ts", large, codec="mpeg2video").read_bytes()
    with served(first, None, second, None) as (url, asked), open_video(url, on_full="wait", reconnect=3) as opened:
        assert opened.live
        frames = iter(opened)
        seen = [next(frames) for _ in range(14)]
        with pytest.raises(SourceLost, match="Server returned 5XX"):
            next(frames)
    # The decoder keeps a frame back, which is lost with the connection.
    assert [frame.index for frame in seen] == list(range(14))
    assert [frame.rgb().shape[:2] for frame in seen] == [SIZE] * 8 + [(96, 128)] * 6
    assert "found again" in seen[8].events[0]
    assert (opened.counts.lost, asked) == (2, [200, 503, 200, 503, 503, 503])
    said = capsys.readouterr().err
    assert "try 1 of 3 in 0.01 s" in said
    assert "try 2 of 3 in 0.02 s" in said
    assert "found again" in said


def test_a_live_stream_drops_the_oldest_frames_where_they_come_too_fast(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = write_video(tmp_path / "c.ts", [moving_square(i) for i in range(30)], codec="mpeg2video").read_bytes()
    with served(content) as (url, _), open_video(url, reconnect=0, queue=3) as opened:
        frames = iter(opened)
        seen = [next(frames)]
        assert opened._buffer is not None
        opened._buffer._thread.join(10)
        seen += frames
    last = seen[-1].index
    assert [frame.index for frame in seen[-3:]] == [last - 2, last - 1, last]
    assert sum(frame.dropped for frame in seen) == opened.counts.dropped == last + 1 - len(seen) > 0
    assert capsys.readouterr().err.count("the oldest are dropped") == 1


def test_waiting_loses_nothing_and_closing_ends_the_thread(video: Path) -> None:
    with open_video(video, on_full="drop-oldest", queue=COUNT) as opened:
        assert len(list(opened)) == COUNT
    before = threading.active_count()
    with open_video(video, on_full="drop-oldest", queue=2) as opened:
        next(iter(opened))
    assert threading.active_count() == before


def test_a_live_stream_that_says_nothing_more_counts_as_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(source, "_FIRST_WAIT", 0.01)
    content = write_video(tmp_path / "c.ts", [moving_square(i) for i in range(9)], codec="mpeg2video").read_bytes()
    with silent(content) as url, open_video(url, on_full="wait", timeout=0.3) as opened:
        frames = iter(opened)
        seen = [next(frames) for _ in range(12)]
        assert "lost (nothing came for 0.3 s) and found again" in seen[8].events
        assert opened.counts.lost == 1
    assert "nothing came for 0.3 s; try 1 of 10" in capsys.readouterr().err


def test_what_waits_for_a_frame_ends_when_it_is_stopped(tmp_path: Path) -> None:
    content = write_video(tmp_path / "c.ts", [moving_square(i) for i in range(40)], codec="mpeg2video").read_bytes()
    with silent(content) as url, open_video(url, on_full="wait", timeout=30) as opened:
        timer = threading.Timer(0.2, opened.stop)
        timer.start()
        assert len(list(opened)) <= 40
        timer.join()


def test_images_of_many_channels_are_read_as_the_model_wants_them_and_are_not_drawn(tmp_path: Path) -> None:
    np.save(tmp_path / "0.npy", np.zeros((6, 7, 5), np.uint16))
    with open_video(tmp_path, read=np.load) as opened:
        (frame,) = opened
    assert frame.image.shape == (6, 7, 5)
    with pytest.raises(ConfigError, match=r"an image of uint16 \(6, 7, 5\) cannot be drawn"):
        frame.rgb()


def test_the_device_is_let_go_of_when_a_stream_is_closed(video: Path) -> None:
    with open_video(video, on_full="drop-oldest", queue=2) as opened:
        next(iter(opened))
    assert isinstance(opened._reader, Reader)
    with pytest.raises(AssertionError, match="Container is not open"):
        next(opened._reader.frames())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_pipe_is_a_video(tmp_path: Path) -> None:
    path = write_video(tmp_path / "c.ts", [moving_square(i) for i in range(9)], codec="mpeg2video")
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes(path.read_bytes()))
    writer.start()
    with open_video(tmp_path / "pipe") as opened:
        assert len(list(opened)) == 9
    writer.join()
