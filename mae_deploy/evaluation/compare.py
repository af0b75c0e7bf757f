"""Encoders side by side on the same probes: k-NN, a linear classifier, features a second, parameters."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from mae_deploy.checkpoint import find_checkpoint
from mae_deploy.data.sources.base import ImageSource
from mae_deploy.data.sources.splits import labelled_splits
from mae_deploy.errors import ConfigError
from mae_deploy.evaluation.config import CompareConfig
from mae_deploy.evaluation.features import (
    EncoderFeatures,
    FeatureSet,
    FeatureSource,
    extract,
    open_source,
    random_like,
)
from mae_deploy.evaluation.knn import knn
from mae_deploy.evaluation.linear import fit_linear
from mae_deploy.evaluation.timm_features import TimmFeatures
from mae_deploy.files import refuse_to_overwrite
from mae_deploy.progress import heading
from mae_deploy.reporting.command_line import command_line
from mae_deploy.reporting.markdown import Page, Picture, write_report
from mae_deploy.reporting.plots import Curve, draw_bars
from mae_deploy.reporting.tables import Column, Table, mean_of
from mae_deploy.results import Result
from mae_deploy.runtime.manifest import MANIFEST_FILE
from mae_deploy.training.device import resolve_device
from mae_deploy.weights.load import LoadedWeights, read_weights

RANDOM = "random"


@dataclass(frozen=True, slots=True)
class Entry:
    """One encoder as the command line names it."""

    name: str
    path: Path | None
    """None for random weights."""
    architecture: str | None
    """timm's name, for a weights file of a timm model."""

    @property
    def kind(self) -> Literal["random", "timm", "bundle", "checkpoint"]:
        """How its features are had."""
        if self.path is None:
            return "random"
        if self.architecture is not None:
            return "timm"
        return "bundle" if (self.path / MANIFEST_FILE).is_file() else "checkpoint"


def run_compare(config: CompareConfig) -> Result:
    """Evaluate every encoder on the same images.

    Raises:
        ConfigError: an encoder that is not there or is named twice, no labelled images, or `out` is there already.
        CheckFailed: weights that do not fit, or no image can be read.
    """
    if config.out is not None:
        refuse_to_overwrite(config.out)
    entries = read_entries(config.encoders)
    resolve_device(config.device)
    train, val = labelled_splits(config.data, config.validation, seed=config.seed)
    network = network_for_random(entries)
    model = None if network is None else read_weights(network)
    for entry in entries:  # what cannot be opened is said before the first hour of work
        _open(entry, config, model, config.seed).close()
    rows = [_compare_entry(entry, config, train, val, model) for entry in entries]
    report = {
        "data": str(config.data),
        "train_images": len(train),
        "val_images": len(val),
        "classes": len(train.class_names or ()),
        "k": list(config.k),
        "temperature": config.temperature,
        "linear": config.linear,
        "seeds": seeds_of(config),
        "encoders": rows,
    }
    if config.out is not None:
        report = {"command": command_line("compare", config), **report}
        write_report(config.out, "compare", report, _page(config, report))
    narrow = [
        column for column in _columns(config) if column.key not in ("features", "dim", "linear_top5", "licence")
    ]  # 80 characters
    return Result(report, Table(f"top-1 on {config.data}", narrow, rows))


def read_entries(words: tuple[str, ...]) -> list[Entry]:
    """The encoders of a command line: `PATH`, `NAME=PATH`, `NAME=PATH@ARCHITECTURE`, `random`, `NAME=random`.

    Raises:
        ConfigError: none, nothing at a path, or two of one name.
    """
    if not words:
        raise ConfigError("compare needs encoders", hint="such as: mae-deploy compare mae=runs/mae random --data DATA")
    entries = [_entry(word) for word in words]
    names = [entry.name for entry in entries]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"two encoders are called '{twice[0]}'", hint="name them: NAME=PATH")
    return entries


def _entry(word: str) -> Entry:
    # What exists is a path, whatever signs are in it.
    name, equals, rest = ("", "", word) if Path(word).exists() else word.partition("=")
    if not equals:
        name, rest = "", word
    if rest == RANDOM and not Path(rest).exists():
        return Entry(name or RANDOM, None, None)
    path, at, architecture = (rest, "", "") if Path(rest).exists() else rest.rpartition("@")
    if not at:
        path = rest
    if not Path(path).exists():
        raise ConfigError(f"no encoder at {path}", hint="give a run, a checkpoint, a weights file, a bundle, or random")
    if at and not architecture:
        raise ConfigError(
            f"{word} names no architecture", hint="such as dino=weights.safetensors@vit_small_patch14_dinov2"
        )
    return Entry(name or Path(path).resolve().name, Path(path), architecture or None)


def network_for_random(entries: list[Entry]) -> Path | None:
    """The checkpoint whose architecture `random` takes; None without such an entry.

    Raises:
        ConfigError: there is none.
    """
    if not any(entry.kind == "random" for entry in entries):
        return None
    # Runs and checkpoint folders first: a weights file is only read where there is none.
    known = sorted(
        (entry for entry in entries if entry.kind == "checkpoint"),
        key=lambda entry: find_checkpoint(entry.path or Path()) is None,
    )
    if not known:
        raise ConfigError(
            "random has no network to take: there is no checkpoint among the encoders", hint="add a run or a checkpoint"
        )
    return known[0].path


def _compare_entry(
    entry: Entry, config: CompareConfig, train: ImageSource, val: ImageSource, model: LoadedWeights | None
) -> dict[str, Any]:
    """A row: figures are means over the seeds, with `_range` beside them."""
    heading(entry.name)
    found: list[dict[str, Any]] = []
    sets: tuple[FeatureSet, FeatureSet] | None = None
    about: dict[str, Any] = {}
    for seed in seeds_of(config):
        if sets is None or entry.kind == "random":
            source = _open(entry, config, model, seed)
            try:
                sets = tuple(
                    extract(source, images, config.features, title=title)
                    for title, images in (("train", train), ("val", val))
                )  # type: ignore[assignment]
            finally:
                source.close()
            about = {"features": source.description, "parameters": source.parameters, "licence": source.licence}
        assert sets is not None
        found.append(probe(config, *sets, len(train.class_names or ()), seed))
    assert sets is not None
    rates = [part.images_per_second for part in sets]
    return {
        "name": entry.name,
        "path": None if entry.path is None else str(entry.path),
        "kind": entry.kind,
        **about,
        "dim": sets[0].features.shape[1],
        "images_per_second": statistics.mean(rates),
        "unreadable": [*sets[0].unreadable, *sets[1].unreadable],
        **mean_of(found),
    }


def _open(entry: Entry, config: CompareConfig, model: LoadedWeights | None, seed: int) -> FeatureSource:
    if entry.path is None:
        assert model is not None
        return EncoderFeatures(random_like(model, seed), config.features, config.device)
    if entry.architecture is not None:
        return TimmFeatures(entry.path, entry.architecture, config.features, config.device)
    return open_source(entry.path, config.features, config.device)


def probe(config: CompareConfig, train: FeatureSet, val: FeatureSet, num_classes: int, seed: int) -> dict[str, float]:
    """Top-1 of k-NN for each k and of the linear probe, and its top-5."""
    device = resolve_device(config.device)
    neighbours = knn(train, val, num_classes, config.k, temperature=config.temperature, device=device)
    fitted = fit_linear(
        config.linear, train.features, train.labels, num_classes, held_out=config.held_out, seed=seed, device=device
    )
    linear = fitted.accuracy(val.features, val.labels)
    shares = {f"knn{k}_top1": neighbours[min(k, len(train.labels))]["top1"] for k in config.k}
    return {**shares, "linear_top1": linear.top1, "linear_top5": linear.top5}


def seeds_of(config: CompareConfig) -> list[int]:
    """The seeds themselves."""
    return [config.seed + seed for seed in config.seeds]


def _columns(config: CompareConfig) -> list[Column]:
    return [
        Column("encoder", "name"),
        Column("feature", "features"),
        Column("parameters, M", "parameters", "{:.2f}", 1e-6),
        Column("D", "dim"),
        *(Column(f"{k}-NN, %", f"knn{k}_top1", "{:.2f}") for k in config.k),
        Column("linear, %", "linear_top1", "{:.2f}"),
        Column("linear top-5, %", "linear_top5", "{:.2f}"),
        Column("images/s", "images_per_second", "{:.0f}"),
        Column("licence", "licence"),
    ]


def _page(config: CompareConfig, report: dict[str, Any]) -> Page:
    rows, seeds = report["encoders"], ",".join(map(str, report["seeds"]))
    bars = [*(Curve(f"{k}-NN", f"knn{k}_top1") for k in config.k), Curve("linear", "linear_top1")]
    return Page(
        title="Encoders compared",
        command=report["command"],
        parts=[
            f"{report['train_images']} training and {report['val_images']} validation images of {report['classes']}"
            f" classes; top-1 in per cent; {config.linear} linear probe on standardised features; mean and range over"
            f" the seeds {seeds}. images/s is the rate of the encoder alone.",
            Table("", _columns(config), rows),
            Picture("top-1", partial(draw_bars, rows=rows, bars=bars)),
        ],
    )
