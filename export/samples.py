"""The images on which parity is checked: the user's own, and a stand-in only where there are none."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mae_deploy.checkpoint import Metadata
from mae_deploy.errors import ConfigError
from mae_deploy.files import sha256
from mae_deploy.images.find import find_images
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.images.read import Array, readable
from mae_deploy.progress import notice
from mae_deploy.runtime.cache import take_patches
from mae_deploy.runtime.manifest import IDS_KEEP, NUM_KEEP, UPDATES
from mae_deploy.runtime.profiles import Range


@dataclass(frozen=True, slots=True)
class Samples:
    """Cropped images, and where they come from."""

    pixels: Array
    """`(S, H, W, C)`, uint8, or float32 where the specification has `pixel_max`."""
    place: Path | None
    """Their folder; None: synthetic."""
    paths: tuple[Path, ...] = ()
    """The files, where there are any."""

    def __getitem__(self, part: slice) -> Samples:
        """Some of them."""
        return replace(self, pixels=self.pixels[part], paths=self.paths[part])

    def __len__(self) -> int:
        """How many images."""
        return len(self.pixels)

    @property
    def source(self) -> str:
        """How many of where."""
        return f"{len(self)} " + (
            "synthetic images with a 1/f spectrum" if self.place is None else f"images of {self.place}"
        )


def read_samples(folder: Path | None, metadata: Metadata, spec: Preprocess, count: int, most: int = 0) -> Samples:
    """Up to `count` images from a folder, else from the data of the checkpoint, else synthetic ones, which is said
    aloud; and behind them more, up to `most` in all, where there are files.

    Raises:
        ConfigError: the folder that was asked for has no readable image.
    """
    if folder is not None:
        if found := _read(find_images(folder), spec, count, most, folder):
            return found
        raise ConfigError(f"no readable image below --samples {folder}")
    for place in _data_folders(metadata.provenance):
        if found := _read(_images_left(place), spec, count, most, place):
            return found
    notice("no images at hand:", "parity is checked on synthetic ones; pass --samples FOLDER for real ones")
    return Samples(_synthetic(spec, count), None)


def spread_first(paths: list[Path], count: int) -> list[Path]:
    """First `count` paths spread over all, so that not one class alone is seen; then the others, which stand in for
    files that cannot be read.
    """
    spread = (
        [paths[round(index * (len(paths) - 1) / max(count - 1, 1))] for index in range(count)]
        if len(paths) > count
        else paths
    )
    return list(dict.fromkeys([*spread, *paths]))


def token_inputs(mode: str, num_patches: int, keep: Range, count: int, seed: int) -> dict[str, Array]:
    """Random `ids_keep (S, K)`, int64, with K = opt of `keep`; in ragged mode padded to its max, with `num_keep (S,)`
    from its min to its max.

    The padding of a ragged batch holds garbage on purpose: it must not matter.
    """
    rng = np.random.default_rng(seed)
    least, usual, most = keep
    if mode != "ragged":
        return {IDS_KEEP: np.stack([rng.permutation(num_patches)[:usual] for _ in range(count)]).astype(np.int64)}
    lengths = rng.integers(least if least < most else 1, most, size=count, endpoint=True)
    lengths[0] = most
    lengths[-1] = least if least < most or count == 1 else 1
    ids = rng.integers(np.iinfo(np.int64).min, np.iinfo(np.int64).max, size=(count, most))
    for row, length in zip(ids, lengths, strict=True):
        row[:length] = rng.permutation(num_patches)[:length]
    return {IDS_KEEP: ids, NUM_KEEP: lengths.astype(np.int64)}


def update_inputs(num_patches: int, keep: Range, count: int, seed: int) -> dict[str, Array]:
    """What streams are given: `ids_keep (S, M)`, int64, of three updates, and `updates (S, 3)`, how many patches each
    takes: as many as can be, then twice K = opt of `keep`.
    """
    rng = np.random.default_rng(seed)
    _, usual, most = keep
    lengths = (most, usual, usual)
    rows = [np.concatenate([rng.permutation(num_patches)[:length] for length in lengths]) for _ in range(count)]
    return {IDS_KEEP: np.stack(rows).astype(np.int64), UPDATES: np.tile(np.array(lengths, np.int64), (count, 1))}


def every_patch(num_patches: int, length: int, seed: int) -> Array:
    """Rows of `length` patches, int64 `(R, length)`, as few as have each of them; of one row each is another."""
    order = np.random.default_rng(seed).permutation(num_patches)
    return np.resize(order, (-(-num_patches // length), length)).astype(np.int64)


def extreme_pixels(spec: Preprocess) -> Array:
    """`(3, H, W, C)`: all black, all white, and noise of every value, as a camera gives them that is covered, dazzled
    or broken.
    """
    H, W = spec.image_size
    noise = np.random.default_rng(0).random((H, W, spec.channels))
    images = np.stack([np.zeros_like(noise), np.ones_like(noise), noise])
    pixels: Array = (spec.divisor * images).astype(spec.dtype)
    return pixels


def stream_patches(pixels: Array, ids_keep: Array, updates: Array, patch_size: int) -> Array:
    """The patches of these updates, `(S, M, P * P * C)`, of images `(S, H, W, C)`: the first frame of a stream is the
    image of its neighbour, 1 for 0 and 0 for 1, what follows is its own.
    """
    S = len(pixels)
    others = [index ^ 1 if index ^ 1 < S else index for index in range(S)]
    first = updates[0, 0]
    parts = (
        take_patches(pixels[others], ids_keep[:, :first], patch_size),
        take_patches(pixels, ids_keep[:, first:], patch_size),
    )
    return np.concatenate(parts, axis=1).reshape(*ids_keep.shape, -1)


def _data_folders(provenance: dict[str, Any]) -> list[Path]:
    data = provenance.get("config", {}).get("data")
    return [Path(data) / "val", Path(data)] if data else []


def _images_left(place: Path) -> list[Path]:
    """What is still there of the data of a checkpoint."""
    try:
        return find_images(place)
    except ConfigError:
        return []


def _read(paths: list[Path], spec: Preprocess, count: int, most: int, place: Path) -> Samples | None:
    most = max(count, most)
    spread = spread_first(paths, most)
    order = [*spread_first(spread[:most], count), *spread[most:]]
    images = dict(islice(_cropped(order, spec), most))
    if not images:
        return None
    return Samples(np.stack(list(images.values())), place, tuple(images))


def _cropped(paths: Iterable[Path], spec: Preprocess) -> Iterator[tuple[Path, Array]]:
    """The files that can be read, with their pixels `(H, W, C)`; the others are named."""
    return readable(paths, lambda path: spec.crop(spec.read(path)), lambda _, reason: notice("skipped", reason))


def synthetic_frame(spec: Preprocess) -> Array:
    """`(h, w, C)`, larger than the model's images, of another shape, and of odd sides."""
    H, W = spec.image_size
    frame: Array = _synthetic(replace(spec, image_size=(3 * H // 2 | 1, 2 * W | 1)), 1)[0]
    return frame


def _synthetic(spec: Preprocess, count: int) -> Array:
    """`(S, H, W, C)` noise with the spectrum of natural images."""
    rng = np.random.default_rng(0)
    H, W = spec.image_size
    frequency = np.hypot(np.fft.fftfreq(H)[:, None], np.fft.fftfreq(W)[None, :])
    frequency[0, 0] = 1.0
    spectrum = np.fft.fft2(rng.standard_normal((count, spec.channels, H, W))) / frequency
    images = np.fft.ifft2(spectrum).real
    images -= images.min(axis=(1, 2, 3), keepdims=True)
    images /= images.max(axis=(1, 2, 3), keepdims=True)
    pixels: Array = (spec.divisor * images).astype(spec.dtype).transpose(0, 2, 3, 1)
    return pixels


_BATCH = 8


class CalibrationImages:
    """Images of a folder, spread over it, read batch by batch each time that they are needed."""

    def __init__(self, folder: Path, spec: Preprocess, *, count: int = 512, minimum: int = 128) -> None:
        """Find the files.

        Args:
            count: how many to read at most.
            minimum: how many there must be.

        Raises:
            ConfigError: fewer than `minimum` files.
        """
        self.spec = spec
        self._folder, self._count, self._minimum = folder, count, minimum
        self._paths = spread_first(find_images(folder), count)
        self._require(len(self._paths), "")

    def __len__(self) -> int:
        """How many will be read, if all can be."""
        return min(self._count, len(self._paths))

    def batches(self) -> Iterator[tuple[list[Path], Array]]:
        """Files and their pixels `(B, H, W, C)` of at most 8; a file that cannot be read is skipped aloud and another
        one read in its place.

        Raises:
            ConfigError: at the end, if fewer than the minimum could be read.
        """
        paths: list[Path] = []
        pixels: list[Array] = []
        read = 0
        for path, image in islice(_cropped(self._paths, self.spec), self._count):
            paths.append(path)
            pixels.append(image)
            read += 1
            if len(paths) == _BATCH:
                yield paths, np.stack(pixels)
                paths, pixels = [], []
        if paths:
            yield paths, np.stack(pixels)
        self._require(read, "readable ")

    @property
    def has_spare(self) -> bool:
        """Whether there are more files than will be read."""
        return len(self._paths) > self._count

    @cached_property
    def sha256(self) -> str:
        """Of the contents of the files that will be read if all can be, in order."""
        return _digest(sha256(path) for path in self._paths[: len(self)])

    def _require(self, found: int, kind: str) -> None:
        if found < self._minimum:
            raise ConfigError(
                f"only {found} {kind}images below --calib-data {self._folder}; calibration needs at least"
                f" {self._minimum}",
                hint="add images like those that the model will see; they need no labels",
            )


def _digest(digests: Iterable[str]) -> str:
    return hashlib.sha256("".join(digests).encode()).hexdigest()
