"""Samples and batches: decode, augment, stack as uint8; unreadable files are named, not fatal."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mae_deploy.data.order import Key, RunSlice, StreamSampler
from mae_deploy.data.sources.base import ImageSource
from mae_deploy.data.sources.pixels import check_pixels
from mae_deploy.data.transforms import Transform
from mae_deploy.data.workers import worker_options
from mae_deploy.errors import ConfigError
from mae_deploy.images.left_out import LeftOut
from mae_deploy.images.preprocess import require_readers
from mae_deploy.images.read import Array, readable
from mae_deploy.seeding import derive_seed, seed_everything

_REPLACEMENTS = 64
"""Neighbours that are tried in the place of an unreadable training image."""


class Sample(NamedTuple):
    """An image, its label, its name, and the unreadable files that were met on the way."""

    image: Tensor | None
    """uint8 `(C, H, W)`, or a pair of such; None where it cannot be read."""
    label: int
    unreadable: tuple[str, ...]
    name: str
    item: int = -1
    """Number of the image in its data set; -1 where a stream has none."""
    view: int = 0
    """Number among the image's fixed views."""


class Batch(NamedTuple):
    """Samples stacked."""

    images: Tensor
    """uint8 `(B, C, H, W)`, of pairs `(B, 2, C, H, W)`; float32 or uint16 where the files hold that."""
    labels: Tensor
    """int64 `(B,)`."""
    unreadable: tuple[str, ...]
    names: tuple[str, ...]
    """The file, or the key in its shard, of each image."""
    items: Tensor
    """int64 `(B,)`: number of each image in its data set; -1 where a stream has none."""
    views: Tensor
    """int64 `(B,)`: number of each among the image's fixed views; 0 where every epoch has views of its own."""
    left_out: LeftOut | None = None
    """What a stream has left out since the batch before; sets that are known beforehand say it at the start."""


class TrainImages(Protocol):
    """What the loop trains on."""

    @property
    def name(self) -> str:
        """Folder or shard pattern, for messages."""
        ...

    def __len__(self) -> int:
        """Samples of an epoch."""
        ...

    def stream(self, where: RunSlice, *, seed: int, num_workers: int, pin_memory: bool) -> Iterator[Batch]:
        """The micro-batches of a part of the run, for one process."""
        ...


class ImageDataset(Dataset[Sample]):
    """Decode, augment, hand over as uint8.

    Args:
        replace_unreadable: put the next readable image in the place of a broken one (training); otherwise the sample
            comes without an image (evaluation must not count one image twice).
        cache: keep decoded images in memory.
        views: samples of each image that follow one another (repeated augmentation); it is decoded once for them all.
        fixed_views: augmentations of each image in all, which the epochs take in turn; 0: every epoch draws its own.
        earlier: give pairs `(2, C, H, W)`, one of so many images before it and the image itself, cropped and flipped
            alike; where there is none, or it cannot be read, the image twice. 0: the image alone.

    Raises:
        ConfigError: fewer fixed views than views in a batch, or pixels that are not of the kind that is expected.
    """

    def __init__(
        self,
        images: ImageSource,
        transform: Transform,
        *,
        seed: int,
        replace_unreadable: bool,
        cache: bool = False,
        views: int = 1,
        fixed_views: int = 0,
        earlier: int = 0,
    ) -> None:
        if 0 < fixed_views < views:
            raise ConfigError(
                f"--fixed-views {fixed_views} is less than --repeated-aug {views}",
                hint="a batch would hold the same view twice",
            )
        require_readers(map(images.key, range(len(images))), transform.spec)
        check_pixels(images, transform.spec.channels, transform.spec.pixel_max)
        self.images = images
        self.transform = transform
        self.seed = seed
        self.replace_unreadable = replace_unreadable
        self.views = views
        self.fixed_views = fixed_views
        self.earlier = earlier
        self._cache: dict[int, Image.Image | Array] = {}
        self._cached = len(images) if cache else 1 if views > 1 else 0

    @property
    def name(self) -> str:
        """Folder or shard pattern, for messages."""
        return self.images.name

    def __len__(self) -> int:
        """Number of images, and so the samples of an epoch."""
        return len(self.images)

    def __getitem__(self, key: Key) -> Sample:
        """Draw one sample; without an image where it, or every one of its would-be replacements, is unreadable."""
        unreadable: list[str] = []
        tries = min(len(self), _REPLACEMENTS) if self.replace_unreadable else 1
        places = ((key.item + offset) % len(self) for offset in range(tries))
        for index, image in readable(places, self._read, lambda _, reason: unreadable.append(reason)):
            view, draw = self._draw(key, index)
            pixels = self._augmented(image, draw)
            if self.earlier:
                pixels = torch.stack([self._augmented(self._before(image, index, draw), draw), pixels])
            return Sample(pixels, self.images.labels[index], tuple(unreadable), self.images.key(index), index, view)
        # Not raised: an error in a worker process arrives as a page of traceback.
        return Sample(None, self.images.labels[key.item], tuple(unreadable), self.images.key(key.item))

    def stream(self, where: RunSlice, *, seed: int, num_workers: int, pin_memory: bool) -> Iterator[Batch]:
        """The micro-batches of a part of the run, for one process: the same effective batches on any number of
        processes.
        """
        sampler = StreamSampler(len(self), where, seed=seed, views=self.views)
        return iter(
            DataLoader(
                self, batch_sampler=sampler, collate_fn=collate, pin_memory=pin_memory, **worker_options(num_workers)
            )
        )

    def fingerprint(self) -> dict[str, int | str]:
        """Tells this data set from others; see the source's."""
        return self.images.fingerprint()

    def first(self, count: int) -> list[Image.Image | Array]:
        """The first few images that can be read, for pictures."""
        spec = self.transform.spec
        found = readable(
            range(len(self)), lambda index: self.images.read(index, spec.channels, spec.pixel_max), lambda *_: None
        )
        return [image for _, image in islice(found, count)]

    def _augmented(self, image: Image.Image | Array, draw: tuple[int, ...]) -> Tensor:
        seed_everything(derive_seed(self.seed, "augment", *draw))
        return self.transform(image)

    def _before(self, image: Image.Image | Array, index: int, draw: tuple[int, ...]) -> Image.Image | Array:
        """One of the few images before this one."""
        place = index - 1 - derive_seed(self.seed, "earlier", *draw) % self.earlier
        found = readable([place] if place >= 0 else [], self._read, lambda *_: None)
        return next((earlier for _, earlier in found), image)

    def _draw(self, key: Key, index: int) -> tuple[int, tuple[int, ...]]:
        """The number of the fixed view, and what the augmentation of an image depends on."""
        if self.fixed_views:
            view = (key.epoch * self.views + key.view) % self.fixed_views
            return view, (
                view,
                index,
            )  # the image that is there: in the place of a broken one, too, a view looks as it always does
        return 0, (key.epoch, key.item, *((key.view,) if key.view else ()))

    def _read(self, index: int) -> Image.Image | Array:
        if index not in self._cache:
            spec = self.transform.spec
            image = self.images.read(index, spec.channels, spec.pixel_max, self.transform.shrink)
            if self._cached == 0:
                return image
            if len(self._cache) == self._cached:
                self._cache.clear()
            self._cache[index] = image
        return self._cache[index]


def collate(samples: list[Sample]) -> Batch:
    """Stack the samples that have an image."""
    readable = [sample for sample in samples if sample.image is not None]
    images = (
        torch.stack([sample.image for sample in readable if sample.image is not None])
        if readable
        else torch.empty(0, 0, 0, 0, dtype=torch.uint8)
    )
    labels, items, views = (
        torch.tensor([(sample.label, sample.item, sample.view) for sample in readable], dtype=torch.int64)
        .reshape(-1, 3)
        .unbind(1)
    )
    unreadable = tuple(line for sample in samples for line in sample.unreadable)
    return Batch(
        images,
        labels.contiguous(),
        unreadable,
        tuple(sample.name for sample in readable),
        items.contiguous(),
        views.contiguous(),
    )


def eval_loader(
    dataset: ImageDataset,
    *,
    batch_size: int,
    num_workers: int,
    rank: int = 0,
    world_size: int = 1,
    at_most: int | None = None,
) -> DataLoader[Sample]:
    """Every image once, or the first so many, in order; each process takes its share."""
    count = len(dataset) if at_most is None else min(len(dataset), at_most)
    keys = [Key(0, index) for index in range(rank, count, world_size)]
    batches = [keys[first : first + batch_size] for first in range(0, len(keys), batch_size)]
    return DataLoader(dataset, batch_sampler=batches, collate_fn=collate, **worker_options(num_workers))
