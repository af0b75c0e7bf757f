"""Hugging Face data sets on disk: Arrow files of `save_to_disk`, and Parquet. Read by pyarrow alone: no loading script,
nothing that runs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mae_deploy.data.config import Columns
from mae_deploy.data.sources.base import UNLABELLED, Encoded, match_classes, numbers_of, read_file
from mae_deploy.data.sources.patterns import files_of, missing_parts
from mae_deploy.errors import ConfigError, import_optional
from mae_deploy.files import read_json
from mae_deploy.images.left_out import LeftOut
from mae_deploy.images.read import Array, UnreadableImage

_STATE = "state.json"
"""In each folder of `save_to_disk`."""

_IMAGES = ("image", "img", "images", "jpg", "png", "pixel_values")
_LABELS = ("label", "labels", "fine_label", "cls", "class")
"""Usual names of the columns, in the order in which they are looked for."""


def find_tables(data: Path) -> list[Path]:
    """The Arrow or Parquet files of a data set on disk; none where it is something else.

    Raises:
        ConfigError: it holds several splits.
    """
    if data.is_file():
        return [data] if data.suffix.lower() in (".parquet", ".arrow") else []
    if (data / "dataset_dict.json").is_file():
        splits = read_json(data / "dataset_dict.json").get("splits", [])
        raise ConfigError(
            f"{data} holds several splits: {', '.join(map(str, splits))}",
            hint=f"give one of them, such as {data}/{next(iter(splits), 'train')}",
        )
    if (data / _STATE).is_file():
        state = read_json(data / _STATE)
        if state.get("_indices_files") or state.get("_indices_data_files"):
            raise ConfigError(
                f"{data} is a selection of rows of another data set",
                hint="save it again with flatten_indices().save_to_disk(…)",
            )
        return [data / entry["filename"] for entry in state["_data_files"]]
    return files_of(data, ".parquet") if data.is_dir() else []


def name_files(paths: Sequence[Path], columns: Columns) -> bool:
    """Whether the rows of some tables name image files beside them, instead of holding the images."""
    try:
        return TableSource(str(paths[0]), paths, columns).names_files
    except ConfigError:  # another table, which holds no images
        return False


class TableSource(Encoded):
    """The images of some Arrow or Parquet files, row by row.

    Arrow files are mapped into memory and cost none; Parquet, which cannot be read at random, is held in memory as it
    is encoded.

    Raises:
        ConfigError: no such column, or rows without labels where they are asked for.
    """

    def __init__(
        self,
        name: str,
        paths: Sequence[Path],
        columns: Columns,
        *,
        labelled: bool = False,
        class_names: tuple[str, ...] | None = None,
    ) -> None:
        import_optional("pyarrow", extra="hf")
        self.name = name
        self.left_out = LeftOut()
        self._folder = paths[0].parent
        missing_parts(paths, self.left_out)
        tables = [_open(path) for path in paths]
        self._image = _column(tables[0].schema, columns.image, _IMAGES, "--image-column", name)
        _check_columns(paths, tables, self._image)
        _check_images(tables[0].schema.field(self._image).type, self._image, name)
        self._chunks = [chunk for table in tables for chunk in table.column(self._image).chunks]
        self._starts = np.cumsum([0, *map(len, self._chunks)])
        self.class_names: tuple[str, ...] | None = None
        self._labels = np.full(self._starts[-1], UNLABELLED, np.int64)
        if labelled:
            column = _column(tables[0].schema, columns.label, _LABELS, "--label-column", name)
            _check_columns(paths, tables, column)
            values = [value for table in tables for value in table.column(column).to_pylist()]
            self._labels, self.class_names = _labels(
                values, _class_names(tables[0].schema, column, self._folder), class_names, name
            )
        if len(self) == 0:
            raise ConfigError(f"no rows in {name}")
        self._digest = _digest(paths, self._labels)

    @property
    def names_files(self) -> bool:
        """Whether the first row names a file."""
        row = self._row(0)
        return row.get("bytes") is None and bool(row.get("path"))

    def key(self, index: int) -> str:
        """The data set, the row, and the file's name where the table has it."""
        path = self._row(index).get("path")
        return f"{self.name}:{index}{f'/{path}' if path else ''}"

    def raw(self, index: int) -> bytes:
        """The image's bytes, or those of the file that the row names."""
        row = self._row(index)
        if row.get("bytes") is not None:
            return bytes(row["bytes"])
        if not row.get("path"):
            raise UnreadableImage(f"{self.key(index)}: the row is empty")
        return read_file(self._folder / row["path"])

    def _row(self, index: int) -> dict[str, Any]:
        chunk = int(np.searchsorted(self._starts, index, side="right")) - 1
        value = self._chunks[chunk][index - int(self._starts[chunk])].as_py()
        return value if isinstance(value, dict) else {"bytes": value}


def _open(path: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        if path.suffix.lower() == ".parquet":
            return pyarrow.parquet.read_table(path)
        source = pyarrow.memory_map(str(path))
        try:
            return pyarrow.ipc.open_stream(source).read_all()
        except pyarrow.ArrowInvalid:
            return pyarrow.ipc.open_file(source).read_all()
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ConfigError(
            f"cannot read {path}: {' '.join(str(error).split())[:200]}",
            hint="copy it again: it is cut short or no such table",
        ) from error


def _column(schema: Any, wanted: str | None, usual: Sequence[str], option: str, name: str) -> str:
    if wanted is not None:
        if wanted not in schema.names:
            raise ConfigError(f"{option} {wanted}: {name} has the columns {', '.join(schema.names)}")
        return wanted
    for known in usual:
        if known in schema.names:
            return known
    raise ConfigError(f"{name} has the columns {', '.join(schema.names)}", hint=f"say with {option} which one it is")


def _check_columns(paths: Sequence[Path], tables: Sequence[Any], column: str) -> None:
    for path, table in zip(paths, tables, strict=True):
        if column not in table.schema.names:
            there = ", ".join(table.schema.names)
            raise ConfigError(f"{path} has the columns {there}, and not {column}, as {paths[0].name} has")


def _check_images(kind: Any, column: str, name: str) -> None:
    """Whether a column may hold images: bytes, or bytes beside the file's name."""
    import pyarrow

    of_bytes = (pyarrow.types.is_binary, pyarrow.types.is_large_binary, pyarrow.types.is_fixed_size_binary)
    inner = getattr(kind, "storage_type", kind)
    inner = inner.value_type if pyarrow.types.is_dictionary(inner) else inner
    if not any(fits(inner) for fits in (*of_bytes, pyarrow.types.is_struct, pyarrow.types.is_null)):
        raise ConfigError(
            f"the column {column} of {name} holds {kind}, not images",
            hint="say with --image-column which one holds their bytes",
        )


def _class_names(schema: Any, column: str, folder: Path) -> tuple[str, ...] | None:
    """The names of a ClassLabel, which the `datasets` library writes into the schema's metadata and beside the
    files.
    """
    features: dict[str, Any] = {}
    if b"huggingface" in (schema.metadata or {}):
        features = json.loads(schema.metadata[b"huggingface"]).get("info", {}).get("features") or {}
    if not features and (folder / "dataset_info.json").is_file():
        features = read_json(folder / "dataset_info.json").get("features") or {}
    names = features.get(column, {}).get("names") if isinstance(features.get(column), dict) else None
    return tuple(map(str, names)) if names else None


def _labels(
    values: list[Any], own: tuple[str, ...] | None, wanted: tuple[str, ...] | None, name: str
) -> tuple[Array, tuple[str, ...]]:
    if any(isinstance(value, str) for value in values):
        return match_classes(
            *numbers_of([None if value is None else str(value) for value in values], own), wanted, name
        )
    if not all(isinstance(value, int) for value in values if value is not None):
        raise ConfigError(
            f"the labels of {name} are neither numbers nor names",
            hint="say with --label-column which column holds them",
        )
    return match_classes(
        np.array([UNLABELLED if value is None else value for value in values], np.int64), own, wanted, name
    )


def _digest(paths: Sequence[Path], labels: Array) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.name}\0{path.stat().st_size}\n".encode())
    digest.update(labels.astype("<i8").tobytes())
    return digest.hexdigest()
