"""Look at every image of a data set in several processes: for statistics, and to find duplicates."""

from __future__ import annotations

import hashlib
import multiprocessing
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from mae_deploy.data.workers import end_with_parent, leave_signals_to_parent, resolve_workers
from mae_deploy.images.read import Array, is_image

R = TypeVar("R")

Survey = Callable[[Sequence[int]], Iterator[R]]
"""Runs the work on images by number, and yields the results in that order."""

_CHUNK = 8
"""Images that a process is given at a time."""

_NEAR_BITS = 3
"""Bits of 64 in which the difference hashes of images that look the same may differ."""

_work: Callable[[int], Any] | None = None
"""In a worker process: what it does with an image."""


@contextmanager
def surveying(work: Callable[[int], R], num_workers: int) -> Iterator[Survey[R]]:
    """Processes that do some work on images by number."""
    workers = resolve_workers(num_workers)
    if workers == 0:
        yield lambda indices: map(work, indices)
        return
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    # not multiprocessing.Pool, which waits without end for a worker that was killed
    with ProcessPoolExecutor(workers, context, _adopt, (work,)) as pool:
        try:
            yield lambda indices: _in_order(pool, indices, ahead=4 * workers)
        finally:
            pool.shutdown(cancel_futures=True)


def _in_order(pool: ProcessPoolExecutor, indices: Sequence[int], *, ahead: int) -> Iterator[Any]:
    """The results, of which so many parts are computed before they are asked for."""
    started: deque[Future[list[Any]]] = deque()
    for first in range(0, len(indices), _CHUNK):
        started.append(pool.submit(_call, indices[first : first + _CHUNK]))
        if len(started) > ahead:
            yield from started.popleft().result()
    while started:
        yield from started.popleft().result()


def pixel_hash(image: Image.Image | Array) -> str:
    """Of the decoded pixels: the same for a JPEG and a PNG of it."""
    pixels = np.ascontiguousarray(image)
    return hashlib.blake2b(f"{pixels.shape} {pixels.dtype}".encode() + pixels.tobytes(), digest_size=16).hexdigest()


def difference_hash(image: Image.Image | Array) -> int:
    """64 bits: whether each of 8 × 8 places is brighter than its right neighbour; images that look the same differ in
    few.
    """
    if not is_image(image):
        grey = np.asarray(image, np.float64).mean(axis=2)
        low, high = float(grey.min()), float(grey.max())
        image = Image.fromarray(((grey - low) / (high - low or 1) * 255).astype(np.uint8))
    small = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BILINEAR))
    return int.from_bytes(np.packbits(small[:, :-1] > small[:, 1:]).tobytes(), "big")


class Seen:
    """The images that came before, by their pixels and, on request, by their perceptual hash."""

    def __init__(self, *, near: bool) -> None:
        self.near = near
        self._pixels: dict[str, str] = {}
        # Two hashes that differ in at most 3 bits are equal in at least one of 4 quarters.
        self._quarters: dict[tuple[int, int], list[tuple[int, str]]] = {}

    def add(self, name: str, pixels: str, perceptual_hash: int) -> str | None:
        """The image that this one repeats; else it is remembered."""
        if pixels in self._pixels:
            return self._pixels[pixels]
        quarters = [(place, perceptual_hash >> 16 * place & 0xFFFF) for place in range(_NEAR_BITS + 1)]
        if self.near:
            for quarter in quarters:
                for other, first in self._quarters.get(quarter, ()):
                    if bin(other ^ perceptual_hash).count("1") <= _NEAR_BITS:
                        return first
            for quarter in quarters:
                self._quarters.setdefault(quarter, []).append((perceptual_hash, name))
        self._pixels[pixels] = name
        return None


def _adopt(work: Callable[[int], Any]) -> None:
    global _work
    _work = work
    leave_signals_to_parent(0)
    end_with_parent()


def _call(indices: Sequence[int]) -> list[Any]:
    assert _work is not None
    return [_work(index) for index in indices]
