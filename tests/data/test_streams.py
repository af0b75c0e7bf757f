"""Streams start anywhere with the same images, share them out among processes and workers, and go on behind what is
broken.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mae_deploy.data.config import CropConfig, DataConfig
from mae_deploy.data.dataset import Batch
from mae_deploy.data.order import RunSlice
from mae_deploy.data.sources.shards import scan
from mae_deploy.data.streams import ShardStream
from mae_deploy.data.training_set import open_training
from mae_deploy.data.transforms import train_transform
from mae_deploy.errors import ConfigError
from mae_deploy.images.preprocess import default_preprocess
from tests.data.sources.tiny_shards import shards_of, write_shard


@pytest.fixture
def pipe(images: Path, tmp_path: Path) -> str:
    """Four shards of three, three, three and two images."""
    return f"pipe:cat {shards_of(images, tmp_path / 'shards', per_shard=3)}/shard-{{0..3}}.tar"


def opened(data: str, **settings: Any) -> ShardStream:
    config = DataConfig(**{"epoch_images": 11, "shuffle_buffer": 3, "num_workers": 0, **settings})
    stream = open_training(data, train_transform(default_preprocess((10, 15)), CropConfig()), config, seed=3)
    assert isinstance(stream, ShardStream)
    return stream


def batches(stream: ShardStream, where: RunSlice, *, num_workers: int = 0) -> list[Batch]:
    return list(stream.stream(where, seed=5, num_workers=num_workers, pin_memory=False))


def names(found: list[Batch]) -> list[str]:
    return [name.rpartition("/")[2] for batch in found for name in batch.names]


def test_each_pass_sees_every_image_in_a_fresh_order(pipe: str) -> None:
    seen = names(batches(opened(pipe, shuffle_buffer=1), RunSlice(1, 11, 0, 33)))
    passes = [seen[first : first + 11] for first in (0, 11, 22)]
    assert all(sorted(found) == [f"{number:04d}.png" for number in range(11)] for found in passes)
    assert len(set(map(tuple, passes))) > 1
    found = batches(opened(pipe, shuffle_buffer=8), RunSlice(1, 11, 0, 11))
    assert [(batch.items.tolist(), batch.views.tolist()) for batch in found] == [
        ([-1], [0])
    ] * 11  # nobody knows their numbers
    mixed = names(found)
    assert mixed != passes[0]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")  # where there is one core
def test_every_start_gives_the_tail(pipe: str, num_workers: int) -> None:
    whole = batches(opened(pipe), RunSlice(2, 5, 0, 9), num_workers=num_workers)
    assert len(whole) == 9
    for start in (1, 4) if num_workers == 0 else (3,):
        tail = batches(opened(pipe), RunSlice(2, 5, start, 9), num_workers=num_workers)
        assert names(tail) == names(whole[start:])
        assert all(torch.equal(a.images, b.images) for a, b in zip(tail, whole[start:], strict=True))


def test_processes_read_different_shards(pipe: str) -> None:
    where = [RunSlice(1, 5, 0, 4, rank, 2) for rank in range(2)]
    shares = [
        {name.rpartition("/")[0] for batch in batches(opened(pipe, shuffle_buffer=1), part) for name in batch.names}
        for part in where
    ]
    assert shares[0].isdisjoint(shares[1])
    with pytest.raises(ConfigError, match=r"4 shard\(s\) of pipe:cat .* cannot be shared among 5 processes"):
        opened(pipe).stream(RunSlice(1, 2, 0, 2, 0, 5), seed=0, num_workers=0, pin_memory=False)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_no_more_workers_than_shards(pipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(batches(opened(pipe), RunSlice(1, 5, 0, 3, 0, 4), num_workers=3)) == 3
    assert "keep 1 of 3 workers busy" in capsys.readouterr().err


def test_what_is_broken_is_named_and_passed_over(images: Path, tmp_path: Path) -> None:
    png = (images / "a" / "00.png").read_bytes()
    whole = write_shard(tmp_path / "whole.tar", [("0.png", png), ("1.png", png[:60]), ("2.png", png), ("3.txt", b"")])
    cut = tmp_path / "cut.tar"
    cut.write_bytes(whole.read_bytes()[:800])
    found = batches(opened(f"pipe:cat {tmp_path}/{{whole,cut,gone}}.tar", shuffle_buffer=1), RunSlice(3, 1, 0, 2))
    assert [len(batch.images) for batch in found] == [3, 3]
    assert set(names(found)) == {"0.png", "2.png"}
    lines = {line for batch in found for line in batch.unreadable}
    for file in ("whole.tar/1.png", "cut.tar", "gone.tar"):
        assert any(file in line for line in lines), lines


def test_nothing_can_be_read(tmp_path: Path) -> None:
    (batch,) = batches(opened(f"pipe:cat {tmp_path}/gone.tar"), RunSlice(3, 1, 0, 2))
    assert len(batch.images) == 0
    assert "gone.tar" in batch.unreadable[0]


def test_repeated_views_of_a_stream(pipe: str) -> None:
    (batch,) = batches(opened(pipe, repeated_aug=2), RunSlice(6, 1, 0, 1))
    assert batch.names[::2] == batch.names[1::2]
    assert len(set(batch.names)) == 3
    assert not torch.equal(batch.images[0], batch.images[1])
    with pytest.raises(ConfigError, match="--batch-size 5 is not a multiple of --repeated-aug 2"):
        opened(pipe, repeated_aug=2).stream(RunSlice(5, 1, 0, 1), seed=0, num_workers=0, pin_memory=False)


def test_somebody_must_say_how_long_an_epoch_is(pipe: str) -> None:
    with pytest.raises(ConfigError, match="nobody has counted") as caught:
        opened(pipe, epoch_images=None)
    assert "--epoch-images" in str(caught.value.hint)
    assert len(opened(pipe)) == 11
    assert opened(pipe).fingerprint() != opened(pipe.replace("0..3", "0..2")).fingerprint()


def test_an_index_beside_the_shards_counts_them(images: Path, tmp_path: Path) -> None:
    shards = shards_of(images, tmp_path / "shards")
    url = f"file://{shards}/shard-{{0..1}}.tar"
    with pytest.raises(ConfigError, match="nobody has counted"):
        opened(url, epoch_images=None)
    entries = [scan(path).entry() for path in sorted(shards.glob("*.tar"))]
    (shards / "index.json").write_text(json.dumps({"format": 1, "shards": entries}))
    assert len(opened(url, epoch_images=None)) == 8
    assert len(opened(url, epoch_images=5)) == 5
    assert sorted(names(batches(opened(url, epoch_images=None), RunSlice(1, 8, 0, 8)))) == [
        f"{number:04d}.png" for number in range(8)
    ]


def test_pictures_are_of_the_first_shard(pipe: str) -> None:
    assert [getattr(image, "size", None) for image in opened(pipe).first(2)] == [(13, 17)] * 2
