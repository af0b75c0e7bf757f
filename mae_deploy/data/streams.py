"""Tar shards that can only be read from front to back, from URLs, `pipe:` commands and compressed files, by the
WebDataset library.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Iterator
from itertools import islice

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mae_deploy.data.config import DataConfig
from mae_deploy.data.dataset import Batch, Sample, collate
from mae_deploy.data.decode import decode
from mae_deploy.data.order import RunSlice
from mae_deploy.data.sources.base import UNLABELLED
from mae_deploy.data.sources.patterns import expand
from mae_deploy.data.sources.pixels import LOOKED_AT, check_images
from mae_deploy.data.sources.shards import INDEX
from mae_deploy.data.sources.streamed import Raw, Said, read_shards
from mae_deploy.data.transforms import Transform
from mae_deploy.data.workers import resolve_workers, worker_options
from mae_deploy.errors import ConfigError, import_optional
from mae_deploy.images.read import Array, readable
from mae_deploy.progress import notice
from mae_deploy.seeding import derive_seed, seed_everything


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

    def _first_shard(self) -> Iterator[Raw]:
        return read_shards(iter(self.urls[:1]), Said())


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
        said = Said()
        shuffled = self._shuffled(lane, workers, said)
        images = where.batch_size // self.config.repeated_aug
        seen = len(range(lane, where.start, workers))
        for _ in itertools.islice(shuffled, seen * images):
            pass
        for number, _ in enumerate(range(where.start + worker, where.stop, workers), seen):
            raws = list(itertools.islice(shuffled, images))
            batch = collate(self._samples(raws, (where.rank, lane, number)) if raws else [])
            yield _with_said(batch, said)
            if not raws:  # nothing could be read at all: the loop says so, with these lines
                return

    def _shuffled(self, lane: int, lanes: int, said: Said) -> Iterator[Raw]:
        from webdataset.filters import shuffle

        where = self.where
        raws = self._endless(where.rank + where.world_size * lane, where.world_size * lanes, said)
        generator = random.Random(derive_seed(self.seed, "buffer", where.rank, lane))
        buffer = self.config.shuffle_buffer
        mixed: Iterator[Raw] = shuffle(buffer, initial=buffer, rng=generator)(raws)
        return mixed

    def _endless(self, part: int, parts: int, said: Said) -> Iterator[Raw]:
        """This part's images, pass after pass over all shards in a fresh order; ends after a pass in which none could
        be read.
        """
        for passes in itertools.count():
            order = np.random.default_rng(derive_seed(self.seed, "shards", passes)).permutation(len(self.urls))
            mine = [self.urls[index] for index in order[part::parts]]
            empty = True
            for raw in read_shards(iter(mine), said):
                empty = False
                yield raw
            if empty:
                return

    def _samples(self, raws: list[Raw], place: tuple[int, ...]) -> list[Sample]:
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


def _with_said(batch: Batch, said: Said) -> Batch:
    """The batch with what was said since the one before."""
    errors, left_out = said.take()
    return batch._replace(unreadable=(*errors, *batch.unreadable), left_out=left_out)


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
