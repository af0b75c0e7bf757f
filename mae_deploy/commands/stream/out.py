"""Features of a stream on their way to a file, frame by frame; the file appears when the stream ends."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Protocol

import numpy as np

from mae_deploy.errors import ConfigError
from mae_deploy.files import atomic_path, remove
from mae_deploy.images.read import Array
from mae_deploy.runtime.feature_file import FeatureFile
from mae_deploy.runtime.streams.stream import Seen
from mae_deploy.runtime.video import Frame

JSONL = ".jsonl"


class Writer(Protocol):
    """Takes frames one by one."""

    def add(self, frame: Frame, seen: Seen, label: str | None) -> None:
        """Write a frame's features."""
        ...


@contextmanager
def written(path: Path, sources: Sequence[str], outputs: Sequence[str]) -> Iterator[list[Writer]]:
    """The file, which appears when the block ends; where it fails there is none. Yields a writer for each source."""
    if path.suffix == JSONL:
        with atomic_path(path) as aside, aside.open("w", encoding="utf-8") as file:
            yield [_Lines(file, outputs, camera, source) for camera, source in _numbered(sources)]
        return
    rows = FeatureFile(path, {"sources": list(sources)}, fresh=True)
    try:
        yield [_Rows(rows, outputs, camera, source) for camera, source in _numbered(sources)]
        rows.finish()
    finally:  # no later call can go on with half a stream
        try:
            rows.close()
        finally:
            remove(rows.folder)


def _numbered(sources: Sequence[str]) -> list[tuple[int | None, str]]:
    """Each with its number, where there are several."""
    return [(number if len(sources) > 1 else None, source) for number, source in enumerate(sources)]


class _Lines:
    """A JSON object for each frame."""

    def __init__(self, file: IO[str], outputs: Sequence[str], camera: int | None, source: str) -> None:
        self._file, self._outputs = file, outputs
        self._origin = {} if camera is None else {"camera": camera, "source": source}

    def add(self, frame: Frame, seen: Seen, label: str | None) -> None:
        line = {
            **self._origin,
            "frame": frame.index,
            "time": frame.time,
            "dropped": frame.dropped,
            "events": [*frame.events, *([seen.event] if seen.event else [])],
            "patches": len(seen.keep),
            "cost": round(seen.cost, 6),
            "snr": seen.snr,
            **({"label": label} if label is not None else {}),
            # To 7 digits, which is all that float32 holds.
            **{name: [float(f"{x:.7g}") for x in seen[name].reshape(-1)] for name in self._outputs},
        }
        self._file.write(json.dumps(line) + "\n")


class _Rows:
    """A row of `.npz` or Parquet for each frame: `frame`, `time`, `patches`, `cost` and `snr` beside the outputs, and
    `camera` where there are several.
    """

    def __init__(self, rows: FeatureFile, outputs: Sequence[str], camera: int | None, source: str) -> None:
        self._rows, self._outputs, self._source = rows, outputs, source
        self._origin = {} if camera is None else {"camera": np.array([camera], np.int32)}

    def add(self, frame: Frame, seen: Seen, label: str | None) -> None:
        columns: dict[str, Array] = {
            **self._origin,
            "frame": np.array([frame.index], np.int64),
            "time": np.array([np.nan if frame.time is None else frame.time], np.float64),
            "patches": np.array([len(seen.keep)], np.int32),
            "cost": np.array([seen.cost], np.float32),
            "snr": np.array([np.nan if seen.snr is None else seen.snr], np.float32),
        }
        outputs = {name: seen[name] for name in self._outputs}
        if clash := columns.keys() & outputs:
            raise ConfigError(f"the output {', '.join(clash)} has the name of a column", hint="write a .jsonl file")
        self._rows.add([f"{self._source}#{frame.index}"], columns | outputs, done=self._rows.rows + 1)
