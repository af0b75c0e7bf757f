"""Encoders side by side at equal measured latency: each at the size, or on the patches, that it manages in time."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from mae_deploy import __version__
from mae_deploy.checkpoint import save_checkpoint
from mae_deploy.commands.compare.graphs import Graphs
from mae_deploy.commands.compare.points import OperatingPoint, fit
from mae_deploy.commands.compare.report import latency_page, latency_table, said
from mae_deploy.commands.compare.subjects import Subject, open_subject
from mae_deploy.commands.experiment import Parts, open_folder, slug
from mae_deploy.config import from_dict, merge, to_dict
from mae_deploy.data.config import ValidationConfig
from mae_deploy.data.sources.base import ImageSource
from mae_deploy.data.sources.splits import labelled_splits
from mae_deploy.evaluation.compare import network_for_random, probe, read_entries, seeds_of
from mae_deploy.evaluation.config import CompareConfig
from mae_deploy.evaluation.features import FeatureSet, extract
from mae_deploy.pretrain.config import FinetuneConfig
from mae_deploy.pretrain.finetune import run_finetune
from mae_deploy.progress import heading, notice, progress
from mae_deploy.recipe import read_recipe
from mae_deploy.reporting.command_line import command_line
from mae_deploy.reporting.machine import describe_machine
from mae_deploy.reporting.markdown import write_report
from mae_deploy.reporting.tables import mean_of
from mae_deploy.results import Result
from mae_deploy.runtime.parity.bounds import mean_interval
from mae_deploy.runtime.timing import measure
from mae_deploy.text import duration
from mae_deploy.training.device import resolve_device

CONFIG, POINTS, RESULT = "compare.yaml", "points.json", "result.json"

_QUICK, _FOR_GOOD = (7, 2), (30, 3)
"""Timed rounds and those before them: of a search, and of what is reported."""

WHOLE = "whole"
"""How an encoder that is fast enough meets the latency."""

Sets = tuple[FeatureSet, FeatureSet]


def run_compare_at_latency(config: CompareConfig) -> Result:
    """Find what each encoder manages in the time, and evaluate it there.

    Raises:
        ConfigError: an encoder that is not there, is named twice or cannot be exported, no labelled images, or a folder
            of another comparison.
        CheckFailed: weights that do not fit, or no image can be read.
    """
    assert config.latency is not None
    entries = read_entries(config.encoders)
    resolve_device(config.device)
    train, val = labelled_splits(config.data, config.validation, seed=config.seed)
    network = network_for_random(entries)
    subjects = {entry.name: open_subject(entry, config, network) for entry in entries}
    if config.out is not None:
        open_folder(config, CONFIG)
    found = Parts(_below(config, POINTS)).do("found", lambda: find_points(subjects, config))
    report = {
        "mae_deploy": __version__,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command_line("compare", config),
        "machine": found["machine"],
        "at_latency_ms": config.latency * 1000,
        "data": str(config.data),
        "train_images": len(train),
        "val_images": len(val),
        "classes": len(train.class_names or ()),
        "k": list(config.k),
        "linear": config.linear,
        "finetune_epochs": config.finetune_epochs,
        "seeds": seeds_of(config),
        "encoders": found["points"],
    }
    began, open_rows = time.monotonic(), [row for row in found["points"] if row["reached"]]
    for number, row in enumerate(open_rows):
        left = (time.monotonic() - began) / number * (len(open_rows) - number) if number else None
        heading(f"{row['name']} ({number + 1} of {len(open_rows)}{'' if left is None else f', {duration(left)} left'})")
        row |= _figures(subjects[row["name"]], row, config, train, val, network)
        notice(f"{row['name']}:", said(row))
        if config.out is not None:  # after each, so that a long comparison can be looked at while it runs
            write_report(config.out, "compare", report, latency_page(config, report))
    if config.out is not None and not open_rows:
        write_report(config.out, "compare", report, latency_page(config, report))
    return Result(report, latency_table(config, report))


def _below(config: CompareConfig, *names: str) -> Path | None:
    return None if config.out is None else config.out.joinpath(*names)


# --- latency ---------------------------------------------------------------------------------------------------------


def find_points(subjects: Mapping[str, Subject], config: CompareConfig) -> dict[str, Any]:
    """A row for each encoder that is fast enough as it is, and for each way in which `--fit` makes another fast enough
    or cannot; and the machine.
    """
    assert config.latency is not None
    with ExitStack() as stack:

        def opened(name: str) -> Graphs:
            graphs = subjects[name].graphs()
            stack.callback(graphs.close)
            return graphs

        own = {name: opened(name) for name in subjects}
        whole = {name: next(iter(graphs.ladders.values()))[-1] for name, graphs in own.items()}
        took = _timed(
            {(name, WHOLE): graphs for name, graphs in own.items()}, {(n, WHOLE): p for n, p in whole.items()}, True
        )
        ladders = {
            (name, how): points[:-1]
            for name, graphs in own.items()
            for how, points in graphs.ladders.items()
            if took[name, WHOLE] > config.latency and config.fit in (how, "both") and len(points) > 1
        }
        # Two searches of one encoder take turns, too: each has a graph of its own.
        first = {name: (name, how) for name, how in reversed(ladders)}
        graphs = {key: own[key[0]] if key == first[key[0]] else opened(key[0]) for key in ladders}
        with progress("search", max((len(points).bit_length() for points in ladders.values()), default=0)) as bar:

            def timed(points: Mapping[tuple[str, str], OperatingPoint], good: bool) -> dict[tuple[str, str], float]:
                if not good:
                    bar.advance()
                return _timed(graphs, points, good)

            found = fit(ladders, config.latency, timed)
    rows = []
    for name, subject in subjects.items():
        seconds = took[name, WHOLE]
        ways = {how: found[other, how] for other, how in ladders if other == name}
        for how, (point, least) in (
            ways or {WHOLE: (whole[name] if seconds <= config.latency else None, seconds)}
        ).items():
            shown = point or (ladders[name, how][0] if how in ways else whole[name])
            engine = f"{own[name].precision} on {own[name].engine[0]}"
            times = {"ms": least * 1000, "whole_ms": seconds * 1000}
            rows.append(
                {**subject.about, "graph": engine, "fit": how, "reached": point is not None, **_shape(shown), **times}
            )
    machine = describe_machine(
        dict(graphs.engine for graphs in own.values()), threads=config.features.threads, affinity=None
    )
    return {"machine": machine, "points": rows}


def _shape(point: OperatingPoint) -> dict[str, Any]:
    """A point for the report."""
    return {
        "image_size": list(point.image_size),
        "num_patches": point.num_patches,
        "keep": point.keep,
        "patches": str(point.keep) if point.whole else f"{point.keep} of {point.num_patches}",
        "size": "x".join(map(str, point.image_size)),
    }


def _timed(
    graphs: Mapping[tuple[str, str], Graphs], points: Mapping[tuple[str, str], OperatingPoint], good: bool
) -> dict[tuple[str, str], float]:
    """Median seconds of each, in turns."""
    repeats, warmup = _FOR_GOOD if good else _QUICK
    calls = {key: graphs[key].call(point) for key, point in points.items()}
    if not calls:
        return {}
    with progress("latency", len(calls) * (repeats + warmup), enabled=good) as bar:
        timings = measure(calls, repeats=repeats, warmup=warmup, after_call=bar.advance)
    return {key: timing.median for key, timing in timings.items()}


# --- accuracy --------------------------------------------------------------------------------------------------------


def _figures(
    subject: Subject,
    row: Mapping[str, Any],
    config: CompareConfig,
    train: ImageSource,
    val: ImageSource,
    network: Path | None,
) -> dict[str, Any]:
    """Means over the seeds, with `_interval`, `_range` and `_by_seed` beside them."""
    point = OperatingPoint(tuple(row["image_size"]), row["num_patches"], row["keep"])
    folder = _below(config, f"{slug(subject.entry.name)}-{row['fit']}")
    parts = Parts(None if folder is None else folder / RESULT)
    once = point.whole and subject.entry.kind != "random"
    sets: Sets | None = None
    found: list[dict[str, float]] = []
    for seed in seeds_of(config):
        if not parts.has(f"probe-{seed}"):
            if sets is None or not once:
                sets = _features(subject, point, config, train, val, seed)
            parts.do(f"probe-{seed}", partial(probe, config, *sets, len(train.class_names or ()), seed))
        figures = dict(parts.found[f"probe-{seed}"])
        if config.finetune_epochs is not None and folder is not None and subject.loaded is not None:
            tuned = _finetune_config(subject, point, config, network, folder, seed)
            figures |= parts.do(f"finetune-{seed}", partial(_finetune, tuned))
        found.append(figures)
    means = mean_of(found)
    if len(found) > 1:
        means |= {f"{key}_interval": list(mean_interval(means[f"{key}_by_seed"])) for key in found[0]}
    return means


def _features(
    subject: Subject, point: OperatingPoint, config: CompareConfig, train: ImageSource, val: ImageSource, seed: int
) -> Sets:
    source = subject.features(point, seed)
    try:
        known, asked = (
            extract(source, images, config.features, title=title) for title, images in (("train", train), ("val", val))
        )
        return known, asked
    finally:
        source.close()


def _finetune(config: FinetuneConfig) -> dict[str, float]:
    return {"finetune_top1": float(run_finetune(config)["top1"])}


def _finetune_config(
    subject: Subject, point: OperatingPoint, config: CompareConfig, network: Path | None, folder: Path, seed: int
) -> FinetuneConfig:
    """Fine-tuning at the point: as many patches, random ones, of images of its size."""
    init, scratch = subject.entry.path or network, subject.entry.kind == "random"
    if subject.entry.architecture is not None:
        assert subject.loaded is not None
        init = folder / "imported"
        if not init.exists():
            save_checkpoint(init, subject.loaded.tensors, subject.loaded.metadata)
    # A share is cut off to a whole number of patches: half a patch more gives this many.
    share = None if point.whole else [(point.keep + 0.5) / point.num_patches] * 2
    given = {
        "data": str(config.data),
        "init": init,
        "from_scratch": scratch,
        "out": folder / f"finetune-{seed}",
        "image_size": list(point.image_size),
        "keep_ratio": share,
        "resume": True,
        "seed": seed,
        "device": config.device,
        **({"validation": to_dict(config.validation)} if config.validation != ValidationConfig() else {}),
    }
    values = read_recipe(config.finetune_recipe) if config.finetune_recipe else {}
    return from_dict(FinetuneConfig, {**merge(values, {"optim": {"epochs": config.finetune_epochs}}), **given})
