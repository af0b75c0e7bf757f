"""Nearest neighbours by cosine among rows of length 1: exact, or by usearch's graph of neighbours (HNSW), whose recall
is measured.

Malkov and Yashunin, Efficient and robust approximate nearest neighbor search: https://arxiv.org/abs/1603.09320
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mae_deploy.embedding.shard_file import as_utf8
from mae_deploy.errors import ConfigError, import_optional
from mae_deploy.files import atomic_path, remove
from mae_deploy.images.read import Array

Tick = Callable[[int], object]

_QUERIES, _ROWS = 256, 65536
"""Of a block of products that is held at a time."""

INDEX_FOLDER = "_index"
"""In the folder of features."""


class Neighbours(ABC):
    """Finds the rows `(N, D)` that are nearest to others."""

    def __init__(self, rows: Array) -> None:
        self.rows = rows

    @abstractmethod
    def nearest(self, queries: Array, k: int, tick: Tick = lambda _: None) -> tuple[Array, Array]:
        """The k rows with the highest cosine to each query `(Q, D)`, best first: places and cosines `(Q, k)`; fewer
        where there are not so many rows.

        Args:
            tick: told of queries that are done.
        """

    def others(self, k: int, tick: Tick = lambda _: None) -> tuple[Array, Array]:
        """Of every row the k nearest other ones: places and cosines `(N, k)`."""
        found, cosines = self.nearest(self.rows, k + 1, tick)
        itself = found == np.arange(len(self.rows))[:, None]
        itself[~itself.any(axis=1), -1] = True  # among many copies, it may not be one of the k
        shape = len(self.rows), found.shape[1] - 1
        return found[~itself].reshape(shape), cosines[~itself].reshape(shape)


class Exact(Neighbours):
    """All products."""

    def nearest(self, queries: Array, k: int, tick: Tick = lambda _: None) -> tuple[Array, Array]:
        """See `Neighbours`; of equal cosines, the row that comes first."""
        k = min(k, len(self.rows))
        places, cosines = np.empty((len(queries), k), np.int64), np.empty((len(queries), k), np.float32)
        for first in range(0, len(queries), _QUERIES):
            part = slice(first, first + _QUERIES)
            places[part], cosines[part] = self._block(queries[part], k)
            tick(len(places[part]))
        return places, cosines

    def _block(self, queries: Array, k: int) -> tuple[Array, Array]:
        places, cosines = np.empty((len(queries), 0), np.int64), np.empty((len(queries), 0), np.float32)
        for first in range(0, len(self.rows), _ROWS):
            found = queries @ self.rows[first : first + _ROWS].T
            best = np.argpartition(-found, min(k, found.shape[1]) - 1, axis=1)[:, :k]
            places = np.concatenate([places, best + first], axis=1)
            cosines = np.concatenate([cosines, np.take_along_axis(found, best, axis=1)], axis=1)
        order = np.lexsort((places, -cosines), axis=1)[:, :k]
        return np.take_along_axis(places, order, axis=1), np.take_along_axis(cosines, order, axis=1)


class Approximate(Neighbours):
    """By an index, which is built once and kept beside the features."""

    def __init__(self, rows: Array, folder: Path, name: str, tick: Tick = lambda _: None) -> None:
        """Load or build it.

        Args:
            folder: of the features.
            name: of what the rows are.
            tick: told of rows that are in it.

        Raises:
            ConfigError: the folder's name is not UTF-8, which usearch cannot write to.
            MissingDependency: usearch is not installed.
        """
        super().__init__(rows)
        usearch: Any = import_optional("usearch.index", extra="search")
        if as_utf8(str(folder)) != str(folder):
            raise ConfigError(f"no index can be kept in {folder}, whose name is not UTF-8", hint="rename it")
        checksum = zlib.crc32(np.ascontiguousarray(rows).data)  # of other features in the same folder, or others' ways
        path = folder / INDEX_FOLDER / f"{name}-{len(rows)}-{checksum:08x}.usearch"
        index = usearch.Index.restore(path) if path.is_file() else None
        if index is None or len(index) != len(rows) or index.ndim != rows.shape[1]:
            index = usearch.Index(ndim=rows.shape[1], metric="cos", dtype="f32")
            for first in range(0, len(rows), _ROWS // 64):
                part = rows[first : first + _ROWS // 64]
                index.add(np.arange(first, first + len(part)), part)
                tick(len(part))
            remove(path.parent)
            with atomic_path(path) as aside:
                index.save(aside)
        self._index = index

    def nearest(self, queries: Array, k: int, tick: Tick = lambda _: None) -> tuple[Array, Array]:
        """See `Neighbours`."""
        k = min(k, len(self.rows))
        places, cosines = np.empty((len(queries), k), np.int64), np.empty((len(queries), k), np.float32)
        for first in range(0, len(queries), _QUERIES):
            part = queries[first : first + _QUERIES]
            found = self._index.search(part, k)
            places[first : first + len(part)] = np.asarray(found.keys).reshape(len(part), k)
            cosines[first : first + len(part)] = 1 - np.asarray(found.distances).reshape(len(part), k)
            tick(len(part))
        return places, cosines


def recall(approximate: Neighbours, k: int, *, queries: int, seed: int) -> float:
    """Share of the true k nearest neighbours of some rows, drawn at random, that are found."""
    rows = approximate.rows
    drawn = np.random.default_rng(seed).permutation(len(rows))[:queries]
    found, _ = approximate.nearest(rows[drawn], k)
    true, _ = Exact(rows).nearest(rows[drawn], k)
    return float(np.mean([np.isin(row, of).mean() for row, of in zip(true, found, strict=True)]))
