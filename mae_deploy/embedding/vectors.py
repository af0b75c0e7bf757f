"""The vectors of a folder of features, whitened and of length 1: their products are the cosines that search goes by.

Features of one network have much in common, and few directions hold most of their variance, often those of colour and
brightness. Of a small MAE's features of 1,000 photos, the nearest other photo had a cosine of up to 0.992 when they
were centred alone, as near as the same photo at half its size; whitened, up to 0.89, against 0.95 and more.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mae_deploy.embedding.job import features_in
from mae_deploy.embedding.shard_file import ID, KEY, about_of, rows_of, schema_of
from mae_deploy.errors import ConfigError, import_optional
from mae_deploy.images.read import Array

_PREFERRED = ("pooled", "cls")

_VECTOR = r"fixed_size_list<\w+: (float|halffloat)( not null)?>\[[1-9]\d*\]"
"""How pyarrow writes the type of a column of vectors."""

_LEAST, _LEAST_OF_FEW = 0.01, 0.1
"""Shares of the mean variance that are added to that of each direction: the first, or the second times D / N where that
is more, as the variances of few images are not known well."""

_POWER = 0.4
"""Of a direction's variance, by which it is divided: 1/2 makes all alike, 0 leaves them as they are. 1/2 is a little
better for the neighbours of a network that was trained without labels, and takes from those of a fine-tuned one, whose
few strong directions are its classes (docs/results/embed.md)."""

_BLOCK = 65536


@dataclass(frozen=True, slots=True)
class Vectors:
    """An output of every image of a collection, in the order of its shards."""

    output: str
    about: dict[str, Any]
    """What the files say they are features of."""
    ids: Array
    """int64 `(N,)`."""
    keys: Sequence[str]
    rows: Array
    """float32 `(N, D)`."""
    mean: Array
    """float32 `(D,)`: what was taken from each."""
    whitening: Array
    """float32 `(D, D)`: what each was then multiplied by."""

    @classmethod
    def read(cls, folder: Path, output: str | None = None) -> Vectors:
        """Read them; memory is 4 bytes a number.

        Args:
            output: which one; None: pooled, else cls, else the first that is a vector.

        Raises:
            ConfigError: no features there, of several jobs, or no such output.
        """
        parquet = import_optional("pyarrow.parquet", extra="search")
        shards = features_in(folder)
        if not shards:
            raise ConfigError(f"no features in {folder}", hint="'mae-deploy embed' writes such a folder")
        about, _ = about_of(shards[0])
        if other := [shard for shard in shards if about_of(shard)[0]["job"] != about["job"]]:
            raise ConfigError(f"{other[0]} and {shards[0]} have features of different jobs", hint="embed again")
        schema = schema_of(shards[0])
        output = _chosen(schema, output, folder)
        for shard in shards:
            _check_columns(shard, schema, output)
        count = sum(map(rows_of, shards))
        ids, keys, rows = np.empty(count, np.int64), list[str](), np.empty((0, 0), np.float32)
        start = 0
        for shard in shards:
            try:
                with shard.open("rb") as file:
                    table = parquet.read_table(file, columns=[ID, KEY, output])
            except (OSError, ValueError) as error:  # pyarrow's are both
                raise ConfigError(f"cannot read {shard}: {' '.join(str(error).split())}", hint="embed again") from error
            if any(column.null_count for column in table.columns):
                raise ConfigError(f"{shard} has rows without an id, a key or features", hint="embed again")
            stop = start + table.num_rows
            column = table[output].combine_chunks()
            if not rows.size:
                rows = np.empty((count, column.type.list_size), np.float32)
            ids[start:stop] = table[ID].to_numpy()
            keys += table[KEY].to_pylist()
            rows[start:stop] = column.flatten().to_numpy(zero_copy_only=False).reshape(table.num_rows, -1)
            start = stop
        if not count:
            raise ConfigError(f"no image in {folder} has features")
        if not np.isfinite(rows).all():
            raise ConfigError(f"features in {folder} are infinite or no numbers", hint="embed again")
        mean = rows.mean(axis=0, dtype=np.float64).astype(np.float32)
        whitening = _whitening(rows, mean)
        for first in range(0, count, _BLOCK):
            part = slice(first, first + _BLOCK)
            rows[part] = _whitened(rows[part], mean, whitening)
        return cls(output, about, ids, keys, rows, mean, whitening)

    def whitened(self, features: Array) -> Array:
        """Features of other images, `(Q, D)`, as these are."""
        return _whitened(features.astype(np.float32), self.mean, self.whitening)


def _whitening(rows: Array, mean: Array) -> Array:
    """What makes the variance of all directions nearly alike, but for those that hold next to nothing."""
    covariance = np.zeros((len(mean), len(mean)))
    for first in range(0, len(rows), _BLOCK):
        part = rows[first : first + _BLOCK] - mean
        covariance += part.T @ part
    variances, directions = np.linalg.eigh(covariance / len(rows))
    share = max(_LEAST, _LEAST_OF_FEW * len(mean) / len(rows))
    least = max(share * float(variances.mean()), float(np.finfo(np.float32).tiny))
    whitening: Array = (directions / (variances.clip(0) + least) ** _POWER).astype(np.float32)
    return whitening


def _whitened(rows: Array, mean: Array, whitening: Array) -> Array:
    found: Array = (rows - mean) @ whitening
    found /= np.maximum(np.linalg.norm(found, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    return found


def _check_columns(shard: Path, schema: Any, output: str) -> None:
    """Whether a shard has the columns of the first one, and is as large as it says: features are not compressed.

    Raises:
        ConfigError: it is not.
    """
    found = schema_of(shard)
    kinds = {name: str(found.field(name).type) for name in (ID, KEY, output) if name in found.names}
    if kinds.get(ID) != "int64" or kinds.get(KEY) not in ("string", "large_string") or not found.equals(schema):
        raise ConfigError(
            f"{shard} has the columns {', '.join(found.names)[:200]}, not '{ID}', '{KEY}' and the outputs of its job",
            hint="'mae-deploy embed' writes such files",
        )
    numbers, size = rows_of(shard) * found.field(output).type.list_size, shard.stat().st_size
    if 2 * numbers > size:
        raise ConfigError(f"{shard} tells of {numbers} numbers and has {size} bytes", hint="embed again")


def _chosen(schema: Any, output: str | None, folder: Path) -> str:
    vectors = [
        name
        for name in schema.names
        if name not in (ID, KEY) and re.fullmatch(_VECTOR, str(schema.field(name).type)) is not None
    ]
    if output is None and vectors:
        return next((name for name in _PREFERRED if name in vectors), vectors[0])
    if output is None or output not in vectors:
        raise ConfigError(
            f"no vectors '{output}' in {folder}" if output else f"no vectors in {folder}",
            hint=f"there are: {', '.join(vectors) or 'none'}",
        )
    return output
