"""The table and the page of `compare --at-latency`."""

from __future__ import annotations

from functools import partial
from typing import Any

from mae_deploy.evaluation.config import CompareConfig
from mae_deploy.reporting.machine import machine_table
from mae_deploy.reporting.markdown import Page, Picture
from mae_deploy.reporting.plots import Curve, draw_bars
from mae_deploy.reporting.tables import Column, Table


def latency_table(config: CompareConfig, report: dict[str, Any]) -> Table:
    """For the terminal: a row for each encoder and what makes it fast enough, and who is not."""
    machine, seeds = report["machine"], ",".join(map(str, report["seeds"]))
    engines = " and ".join(" ".join(engine) for engine in machine["engines"].items())
    threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
    notes = [
        f"ms: medians here, in turns, on {engines}, {threads}"
        + (f"; ±: 95 % interval over the seeds {seeds}" if len(report["seeds"]) > 1 else ""),
        *_why(report),
    ]
    narrow = [column for column in _columns(config) if column.key not in ("whole_ms", "graph")]
    return Table(
        f"top-1 in % on {report['data']} within {config.at_latency} for one image", narrow, _shown(report), notes
    )


def latency_page(config: CompareConfig, report: dict[str, Any]) -> Page:
    """The same for a file, with the machine and a picture."""
    rows = _shown(report)
    bars = [*(Curve(f"{k}-NN", f"knn{k}_top1") for k in config.k), Curve("linear", "linear_top1")]
    if config.finetune_epochs is not None:
        bars.append(Curve("fine-tuned", "finetune_top1"))
    drawn = [{**row, "name": f"{row['name']}, {row['patches']}"} for row in rows if bars[-1].key in row]
    seeds = ",".join(map(str, report["seeds"]))
    found = f"{report['train_images']} training and {report['val_images']} validation images"
    parts: list[Any] = [
        f"{found} of {report['classes']} classes; top-1 in per cent within {config.at_latency} for one image: the mean"
        f" over the seeds {seeds} and half its 95 % interval (Student's). ms are medians of calls that took turns;"
        " encoders that are fast enough run as they are, others on random patches or smaller images.",
        Table("", _columns(config), rows, _why(report)),
        *([Picture("top-1", partial(draw_bars, rows=drawn, bars=bars))] if drawn else []),
        machine_table(report),
    ]
    return Page(title="Encoders at equal latency", command=report["command"], parts=parts)


def said(row: dict[str, Any]) -> str:
    """A finished row in words."""
    names = {"linear_top1": "linear", "finetune_top1": "fine-tuned"}
    figures = [
        f"{names.get(key, key.removesuffix('_top1').replace('knn', 'k-NN '))} {row[key]:.2f}"
        for key in row
        if key.endswith("_top1")
    ]
    return f"{row['patches']} patches at {row['size']}, {row['ms']:.2f} ms: {', '.join(figures)} % top-1"


def _columns(config: CompareConfig) -> list[Column]:
    return [
        Column("encoder", "name"),
        Column("patches", "patches"),
        Column("size", "size"),
        Column("ms", "ms", "{:.2f}"),
        Column("as it is, ms", "whole_ms", "{:.2f}"),
        Column("params, M", "parameters", "{:.2f}", 1e-6),
        *(Column(f"{k}-NN", f"knn{k}_top1", "{:.1f}") for k in config.k),
        Column("linear", "linear_top1", "{:.1f}"),
        Column("fine-tuned", "finetune_top1", "{:.1f}"),
        Column("graph", "graph"),
    ]


def _shown(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [row if row["reached"] else {**row, "patches": "none", "size": None} for row in report["encoders"]]


def _why(report: dict[str, Any]) -> list[str]:
    """A line for each encoder that does not reach the latency."""
    return [
        f"{row['name']} does not reach {report['at_latency_ms']:g} ms: {row['ms']:.2f} ms with {row['patches']}"
        f" patch{'es' if row['num_patches'] > 1 else ''} at {row['size']}"
        for row in report["encoders"]
        if not row["reached"]
    ]
