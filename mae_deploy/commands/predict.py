"""`mae-deploy predict`: classes to the terminal, features to a file; torch-free."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from mae_deploy.commands.config import PredictConfig
from mae_deploy.errors import ConfigError
from mae_deploy.file_kinds import is_special
from mae_deploy.images.arrays import load_npy
from mae_deploy.images.find import find_images
from mae_deploy.images.read import Array
from mae_deploy.progress import notice, progress
from mae_deploy.reporting.tables import Column, Table
from mae_deploy.results import Items, Result
from mae_deploy.runtime.backbone import Backbone, Features
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.feature_file import FeatureFile, check_features
from mae_deploy.runtime.inputs import patch_indices
from mae_deploy.runtime.manifest import CLASS_OUTPUTS
from mae_deploy.runtime.predict import Predictions, class_labels, class_scores, rank

_TABLE = 100
"""More images than these are printed line by line: a table would first hold and measure them all."""


def run_predict(config: PredictConfig) -> Result:
    """Run every image through a bundle.

    Raises:
        CheckFailed: no image can be read.
        ConfigError: `out` is there already, of no kind that we write, or larger than the disk has room for.
        MissingDependency: Parquet without pyarrow.
    """
    if config.out is not None:
        check_features(config.out)
    paths = find_images(*config.images)
    with ExitStack() as stack:
        backbone = stack.enter_context(
            Backbone.load(
                config.bundle, config.engine, device=config.device, threads=config.threads, affinity=config.affinity
            )
        )
        bundle = backbone.bundle
        keep = config.keep if config.keep_mask is None else _read_mask(config.keep_mask, bundle)
        names = config.outputs or usual_outputs(bundle, writing=config.out is not None)
        written = None if config.out is None else stack.enter_context(_open(config, keep, backbone, paths, names))
        predictions = Predictions(
            backbone,
            paths,
            batch_size=config.batch_size,
            keep=keep,
            num_keep=config.num_keep,
            seed=config.seed,
            outputs=names,
            start=0 if written is None else written.done,
        )
        found = _Found(bundle, config.top_k, written, paths)
        if config.out is not None:
            _say_size(config.out, bundle, len(paths), names, config.num_keep or len(keep or ()) or None)
        try:
            with progress("predict", len(paths), done=predictions.done) as bar:
                for batch, features in predictions:
                    found.add(batch, features, predictions)
                    bar.advance(len(batch))
            left_out = found.finish(predictions)
        except BaseException:
            if written is not None and written.rows:
                notice(
                    "kept:", f"{written.done} of {len(paths)} images in {written.folder}; the same call goes on there"
                )
            raise
    for path, reason in left_out:
        notice("skipped", f"{path}: {reason}")
    data = {
        "images": len(found.paths),
        "unreadable": [{"path": path, "reason": reason} for path, reason in left_out],
        "outputs": found.shapes,
        "out": str(config.out) if config.out is not None else None,
    }
    if not found.ranks:
        return Result(data)
    data["predictions"] = Items(found.predictions)
    if len(found.paths) > _TABLE:
        return Result(data, Items(lambda: (f"{row['image']}  {row['classes']}" for row in found.table_rows())))
    return Result(data, Table("", (Column("image", "image"), Column("classes", "classes")), list(found.table_rows())))


class _Found:
    """What is kept of the outputs: shapes and the best classes; the outputs themselves go to the file."""

    def __init__(self, bundle: Bundle, top_k: int, written: FeatureFile | None, paths: Sequence[Path]) -> None:
        self.paths: list[Path] = []
        self.shapes: dict[str, list[int]] = {}
        self.ranks: list[tuple[Array, Array]] = []
        self._class_names, self._top_k, self._written = bundle.class_names, top_k, written
        self._labels: Sequence[str] = ()
        self._reported = 0
        if written is not None and written.rows:
            notice("going on:", f"{written.done} of {len(paths)} images are in {written.folder}")
            bad = {path for path, _ in written.left_out}
            self.paths = [path for path in paths[: written.done] if str(path) not in bad]
            for name in CLASS_OUTPUTS:
                for rows in written.chunks(name) if name in written.columns and not self.ranks else ():
                    self._rank({name: rows})

    def add(self, paths: list[Path], features: Features, predictions: Predictions) -> None:
        """Take a batch."""
        self.paths += paths
        self.shapes = {name: [len(self.paths), *array.shape[1:]] for name, array in features.items()}
        self._rank(features)
        if self._written is not None:
            new = [(str(bad.path), bad.reason) for bad in predictions.unreadable[self._reported :]]
            self._reported = len(predictions.unreadable)
            self._written.add([str(path) for path in paths], features, done=predictions.done, left_out=new)

    def finish(self, predictions: Predictions) -> list[tuple[str, str]]:
        """Write the file; returns the images that could not be read, and why."""
        new = [(str(bad.path), bad.reason) for bad in predictions.unreadable[self._reported :]]
        if self._written is None:
            return new
        self.shapes = {name: [len(self.paths), *shape] for name, (_, shape) in self._written.columns.items()}
        self._written.finish()
        return [*self._written.left_out, *new]

    def predictions(self) -> Iterator[dict[str, Any]]:
        """For JSON: each image with its best classes."""
        for path, classes in self._best():
            yield {
                "path": str(path),
                "classes": [{"class": name, "probability": round(share, 6)} for name, share in classes],
            }

    def table_rows(self) -> Iterator[dict[str, Any]]:
        """For people."""
        for path, classes in self._best():
            yield {"image": path, "classes": "  ".join(f"{name} {share:.1%}" for name, share in classes)}

    def _rank(self, features: Mapping[str, Array]) -> None:
        if (logits := class_scores(features)) is not None:
            self._labels = class_labels(self._class_names, logits.shape[1])
            self.ranks.append(rank(logits, self._top_k))

    def _best(self) -> Iterator[tuple[Path, list[tuple[str, float]]]]:
        rows = (
            (c, s) for classes, shares in self.ranks for c, s in zip(classes.tolist(), shares.tolist(), strict=True)
        )
        for path, (classes, shares) in zip(self.paths, rows, strict=True):
            yield path, [(self._labels[int(index)], float(share)) for index, share in zip(classes, shares, strict=True)]


def _read_mask(path: Path, bundle: Bundle) -> tuple[int, ...]:
    """The patches that a mask keeps.

    Raises:
        ConfigError: no NumPy file, or a mask of another shape.
    """
    if is_special(path):
        raise ConfigError(f"--keep-mask {path} is no file, but a pipe or a device")
    try:
        mask = load_npy(path)
    except ValueError as error:
        raise ConfigError(f"--keep-mask {path} is not a .npy file: {error}") from error
    if mask.dtype.kind not in "biu":
        raise ConfigError(f"--keep-mask {path} is no array of booleans")
    indices = patch_indices(mask.astype(bool), bundle)
    if isinstance(indices, list):
        raise ConfigError(f"--keep-mask {path} has a mask for each of {len(indices)} images", hint="give one for all")
    return tuple(np.asarray(indices).tolist())


def _open(
    config: PredictConfig,
    keep: tuple[int, ...] | None,
    backbone: Backbone,
    paths: Sequence[Path],
    names: Sequence[str],
) -> FeatureFile:
    """The file, where rows of the same call are taken over."""
    assert config.out is not None
    hashes = {
        name: entry["sha256"]
        for name, entry in backbone.bundle.manifest["files"].items()
        if not name.startswith("engines/")
    }
    identity = {
        "images": _digest(os.fsencode(path) for path in paths),
        "bundle": _digest([json.dumps(hashes, sort_keys=True).encode()]),
        "engine": backbone.engine.name,
        "outputs": list(names),
        "keep": keep,
        "num_keep": config.num_keep,
        "seed": config.seed,
    }
    return FeatureFile(config.out, identity)


def _digest(parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part + b"\0")
    return digest.hexdigest()


def usual_outputs(bundle: Bundle, *, writing: bool) -> tuple[str, ...]:
    """Vectors: what is larger is fetched and written where it is asked for, or where there is nothing else; classes are
    enough where nothing is written.
    """
    vectors = tuple(entry["name"] for entry in bundle.manifest["graph"]["outputs"] if len(entry["shape"]) == 2)
    if writing:
        return vectors or bundle.output_names
    return (bundle.class_output,) if bundle.class_output is not None else vectors or bundle.output_names[:1]


def _say_size(out: Path, bundle: Bundle, count: int, names: Sequence[str], num_keep: int | None) -> None:
    """What will be written and how large it gets, and what not.

    Raises:
        ConfigError: the disk has no room for it.
    """
    keep = bundle.fixed_keep or num_keep or bundle.num_patches
    sizes = {
        entry["name"]: count
        * np.dtype(entry["dtype"]).itemsize
        * math.prod(keep if isinstance(size, str) else size for size in entry["shape"][1:])
        for entry in bundle.manifest["graph"]["outputs"]
    }
    total = sum(sizes[name] for name in names if name in sizes)
    others = [f"{name} ({_bytes(sizes[name])})" for name in bundle.output_names if name not in names]
    rest = f"; not {', '.join(others)} without --outputs" if others else ""
    notice("writing:", f"{', '.join(names)} of {count} images, {_bytes(total)}{rest}")
    folder = next(parent for parent in out.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if 2 * total > free:
        raise ConfigError(
            f"--out {out} takes {_bytes(2 * total)} while it is written, and {folder} has {_bytes(free)} left",
            hint="ask for fewer --outputs, or write to another disk",
        )


def _bytes(count: int) -> str:
    power = min(max(len(str(count)) - 1, 0) // 3, 4)
    return f"{count / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
