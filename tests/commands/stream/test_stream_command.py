"""`mae-deploy stream` as it is typed: features, labels, pictures, and what ends a stream."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from mae_deploy.commands.stream import run
from mae_deploy.images.read import Array
from mae_deploy.runtime import Backbone
from mae_deploy.runtime.selection import Motion, Region
from mae_deploy.runtime.streams.stream import Seen
from mae_deploy.runtime.video import open_video, source
from tests.commands.stream.typed import COUNT, refused, stream
from tests.models.tiny_models import ENCODER
from tests.runtime.video.tiny_video import moving_square, served, write_video


def by_hand(bundle: Path, video: Path, **options: Any) -> list[Seen]:
    with Backbone.load(bundle) as backbone, open_video(video) as opened:
        follow = backbone.stream(bypass=0.9, **options)
        return [follow(frame.image) for frame in opened]


def test_every_kind_of_file_has_what_the_stream_gives(
    cached: Path, video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = by_hand(cached, video)
    for suffix in ("npz", "parquet", "jsonl"):
        found, _ = stream(capsys, video, cached, "--out", tmp_path / f"features.{suffix}")
        assert (found["frames"], found["last_frame"], found["stopped"]) == (COUNT, COUNT - 1, None)
    with np.load(tmp_path / "features.npz", allow_pickle=False) as archive:
        arrays = dict(archive)
    np.testing.assert_array_equal(arrays["frame"], np.arange(COUNT))
    np.testing.assert_allclose(arrays["time"], np.arange(COUNT) / 10, atol=1e-6)
    np.testing.assert_array_equal(arrays["cls"], np.concatenate([seen["cls"] for seen in expected]))
    np.testing.assert_array_equal(arrays["patches"], [len(seen.keep) for seen in expected])
    assert arrays["paths"][3].endswith("square.mp4#3")
    table = pyarrow.parquet.read_table(tmp_path / "features.parquet")
    np.testing.assert_array_equal(np.array(table["cls"].to_pylist(), np.float32), arrays["cls"])
    lines = [json.loads(line) for line in (tmp_path / "features.jsonl").read_text().splitlines()]
    np.testing.assert_allclose([line["pooled"] for line in lines], arrays["pooled"], rtol=1e-6, atol=1e-7)
    assert lines[0]["events"] == ["first frame"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["features.jsonl", "features.npz", "features.parquet"]


def test_options_reach_the_stream(
    cached: Path, video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = by_hand(
        cached, video, select=Motion(threshold=9) & Region([(0, 0.5, 1, 1)]), refresh=0.0, shift=False, audit=0.0
    )
    options = ["--threshold", "9", "--region", "0,0.5,1,1", "--refresh", "0", "--no-shift", "--audit", "0"]
    found, _ = stream(capsys, video, cached, *options, "--out", tmp_path / "a.npz", "--outputs", "tokens,feature_map")
    with np.load(tmp_path / "a.npz", allow_pickle=False) as archive:
        np.testing.assert_array_equal(archive["tokens"], np.concatenate([seen["tokens"] for seen in expected]))
        assert archive["feature_map"].shape == (COUNT, ENCODER.width, *ENCODER.grid_size)
    assert found["whole_frames"] == {"first frame": 1}
    assert found["audits"]["count"] == 0
    assert found["patches"] == pytest.approx(np.mean([len(seen.keep) / 15 for seen in expected]), abs=1e-4)


def test_a_classifier_tells_when_its_label_changes(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, colour in enumerate(("red", "red", "blue", "blue", "red")):
        Image.new("RGB", (32, 32), colour).save(tmp_path / f"{number}.png")
    found, said = stream(capsys, tmp_path, exported / "classifier")
    with Backbone.load(exported / "classifier") as backbone:
        names = backbone.bundle.class_names
        assert names is not None
        best = [names[int(backbone(Image.open(path)).logits.argmax())] for path in sorted(tmp_path.iterdir())]
    changes = [index for index in range(5) if index == 0 or best[index] != best[index - 1]]
    assert [(row["frame"], row["label"]) for row in found["labels"]] == [(index, best[index]) for index in changes]
    assert said.count("label: ") == found["label_changes"] == len(changes)
    assert "whole frames: the graph of" in said
    assert found["patches"] == 1


def test_the_report_and_the_annotated_video_show_what_was_computed(
    cached: Path, video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs: list[str | Path] = ["--report", tmp_path / "report", "--annotate", tmp_path / "seen.mp4"]
    stream(capsys, video, cached, "--refresh", "0", *outputs)
    names = {path.name for path in (tmp_path / "report").iterdir()}
    assert names == {"stream.md", "stream.html", "stream.json", "stream-curves.png", "stream-frames.png"}
    page = (tmp_path / "report" / "stream.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert f"{COUNT} in " in page
    with av.open(str(tmp_path / "seen.mp4")) as container:
        assert container.streams.video[0].average_rate == 10
        drawn = [frame.to_ndarray(format="rgb24").astype(int) for frame in container.decode(video=0)]
    assert len(drawn) == COUNT
    difference = drawn[-1] - moving_square(COUNT - 1)
    assert (difference[24:, :, 0] - difference[24:, :, 2]).max() > 40  # an orange tint takes blue away


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{video}", "{cached}", "--out", "{tmp}/a.csv"], "a.csv must end in .npz, .parquet or .jsonl"),
        (["{video}", "{cached}", "--out", "{video}.npz"], "already exists"),
        (["{video}", "{cached}", "--annotate", "{tmp}/a.gif"], "a.gif must end in .mp4"),
        (["{video}", "{cached}", "--region", "1,2,3"], "--region 1,2,3 is no box"),
        (["{video}", "{cached}", "--outputs", "feet"], "feet"),
        (["{cached}/manifest.json", "{cached}"], "manifest.json is no video"),
        (["{tmp}/empty", "{cached}"], "no images below"),
        (["{tmp}/absent.mp4", "{cached}"], "no such file or folder"),
        (["{video}", "{tmp}/empty"], "empty"),
        (["{video}", "{cached}", "--every", "0"], "--every must be at least 1"),
    ],
)
def test_what_cannot_be_done_is_one_line_before_it_begins(
    arguments: list[str], message: str, cached: Path, video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    video.with_name(f"{video.name}.npz").touch()
    filled = [part.format(video=video, cached=cached, tmp=tmp_path) for part in arguments]
    assert message in refused(capsys, *filled)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def interrupted(follow: run.Follow, at: int, do: Callable[[], Any]) -> run.Follow:
    count = 0

    def call(frames: Mapping[int, Any]) -> dict[int, Seen]:
        nonlocal count
        count += 1
        if count == at:
            do()
        return follow(frames)

    return call


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_complete_files_and_a_summary(
    number: signal.Signals,
    cached: Path,
    video: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = run._follower

    def follower(*given: Any) -> run.Follow:
        return interrupted(before(*given), 5, lambda: signal.raise_signal(number))

    monkeypatch.setattr(run, "_follower", follower)
    outputs: list[str | Path] = [
        "--out",
        tmp_path / "a.npz",
        "--annotate",
        tmp_path / "a.mp4",
        "--report",
        tmp_path / "report",
    ]
    found, said = stream(capsys, video, cached, *outputs, code=143)
    assert (found["frames"], found["stopped"]) == (5, number.name)
    assert f"error: {number.name} stopped it at frame 4" in said
    with np.load(tmp_path / "a.npz", allow_pickle=False) as archive:
        assert len(archive["cls"]) == 5
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert len(list(container.decode(video=0))) == 5
    assert (tmp_path / "report" / "stream.html").is_file()


def test_a_drift_that_ends_a_stream_leaves_what_came_before(
    cached: Path, video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options: list[str | Path] = [
        "--audit",
        "1",
        "--min-snr",
        "98",
        "--on-drift",
        "error",
        "--out",
        tmp_path / "a.jsonl",
    ]
    found, said = stream(capsys, video, cached, *options, code=1)
    assert "dB from those of the whole frame" in said
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    assert 0 < found["frames"] == len(lines) < COUNT


def test_a_camera_that_is_lost_for_good_leaves_what_came_before(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(source, "_FIRST_WAIT", 0.01)
    path = write_video(tmp_path / "c.ts", [moving_square(i) for i in range(9)], codec="mpeg2video")
    options: list[str | Path] = ["--on-full", "wait", "--reconnect", "2", "--out", tmp_path / "a.npz"]
    with served(path.read_bytes(), path.read_bytes(), None) as (url, _):
        found, said = stream(capsys, url, cached, *options, code=1)
    assert f"error: {url} is lost" in said
    assert found["frames"] == 16  # the decoder holds one back of each nine
    assert found["lost"] == 2
    assert any("found again" in row["event"] for row in found["events"])
    with np.load(tmp_path / "a.npz", allow_pickle=False) as archive:
        assert len(archive["cls"]) == 16


def test_a_cut_a_black_frame_and_another_size_go_on_and_are_told(
    cached: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frames: list[Array] = [
        moving_square(0),
        moving_square(1),
        np.zeros((48, 64, 3), np.uint8),
        moving_square(2, (96, 128)),
    ]
    for number, pixels in enumerate(frames):
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    found, _ = stream(capsys, tmp_path, cached)
    assert found["whole_frames"] == {"first frame": 1, "scene cut": 1, "frame size changed": 1}
    assert found["resized"] == 1
