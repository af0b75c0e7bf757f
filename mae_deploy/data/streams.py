"""Tar shards that can only be read from front to back, from URLs, `pipe:` commands and compressed files, by the
WebDataset library.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import random
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mae_deploy.data.config import DataConfig
from mae_deploy.data.dataset import Batch, Sample, collate
from mae_deploy.data.decode import decode
from mae_deploy.data.order import RunSlice
from mae_deploy.data.sources.base import UNLABELLED
from mae_deploy.data.sources.members import (
    BESIDE,
    TWICE,
    arrays_beside,
    group_key,
    kind_of,
    kind_of_member,
    label_of,
    label_stem,
)
from mae_deploy.data.sources.patterns import expand
from mae_deploy.data.sources.pixels import LOOKED_AT, check_images
from mae_deploy.data.sources.shards import INDEX, read_label
from mae_deploy.data.transforms import Transform
from mae_deploy.data.workers import resolve_workers, worker_options
from mae_deploy.errors import ConfigError, import_optional
from mae_deploy.images.left_out import LeftOut
from mae_deploy.images.read import Array, readable
from mae_deploy.progress import notice
from mae_deploy.seeding import derive_seed, seed_everything

_TWICE_USED = "that came before under the same name, in a stream both used"

_LARGEST_SAMPLE = 64
"""Members that are held at a time to find labels among them: `scan.2023.000.jpg`, `scan.2023.001.jpg`, … are one sample
to WebDataset, and could be a whole shard.
"""


class ShardStream:
    """Shards shared out among processes and workers, mixed in a buffer, without end.

    Each worker's images are a function of the seed, the process and the worker; so a resumed run skips, without
    decoding, what was seen, and goes on with the same images on the same number of processes and workers.

    Raises:
        ConfigError: neither an `index.json` beside the shards nor the settings say how many images make an epoch.
    """

    def __init__(self, data: str, transform: Transform, config: DataConfig, *, seed: int) -> None:
        import_optional("webdataset", extra="train")
        self.name = data
        self.urls = tuple(expand(data))
        images = config.epoch_images or _counted(self.urls)
        if images is None:
            raise ConfigError(
                f"nobody has counted the images of {data}", hint="say with --epoch-images how many make an epoch"
            )
        self.epoch_images = images
        self.transform = transform
        self.config = config
        self.seed = seed

    def __len__(self) -> int:
        """Images of an epoch."""
        return self.epoch_images

    def stream(self, where: RunSlice, *, seed: int, num_workers: int, pin_memory: bool) -> Iterator[Batch]:
        """The micro-batches of a part of the run, for one process.

        Raises:
            ConfigError: fewer shards than processes.
        """
        if len(self.urls) < where.world_size:
            raise ConfigError(
                f"{len(self.urls)} shard(s) of {self.name} cannot be shared among {where.world_size} processes"
            )
        if where.batch_size % self.config.repeated_aug:
            raise ConfigError(
                f"--batch-size {where.batch_size} is not a multiple of --repeated-aug {self.config.repeated_aug}"
            )
        asked, most = resolve_workers(num_workers), len(self.urls) // where.world_size
        workers = min(asked, most)
        if workers < asked and where.rank == 0:
            notice(
                "workers:",
                f"{len(self.urls)} shard(s) on {where.world_size} process(es) keep {workers} of {asked} workers busy",
            )
        part = _Part(self.urls, self.transform, self.config, where, seed)
        return iter(DataLoader(part, batch_size=None, pin_memory=pin_memory, **worker_options(workers)))

    def fingerprint(self) -> dict[str, int | str]:
        """Images of an epoch, and a hash of the shards' names; what is in them is not read."""
        return {
            "images": len(self),
            "sha256": hashlib.sha256("\0".join(self.urls).encode()).hexdigest(),
            "workers": resolve_workers(self.config.num_workers),
        }

    def first(self, count: int) -> list[Image.Image | Array]:
        """The first few images of the first shard that can be read, for pictures."""
        spec = self.transform.spec
        found = readable(
            self._first_shard(),
            lambda raw: decode(raw.name, raw.content, spec.channels, spec.pixel_max),
            lambda *_: None,
        )
        return [image for _, image in islice(found, count)]

    def check_pixels(self) -> None:
        """Look at a few images of the first shard; see `check_images`."""
        spec = self.transform.spec
        raws = islice(self._first_shard(), LOOKED_AT)
        check_images(self.name, ((raw.name, raw.content) for raw in raws), spec.channels, spec.pixel_max)

    def _first_shard(self) -> Iterator[_Raw]:
        return _read_shards(iter(self.urls[:1]), _Said())


@dataclass(frozen=True, slots=True)
class _Raw:
    """One image as the shard holds it."""

    name: str
    content: bytes
    label: int


@dataclass(slots=True)
class _Said:
    """What there is to say since the last batch."""

    errors: list[str] = field(default_factory=list)
    left_out: LeftOut = field(default_factory=LeftOut)

    def add_to(self, batch: Batch) -> Batch:
        """The batch with it, which is then forgotten here."""
        told = batch._replace(unreadable=(*self.errors, *batch.unreadable), left_out=self.left_out)
        self.errors, self.left_out = [], LeftOut()
        return told


class _Part(IterableDataset[Batch]):
    """Every n-th micro-batch of one process, for one of n workers."""

    def __init__(
        self, urls: tuple[str, ...], transform: Transform, config: DataConfig, where: RunSlice, seed: int
    ) -> None:
        self.urls = urls
        self.transform = transform
        self.config = config
        self.where = where
        self.seed = seed

    def __iter__(self) -> Iterator[Batch]:
        """Batches of one lane: the loader takes the first from worker 0, so which lane a worker has depends on where
        the run goes on.
        """
        where, info = self.where, get_worker_info()
        workers, worker = (info.num_workers, info.id) if info is not None else (1, 0)
        lane = (where.start + worker) % workers
        said = _Said()
        shuffled = self._shuffled(lane, workers, said)
        images = where.batch_size // self.config.repeated_aug
        seen = len(range(lane, where.start, workers))
        for _ in itertools.islice(shuffled, seen * images):
            pass
        for number, _ in enumerate(range(where.start + worker, where.stop, workers), seen):
            raws = list(itertools.islice(shuffled, images))
            batch = collate(self._samples(raws, (where.rank, lane, number)) if raws else [])
            yield said.add_to(batch)
            if not raws:  # nothing could be read at all: the loop says so, with these lines
                return

    def _shuffled(self, lane: int, lanes: int, said: _Said) -> Iterator[_Raw]:
        from webdataset.filters import shuffle

        where = self.where
        raws = self._endless(where.rank + where.world_size * lane, where.world_size * lanes, said)
        generator = random.Random(derive_seed(self.seed, "buffer", where.rank, lane))
        buffer = self.config.shuffle_buffer
        mixed: Iterator[_Raw] = shuffle(buffer, initial=buffer, rng=generator)(raws)
        return mixed

    def _endless(self, part: int, parts: int, said: _Said) -> Iterator[_Raw]:
        """This part's images, pass after pass over all shards in a fresh order; ends after a pass in which none could
        be read.
        """
        for passes in itertools.count():
            order = np.random.default_rng(derive_seed(self.seed, "shards", passes)).permutation(len(self.urls))
            mine = [self.urls[index] for index in order[part::parts]]
            empty = True
            for raw in _read_shards(iter(mine), said):
                empty = False
                yield raw
            if empty:
                return

    def _samples(self, raws: list[_Raw], place: tuple[int, ...]) -> list[Sample]:
        """Views of each image; one that cannot be read gives its place to the next, so that a batch always takes as
        many from the stream.
        """
        spec, shrink = self.transform.spec, self.transform.shrink
        lines: list[str] = []
        images = list(
            readable(
                raws,
                lambda raw: decode(raw.name, raw.content, spec.channels, spec.pixel_max, shrink),
                lambda _, reason: lines.append(reason),
            )
        )
        samples = [] if images else [Sample(None, UNLABELLED, tuple(lines), raws[0].name)]
        for number in range(len(raws) * self.config.repeated_aug if images else 0):
            raw, image = images[number // self.config.repeated_aug % len(images)]
            seed_everything(derive_seed(self.seed, "augment", *place, number))
            samples.append(Sample(self.transform(image), raw.label, tuple(lines) if number == 0 else (), raw.name))
        return samples


def _counted(urls: tuple[str, ...]) -> int | None:
    """The images of these shards, as `index.json` beside them counts them, where it is there and knows them all."""
    from webdataset.gopen import gopen

    if any(url.startswith("pipe:") or "://" not in url for url in urls):
        return None
    folders = {url.rpartition("/")[0] for url in urls}
    counts: dict[str, int] = {}
    for folder in folders:
        try:
            with gopen(f"{folder}/{INDEX}") as file:
                index = json.loads(file.read())
            counts |= {f"{folder}/{entry['name']}": int(entry["images"]) for entry in index["shards"]}
        except Exception:  # of any kind: whoever wants an epoch counted without it says so
            return None
    return sum(counts[url] for url in urls) if counts.keys() >= set(urls) else None


def _read_shards(urls: Iterator[str], said: _Said) -> Iterator[_Raw]:
    """The images of some shards, one shard after the other; a broken shard is named, and left where it breaks."""
    from webdataset.gopen import gopen

    for url in urls:
        names, place, sample = set[str](), "", dict[str, bytes]()
        try:
            with _closing(gopen(url)) as stream, tarfile.open(fileobj=stream, mode="r|*") as tar:
                for member in tar:
                    tar.members = []  # type: ignore[attr-defined]  # else it keeps every header
                    if member.isdir():
                        continue
                    name, kind = kind_of_member(member, said.left_out)
                    if kind not in ("image", "label"):
                        continue
                    if sample and (group_key(name) != place or len(sample) == _LARGEST_SAMPLE):
                        yield from _images_of(url, sample, said)
                        sample = {}
                    if name in names:
                        said.left_out.add(TWICE if name in sample else _TWICE_USED, name)
                    names.add(name)
                    place, sample[name] = group_key(name), _content(tar, member)
        except Exception as error:  # of any kind, from the network or a command
            said.errors.append(f"{url}: {' '.join(str(error).split())}")
        yield from _images_of(url, sample, said)


@contextlib.contextmanager
def _closing(stream: Any) -> Iterator[Any]:
    """webdataset raises where a command is stopped before its end, as one that is not read further is."""
    try:
        yield stream
    finally:
        with contextlib.suppress(Exception):
            stream.close()


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None  # a regular file
    return file.read()


def _images_of(url: str, sample: dict[str, bytes], said: _Said) -> Iterator[_Raw]:
    """The images among members that follow one another and are called the same up to the first dot."""
    labels: dict[str, int] = {}
    for name in (name for name in sample if kind_of(name) == "label"):
        try:
            labels[label_stem(name)] = read_label(sample[name], f"{url}/{name}")
        except ConfigError as error:
            said.errors.append(str(error))
    images = [name for name in sample if kind_of(name) == "image"]
    beside = arrays_beside(images)
    for name in images:
        if name in beside:
            said.left_out.add(BESIDE, name)
        else:
            yield _Raw(f"{url}/{name}", sample[name], label_of(name, labels))
