"""A shard of features as Parquet: id, key and the outputs as fixed-size lists, with what they are features of in the
file's metadata. The same rows are the same bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from mae_deploy.embedding.job import Store, unreadable_beside
from mae_deploy.errors import ConfigError, import_optional
from mae_deploy.files import atomic_path
from mae_deploy.images.read import Array
from mae_deploy.text import parse_json

ID, KEY, REASON = "id", "key", "reason"

ABOUT, PLACE = b"mae_deploy", b"mae_deploy_shard"
"""Keys of the metadata: JSON of what the features are, the same in all shards; and which shard this is."""

_SAID: dict[str, Any] = {
    "folder": str,
    "bundle.path": str,
    "bundle.preprocess": dict,
    "job.bundle": str,
    "job.data": str,
    "job.engine": str,
    "job.every": int | None,
    "job.image_column": str | None,
    "job.shard_images": int,
}
"""What every file says, and of which kind it is."""

_GROUP_BYTES = 16 << 20
"""Features in a row group, at least: what a reader holds at a time."""


class ShardWriter:
    """Takes batches; what the file's metadata says in the end is given to `finish`."""

    def __init__(
        self, file: IO[bytes], shapes: Mapping[str, tuple[int, ...]], store: Store, about: Mapping[str, Any]
    ) -> None:
        """Args: shapes: of a row of each output."""
        arrow, parquet = _arrow()
        self._shapes, self._dtype = shapes, np.dtype("float32" if store == "fp32" else "float16")
        fields = [arrow.field(ID, arrow.int64()), arrow.field(KEY, arrow.string())]
        for name, shape in shapes.items():
            kind = arrow.from_numpy_dtype(self._dtype)
            for size in reversed(shape):
                kind = arrow.list_(arrow.field("element", kind, nullable=False), size)
            fields.append(arrow.field(name, kind, nullable=False))
        metadata = {ABOUT: json.dumps(about, sort_keys=True)}
        self._schema = arrow.schema(fields, metadata=metadata)
        # Features look like noise to a compressor and to a dictionary.
        self._writer = parquet.ParquetWriter(
            file, self._schema, compression={KEY: "zstd", ID: "zstd"}, use_dictionary=False
        )
        self._rows: list[tuple[Sequence[int], Sequence[str], dict[str, Array]]] = []
        self._bytes = 0
        self.rows = 0

    def add(self, ids: Sequence[int], keys: Sequence[str], outputs: Mapping[str, Array]) -> None:
        """Append rows: each output `(B, ...)`."""
        taken = {name: outputs[name].astype(self._dtype) for name in self._shapes}
        self._rows.append((ids, keys, taken))
        self.rows += len(ids)
        self._bytes += sum(array.nbytes for array in taken.values())
        if self._bytes >= _GROUP_BYTES:
            self._write()

    def finish(self, place: Mapping[str, Any]) -> None:
        """Write what is left, and which shard it is."""
        if self._rows or not self.rows:
            self._write()
        self._writer.add_key_value_metadata({PLACE: json.dumps(place)})
        self._writer.close()

    def close(self) -> None:
        """Let go of the file, finished or not."""
        self._writer.close()

    def _write(self) -> None:
        arrow, _ = _arrow()
        columns = [
            arrow.array([id for ids, _, _ in self._rows for id in ids], arrow.int64()),
            arrow.array([as_utf8(key) for _, keys, _ in self._rows for key in keys], arrow.string()),
        ]
        for name, shape in self._shapes.items():
            empty = np.empty((0, *shape), self._dtype)
            rows = np.concatenate([empty, *(outputs[name] for _, _, outputs in self._rows)])
            column = arrow.array(rows.reshape(-1))
            for size in reversed(shape):
                column = arrow.FixedSizeListArray.from_arrays(column, size)
            columns.append(column.cast(self._schema.field(name).type))
        self._writer.write_table(arrow.table(columns, schema=self._schema))
        self._rows, self._bytes = [], 0


@contextmanager
def written_shard(
    path: Path, shapes: Mapping[str, tuple[int, ...]], store: Store, about: Mapping[str, Any]
) -> Iterator[ShardWriter]:
    """A shard that appears when the block ends."""
    with atomic_path(path) as aside, aside.open("wb") as file:  # pyarrow takes no name that is not UTF-8
        writer = ShardWriter(file, shapes, store, about)
        try:
            yield writer
        finally:
            writer.close()


def write_unreadable(shard: Path, rows: Sequence[tuple[int, str, str]]) -> None:
    """The images that belong into a shard and cannot be read: id, key, reason. Written before the shard, which then
    says that both are whole; without rows, there is none.
    """
    path = unreadable_beside(shard)
    if not rows:
        path.unlink(missing_ok=True)
        return
    arrow, parquet = _arrow()
    ids, keys, reasons = zip(*rows, strict=True)
    columns = {ID: ids, KEY: list(map(as_utf8, keys)), REASON: list(map(as_utf8, reasons))}
    with atomic_path(path) as aside, aside.open("wb") as file:
        parquet.write_table(arrow.table(columns), file)


def rows_of(path: Path) -> int:
    """Number of rows, of a file that may be absent.

    Raises:
        ConfigError: it is no such file.
    """
    return int(_metadata(path).num_rows) if path.is_file() else 0


def about_of(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the features are, and which shard it is.

    Raises:
        ConfigError: it is no such file.
    """
    found = _metadata(path).metadata or {}
    if ABOUT not in found or PLACE not in found:
        raise ConfigError(f"{path} does not say what it holds features of", hint="'mae-deploy embed' writes such files")
    try:
        about, place = parse_json(found[ABOUT]), parse_json(found[PLACE])
    except ValueError as error:
        raise ConfigError(f"{path} says in no JSON what it holds features of: {error}", hint="embed again") from error
    for key, kind in _SAID.items():
        value = about
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if not isinstance(value, kind):
            raise ConfigError(f"{path} says no '{key}' of its features, but {value!r:.60}", hint="embed again")
    if not isinstance(place, dict) or "last" not in place:
        raise ConfigError(f"{path} does not say which part of the features it is", hint="embed again")
    return about, place


def schema_of(path: Path) -> Any:
    """Its columns.

    Raises:
        ConfigError: it is no such file.
    """
    return _metadata(path).schema.to_arrow_schema()


def as_utf8(name: str) -> str:
    """Parquet's text is UTF-8: a file name in another encoding is shown with replacement characters."""
    return os.fsencode(name).decode("utf-8", "replace")


def _metadata(path: Path) -> Any:
    arrow, parquet = _arrow()
    try:
        with path.open("rb") as file:
            return parquet.read_metadata(file)
    except (arrow.ArrowInvalid, OSError) as error:
        raise ConfigError(
            f"cannot read {path}: {' '.join(str(error).split())}", hint="remove it, and embed again"
        ) from error


def _arrow() -> tuple[Any, Any]:
    return import_optional("pyarrow", extra="parquet"), import_optional("pyarrow.parquet", extra="parquet")
