"""`mae-deploy predict`: classes to the terminal, features to a file; torch-free."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mae_deploy.commands.config import PredictConfig
from mae_deploy.errors import ConfigError, import_optional
from mae_deploy.files import refuse_to_overwrite
from mae_deploy.images.find import find_images
from mae_deploy.progress import notice, progress
from mae_deploy.reporting.tables import Column, Table
from mae_deploy.results import Result
from mae_deploy.runtime.backbone import Backbone
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.predict import Predictions, top_k, write_features


def run_predict(config: PredictConfig) -> Result:
    """Run every image through a bundle.

    Raises:
        CheckFailed: no image can be read.
        ConfigError: `out` is there already, or of no kind that we write.
        MissingDependency: Parquet without pyarrow.
    """
    if config.out is not None:
        _check_out(config.out)
    paths = find_images(*config.images)
    with Backbone.load(
        config.bundle, config.engine, device=config.device, threads=config.threads, affinity=config.affinity
    ) as backbone:
        names = config.outputs or (backbone.output_names if config.out is not None else _cheap(backbone.bundle))
        predictions = Predictions(
            backbone,
            paths,
            batch_size=config.batch_size,
            keep=config.keep,
            num_keep=config.num_keep,
            seed=config.seed,
            outputs=names,
        )
        read: list[Path] = []
        shapes: dict[str, list[int]] = {}
        parts: dict[str, list[Any]] = {name: [] for name in names if config.out is not None or name == "logits"}
        with progress("predict", len(paths)) as bar:
            for found, features in predictions:
                read += found
                for name, array in features.items():
                    shapes[name] = [len(read), *array.shape[1:]]
                    if name in parts:
                        parts[name].append(array)
                bar.advance(len(found))
        class_names = backbone.bundle.class_names
    for broken in predictions.unreadable:
        notice("skipped", f"{broken.path}: {broken.reason}")
    arrays = {name: np.concatenate(part) for name, part in parts.items()}
    if config.out is not None:
        write_features(config.out, [str(path) for path in read], arrays)
    data = {
        "images": len(read),
        "unreadable": [{"path": str(broken.path), "reason": broken.reason} for broken in predictions.unreadable],
        "outputs": shapes,
        "out": str(config.out) if config.out is not None else None,
    }
    if "logits" not in arrays:
        return Result(data)
    ranked = top_k(arrays["logits"], class_names, config.top_k)
    data["predictions"] = [
        {"path": str(path), "classes": [{"class": name, "probability": round(share, 6)} for name, share in classes]}
        for path, classes in zip(read, ranked, strict=True)
    ]
    rows = [
        {"image": path, "classes": "  ".join(f"{name} {share:.1%}" for name, share in classes)}
        for path, classes in zip(read, ranked, strict=True)
    ]
    return Result(data, Table("", (Column("image", "image"), Column("classes", "classes")), rows))


def _check_out(path: Path) -> None:
    """Say what would stop the writing of features before an hour is spent on computing them."""
    if path.suffix not in (".npz", ".parquet"):
        raise ConfigError(f"--out {path} must end in .npz or .parquet")
    refuse_to_overwrite(path)
    if path.suffix == ".parquet":
        import_optional("pyarrow", extra="parquet")


def _cheap(bundle: Bundle) -> tuple[str, ...]:
    """Where nothing is written, what is larger than a vector need not be fetched from the engine; without vectors, one
    output stands for all.
    """
    vectors = tuple(entry["name"] for entry in bundle.manifest["graph"]["outputs"] if len(entry["shape"]) == 2)
    return ("logits",) if "logits" in vectors else vectors or bundle.output_names[:1]
