"""`mae-deploy data stats`: mean and deviation of every channel, sizes, formats, duplicates and broken files."""

from __future__ import annotations

import io
import warnings
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mae_deploy.commands.data.config import StatsConfig
from mae_deploy.commands.data.survey import Seen, pixel_hash, surveying
from mae_deploy.data.config import Columns
from mae_deploy.data.decode import decode
from mae_deploy.data.sources.base import ImageSource
from mae_deploy.data.sources.open import unlabelled_images
from mae_deploy.data.sources.pixels import check_pixels
from mae_deploy.data.sources.splits import announce
from mae_deploy.errors import CheckFailed
from mae_deploy.images.read import Array, UnreadableImage
from mae_deploy.progress import progress
from mae_deploy.reporting.tables import facts_table
from mae_deploy.results import Result
from mae_deploy.seeding import derive_seed

_LISTED = 20
"""Broken and repeated images that are listed at most."""


class _Found(NamedTuple):
    """One image."""

    key: str
    error: str | None = None
    format: str = ""
    size: tuple[int, int] = (0, 0)
    """Width and height."""
    numbers: Array | None = None
    """Mean, variance, smallest and largest number of each channel, `(4, C)`."""
    pixels: str = ""


def run_stats(config: StatsConfig) -> Result:
    """Read the images and sum up.

    Raises:
        CheckFailed: not one can be read.
    """
    source = unlabelled_images(config.data, Columns(image=config.image_column))
    announce(config.data, {"": source})
    check_pixels(source, config.in_chans, config.pixel_max)
    indices: Sequence[int] = range(len(source))
    if config.sample is not None and config.sample < len(source):
        drawn = np.random.default_rng(derive_seed(config.seed, "sample")).choice(
            len(source), config.sample, replace=False
        )
        indices = sorted(map(int, drawn))
    total = _Sums()
    with (
        surveying(partial(_look, source, config), config.num_workers) as survey,
        progress("stats", len(indices)) as bar,
    ):
        for found in survey(indices):
            total.add(found)
            bar.advance()
    if not total.numbers:
        raise CheckFailed(f"none of the {len(indices)} images of {config.data} can be read", hint=total.unreadable[0])
    data = {
        "data": config.data,
        "images": len(source),
        "read": len(indices),
        **total.report(),
        "left_out": source.left_out.counts,
        "fingerprint": source.fingerprint()["sha256"],
    }
    return Result(data, facts_table(f"{config.data}", _shown(data)))


class _Sums:
    """What is known so far; every image counts the same, whatever its size."""

    def __init__(self) -> None:
        self.numbers: list[Array] = []
        self.formats: Counter[str] = Counter()
        self.sizes: list[tuple[int, int]] = []
        self.unreadable: list[str] = []
        self.repeated: list[tuple[str, str]] = []
        self.seen = Seen(near=False)

    def add(self, found: _Found) -> None:
        """Count one image."""
        if found.numbers is None:
            self.unreadable.append(str(found.error))
            return
        self.numbers.append(found.numbers)
        self.formats[found.format] += 1
        self.sizes.append(found.size)
        if (first := self.seen.add(found.key, found.pixels, 0)) is not None:
            self.repeated.append((found.key, first))

    def report(self) -> dict[str, Any]:
        """As JSON."""
        means, variances, lowest, highest = np.array(self.numbers).transpose(1, 0, 2)
        mean, std = means.mean(axis=0), np.sqrt(variances.mean(axis=0) + means.var(axis=0))
        (constant,) = np.nonzero(lowest.min(axis=0) == highest.max(axis=0))
        std[constant] = 0
        sizes = np.array(self.sizes)
        short = np.sort(sizes.min(axis=1))
        return {
            "mean": [float(f"{value:.6g}") for value in mean],
            "std": [float(f"{value:.6g}") for value in std],
            "constant": constant.tolist(),
            "flags": f"--mean {_flag(mean)} --std {_flag(np.where(std > 0, std, 1))}",
            "formats": dict(self.formats.most_common()),
            "width": _spread(sizes[:, 0]),
            "height": _spread(sizes[:, 1]),
            "short_side": _spread(short),
            "duplicates": len(self.repeated),
            "duplicates_listed": [f"{key} = {first}" for key, first in self.repeated[:_LISTED]],
            "unreadable": len(self.unreadable),
            "unreadable_listed": self.unreadable[:_LISTED],
        }


def _look(source: ImageSource, config: StatsConfig, index: int) -> _Found:
    key = source.key(index)
    try:
        content = source.raw(index)
        image = decode(key, content, config.in_chans, config.pixel_max)
    except UnreadableImage as error:
        return _Found(key, str(error))
    pixels = np.asarray(image)
    pixels = pixels.reshape(*pixels.shape[:2], config.in_chans)
    planes = (pixels[..., channel].astype(np.float64) / (config.pixel_max or 255) for channel in range(config.in_chans))
    numbers = [(plane.mean(), plane.var(), plane.min(), plane.max()) for plane in planes]
    height, width, _ = pixels.shape
    return _Found(key, None, _format(key, content), (width, height), np.array(numbers).T, pixel_hash(image))


def _format(key: str, content: bytes) -> str:
    """Pillow's name of the format and the mode that the file is stored in, or the suffix."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content)) as image:
                return f"{image.format} {image.mode}"
    except Exception:  # an array, which Pillow does not know
        return Path(key).suffix.lstrip(".").upper()


def _spread(values: Array) -> list[int]:
    return [int(values.min()), int(np.median(values)), int(values.max())]


def _flag(values: Array) -> str:
    return ",".join(f"{value:.4g}" for value in values)


def _shown(data: dict[str, Any]) -> dict[str, object]:
    spread = {
        name: "{} to {}, median {}".format(*(data[name][place] for place in (0, 2, 1)))
        for name in ("width", "height", "short_side")
    }
    return {
        "images": f"{data['images']}" + (f", {data['read']} of them read" if data["read"] < data["images"] else ""),
        "formats": ", ".join(f"{name} {count}" for name, count in data["formats"].items()),
        **{name.replace("_", " "): value for name, value in spread.items()},
        "duplicates": "\n".join([str(data["duplicates"]), *data["duplicates_listed"]]),
        "unreadable": "\n".join([str(data["unreadable"]), *data["unreadable_listed"]]),
        "mean, std": data["flags"],
        **(
            {
                "constant": "\n".join(
                    f"channel {channel} (counted from 0) is constant: leave it out" for channel in data["constant"]
                )
            }
            if data["constant"]
            else {}
        ),
    }
