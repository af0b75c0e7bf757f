"""From the images of a request to what was computed of each: decoded beside the event loop, computed in batches."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np

from mae_deploy.commands.serve.batching import Answer, QueueFull
from mae_deploy.commands.serve.metrics import Metrics
from mae_deploy.commands.serve.served import Serving
from mae_deploy.commands.serve.uploads import Item, Refused
from mae_deploy.errors import MaeDeployError
from mae_deploy.images.arrays import Array
from mae_deploy.images.limits import TooManyPixels
from mae_deploy.images.read import UnreadableImage
from mae_deploy.runtime.inputs import patch_indices, token_batch
from mae_deploy.runtime.predict import check_num_keep
from mae_deploy.seeding import random_patches


@dataclass(frozen=True, slots=True)
class Computed:
    """An image, and what was computed of it."""

    pixels: Array
    """What the network saw, `(H, W, C)`."""
    keep: Array | None
    """Of which patches, `(K,)`; None: all."""
    answer: Answer
    decoded: float
    """Seconds that reading and cropping took."""


class Computer:
    """What images are decoded and computed with."""

    def __init__(self, decoders: Executor, metrics: Metrics) -> None:
        self._decoders, self._metrics = decoders, metrics

    async def crop(self, serving: Serving, item: Item) -> Array:
        """What the network sees of an image, `(H, W, C)`.

        Raises:
            Refused: it cannot be read.
        """
        return await asyncio.get_running_loop().run_in_executor(self._decoders, _crop, serving, item)

    async def compute(
        self, name: str, serving: Serving, item: Item, keep: Array | None, outputs: Sequence[str]
    ) -> Computed | Refused:
        """The outputs of one image, or why there are none."""
        started = time.monotonic()
        try:
            pixels = await self.crop(serving, item)
            decoded = time.monotonic() - started
            answer = await serving.batcher.compute(pixels, keep, outputs)
        except Refused as refused:
            found = refused
        except QueueFull as error:
            found = Refused(503, str(error))
        except MaeDeployError as error:
            found = Refused(500, str(error))
        else:
            if not all(np.isfinite(value).all() for value in answer.features.values()):
                return self._count(name, Refused(500, "the outputs have NaN or infinite values: run mae-deploy verify"))
            for stage, seconds in (("decode", decoded), ("queue", answer.queued), ("engine", answer.computed)):
                self._metrics.stages.labels(name, stage).observe(seconds)
            self._metrics.images.labels(name, "computed").inc()
            return Computed(pixels, keep, answer, decoded)
        return self._count(name, found)

    def _count(self, name: str, refused: Refused) -> Refused:
        self._metrics.images.labels(name, f"refused {refused.status}").inc()
        return refused


def _crop(serving: Serving, item: Item) -> Array:
    preprocess = serving.backbone.preprocess
    try:
        return preprocess.crop(preprocess.read(item.read()))
    except UnreadableImage as error:
        raise Refused(413 if isinstance(error.__cause__, TooManyPixels) else 415, str(error)) from error
    except (MaeDeployError, OSError) as error:  # a package that this file needs; a file that is gone
        raise Refused(415, str(error)) from error


def chosen_patches(
    serving: Serving, keep: str | None, num_keep: int | None, seed: int, count: int
) -> list[Array] | list[None]:
    """The patches that a request wants to be seen, `(K,)` of each image; None: all, of bundles that reconstruct a
    quarter.

    Raises:
        ConfigError: patches that this bundle cannot take.
    """
    bundle = serving.backbone.bundle
    least, most = bundle.keep_range
    if keep is None and num_keep is None and bundle.token_mode == "reconstruct":
        num_keep = min(max(bundle.num_patches // 4, least), most)
    if num_keep is not None:
        check_num_keep(serving.backbone, keep, num_keep)
        return list(random_patches(bundle.num_patches, num_keep, range(count), seed))
    if keep is None:
        token_batch(bundle, None, None, 1)
        return [None] * count
    indices = patch_indices(keep, bundle)
    token_batch(bundle, indices, None, 1)
    return [np.asarray(indices, np.int64)] * count
