"""Several sources in one command: each is as it would be alone, and none stops the others."""

from __future__ import annotations

import io
import json
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from mae_deploy.commands.stream import run
from mae_deploy.commands.stream.panel import Panels, View
from mae_deploy.commands.stream.record import Record
from mae_deploy.runtime.streams.stream import Seen
from mae_deploy.runtime.video import open_video, source
from tests.commands.stream.typed import COUNT, refused, stream
from tests.runtime.video.tiny_video import moving_square, served, write_video

SHORT = 5


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for number in range(SHORT):
        Image.fromarray(moving_square(3 * number)).save(folder / f"{number}.png")
    return folder


def test_each_source_has_rows_as_if_it_were_alone(
    cached: Path, video: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = (video, images)
    always: tuple[str, ...] = ("--target-snr", "99")  # else what was computed decides how much is refreshed
    out = ("--out", tmp_path / "a.npz", "--report", tmp_path / "report")
    found, said = stream(capsys, *sources, cached, *always, *out)
    assert [one["frames"] for one in found["sources"]] == [COUNT, SHORT]
    assert f"{images}; 1 of 2 sources go on" in said
    with np.load(tmp_path / "a.npz", allow_pickle=False) as archive:
        rows = dict(archive)
    np.testing.assert_array_equal(np.bincount(rows["camera"]), [COUNT, SHORT])
    assert rows["paths"][rows["camera"] == 1][2] == f"{images}#2"
    for number, alone in enumerate(sources):
        own = tmp_path / f"{number}.npz"
        stream(capsys, alone, cached, *always, "--out", own)
        with np.load(own, allow_pickle=False) as archive:
            mine = rows["camera"] == number
            np.testing.assert_array_equal(rows["frame"][mine], archive["frame"])
            # A camera takes up to a quarter more patches than it needs, so that it fits into a batch.
            assert (rows["patches"][mine] >= archive["patches"]).all()
            # The first frame is computed whole in both; engines add up batches in another order.
            np.testing.assert_allclose(rows["cls"][mine][0], archive["cls"][0], atol=1e-5)
    page = (tmp_path / "report" / "stream.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert page.count("<h2") == 4  # all, each, the machine


def test_one_that_is_lost_leaves_the_others_running(
    cached: Path, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(source, "_FIRST_WAIT", 0.01)
    path = write_video(tmp_path / "c.ts", [moving_square(i) for i in range(4)], codec="mpeg2video")
    options: list[str | Path] = ["--on-full", "wait", "--reconnect", "1", "--annotate", tmp_path / "seen.mp4"]
    with served(path.read_bytes(), None) as (url, _):
        found, said = stream(capsys, url, video, cached, *options, "--out", tmp_path / "a.jsonl", code=1)
    lost, whole = found["sources"]
    assert (lost["frames"], whole["frames"]) == (3, COUNT)
    assert "is lost" in lost["stopped"]
    assert whole["stopped"] is None
    assert f"error: {url} is lost" in said
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [line["frame"] for line in lines if line["source"] == str(video)] == list(range(COUNT))
    for number, count in enumerate((3, COUNT)):
        with av.open(str(tmp_path / f"seen-{number}.mp4")) as container:
            assert len(list(container.decode(video=0))) == count


def test_one_without_a_frame_fails_and_the_other_is_written(
    cached: Path, video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    found, said = stream(capsys, tmp_path, video, cached, code=1)
    assert [one["frames"] for one in found["sources"]] == [0, COUNT]
    assert "none of the 1 images" in said


def test_a_signal_ends_all(
    cached: Path, video: Path, images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = run._follower

    def follower(*given: Any) -> run.Follow:
        follow, calls = before(*given), iter(range(99))

        def call(frames: Mapping[int, Any]) -> dict[int, Seen]:
            if next(calls) == 2:
                signal.raise_signal(signal.SIGINT)
            return follow(frames)

        return call

    monkeypatch.setattr(run, "_follower", follower)
    found, said = stream(capsys, video, images, cached, code=143)
    assert [one["frames"] for one in found["sources"]] == [3, 3]
    assert "SIGINT stopped it at frame 2 and 2" in said


def test_whole_frames_of_several_are_one_batch(
    exported: Path, images: Path, video: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, said = stream(capsys, video, images, exported / "classifier")
    assert [one["patches"] for one in found["sources"]] == [1, 1]
    assert f"label: {images}: " in said


def test_images_of_a_pattern_that_the_shell_has_read_are_refused(
    cached: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "5 images are 5 sources" in refused(capsys, *sorted(images.iterdir()), cached)


def test_a_row_a_source_is_shown(video: Path, images: Path) -> None:
    views = [View(str(path), open_video(path), Record(15)) for path in (video, images)]
    views[1].end = "it is gone"
    shown = io.StringIO()
    Console(file=shown, width=160).print(Panels(views, "bundle"))
    text = shown.getvalue()
    assert "2 sources → bundle" in text
    assert "it is gone" in text
    assert [line.split()[1:3] for line in text.splitlines()[2:4]] == [["0", video.name], ["1", images.name]]
    assert len(Panels(views, "bundle").lines()) == 1
