"""What DATA stands for, and who has which id."""

from __future__ import annotations

from pathlib import Path

import pytest

from mae_deploy.data.config import Columns
from mae_deploy.embedding.images import Collection, Indexed, Streams, Videos, open_collection
from mae_deploy.errors import ConfigError
from mae_deploy.images.preprocess import default_preprocess
from mae_deploy.images.read import UnreadableImage
from tests.data.image_folders import write_noise


def opened(data: Path | str, every: int | None = None) -> Collection:
    return open_collection(str(data), Columns(), every=every, shard_images=4)


def test_what_data_stands_for(tmp_path: Path) -> None:
    write_noise(tmp_path / "both", 11)
    (tmp_path / "both" / "clip.MP4").write_bytes(b"")
    (tmp_path / "clips" / "below").mkdir(parents=True)
    for name in ("b.mp4", "below/a.avi", ".hidden.mp4"):
        (tmp_path / "clips" / name).write_bytes(b"")
    images = opened(tmp_path / "both")
    assert isinstance(images, Indexed)
    assert (images.num_images, images.num_parts) == (11, 3)
    assert [item.id for item in images.items(2)] == [8, 9, 10]
    for data, every, count in (("both", 2, 1), ("clips", None, 2), ("clips/b.mp4", None, 1), ("clips/*.mp4", None, 1)):
        videos = opened(tmp_path / data, every)
        assert isinstance(videos, Videos)
        assert (videos.num_parts, videos.every) == (count, every or 1)
    streams = opened("https://images.example/{0..6}.tar")
    assert isinstance(streams, Streams)
    assert (streams.num_parts, streams.num_images) == (7, None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no images below"):
        opened(tmp_path / "empty")


def test_a_video_that_is_none_is_an_image_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"no video")
    videos = opened(tmp_path / "a.mp4")
    assert isinstance(videos, Videos)
    (item,) = videos.items(0)
    assert (item.id, item.key) == (0, str(tmp_path / "a.mp4"))
    with pytest.raises(UnreadableImage, match=r"a\.mp4"):
        item.read(default_preprocess((8, 8)))


def test_another_size_is_another_collection(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"one")
    before = opened(tmp_path / "a.mp4").fingerprint()
    (tmp_path / "a.mp4").write_bytes(b"longer")
    assert opened(tmp_path / "a.mp4").fingerprint() != before
