"""What a stream was: the summary for the terminal, and the page with plots and frames."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mae_deploy.commands.stream.draw import Samples
from mae_deploy.commands.stream.panel import short_name
from mae_deploy.commands.stream.record import Record
from mae_deploy.reporting.machine import machine_table
from mae_deploy.reporting.markdown import Page, Picture
from mae_deploy.reporting.plots import PANEL, figure
from mae_deploy.reporting.tables import Column, Table, facts_table

_COLUMNS = 3


def summary_table(data: dict[str, Any]) -> Table:
    """The figures: of one source in words, of several a row each."""
    if "sources" not in data:
        return _source_table(data)
    rows = [
        {
            **source,
            "camera": number,
            "name": short_name(source["source"]),
            "latency": " / ".join(f"{milliseconds:.1f}" for milliseconds in source["latency_ms"].values()),
            "audit": source["audits"]["worst"],
            "problems": ", ".join(f"{name} {source[name]}" for name in ("dropped", "corrupt", "lost") if source[name]),
        }
        for number, source in enumerate(data["sources"])
    ]
    notes = [f"{row['camera']}: {row['stopped']}" for row in rows if row["stopped"]]
    notes += [f"stopped by {data['stopped']}"] if data["stopped"] else []
    files = [data["out"], data["report"], *(source["annotate"] for source in data["sources"])]
    if any(files):
        notes.append(f"written: {', '.join(file for file in files if file)}")
    return Table(f"{len(rows)} sources → {data['bundle']}", _SOURCES, rows, notes)


_SOURCES = (
    Column("", "camera"),
    Column("source", "name"),
    Column("frames", "frames"),
    Column("a second", "frames_per_second", "{:.1f}"),
    Column("patches", "patches", "{:.1%}"),
    Column("cost", "cost", "{:.2f}"),
    Column("p50 / p95 / p99 ms", "latency"),
    Column("worst dB", "audit", "{:.1f}"),
    Column("lost frames", "problems"),
)


def _source_table(data: dict[str, Any]) -> Table:
    times = data["latency_ms"]
    audits = data["audits"]
    facts: dict[str, Any] = {
        "frames": f"{data['frames']} in {data['seconds']:.1f} s, {data['frames_per_second']:.1f} a second",
        "patches computed": f"{data['patches']:.1%} on average, {data['cost']:.2f} of a whole frame's operations",
        "whole frames": ", ".join(f"{reason}: {count}" for reason, count in data["whole_frames"].items()) or None,
        "latency": f"p50 {times['p50']:.1f}, p95 {times['p95']:.1f}, p99 {times['p99']:.1f} ms",
        "audits": f"{audits['count']}, last {audits['last']:.1f} dB, worst {audits['worst']:.1f} dB"
        if audits["count"]
        else "none",
        "lost frames": f"dropped {data['dropped']}, corrupt {data['corrupt']}",
        "source lost": f"{data['lost']} times" if data["lost"] else None,
        "labels": f"{data['label_changes']} changes" if data["label_changes"] else None,
        "stopped by": data["stopped"],
        "written": ", ".join(data[name] for name in ("out", "annotate", "report") if data[name]) or None,
    }
    return facts_table(f"{data['source']} → {data['bundle']}", {k: v for k, v in facts.items() if v is not None})


def report_page(data: dict[str, Any], remembered: Sequence[tuple[Record, Samples | None]]) -> Page:
    """The report for people."""
    parts: list[str | Table | Picture] = []
    if "sources" in data:
        parts.append(summary_table(data))
        for number, (source, (record, samples)) in enumerate(zip(data["sources"], remembered, strict=True)):
            own = {**data, "out": None, "report": None, **source}
            parts += _source_parts(own, record, samples, f"-{number}")
    else:
        parts += _source_parts(data, *remembered[0], "")
    return Page(title="Stream", command=data["command"], parts=[*parts, machine_table(data)])


def _source_parts(
    data: dict[str, Any], record: Record, samples: Samples | None, suffix: str
) -> list[str | Table | Picture]:
    parts: list[str | Table | Picture] = [_source_table(data)]
    if len(record.points) > 1:
        draw = partial(_draw_curves, record)
        parts.append(Picture("patches computed and time a frame took", draw, f"curves{suffix}"))
    if samples is not None and samples.frames:
        parts.append(
            Picture(
                "frames of the stream: patches that were computed are tinted, a red border is a whole frame",
                partial(_draw_samples, samples.frames),
                f"frames{suffix}",
            )
        )
    event = (Column("frame", "frame"), Column("seconds", "time", "{:.2f}"))
    if data["labels"]:
        columns = (*event, Column("label", "label"), Column("probability", "probability", "{:.3f}"))
        parts.append(Table("Changes of the label", columns, data["labels"]))
    if data["events"]:
        parts.append(Table("What happened to the source", (*event, Column("event", "event")), data["events"]))
    return parts


def _draw_curves(record: Record, path: Path) -> None:
    frames = [point.frame for point in record.points]
    rows = 3 if record.audits else 2
    with figure(path, PANEL[0] * 1.5, PANEL[1] * rows / 2) as drawn:
        above, middle, *below = drawn.subplots(rows, sharex=True)
        above.plot(frames, [100 * point.patches for point in record.points], color="C0", linewidth=1)
        above.set(ylabel="patches computed, %", ylim=(0, 102))
        middle.plot(frames, [point.milliseconds for point in record.points], color="C1", linewidth=1)
        middle.set(ylabel="time of a frame, ms", ylim=(0, None))
        for axes in below:
            axes.plot(*zip(*record.audits, strict=True), color="C2", marker="o", markersize=3, linewidth=0.5)
            axes.set(ylabel="audits, dB")
        drawn.axes[-1].set(xlabel="frame" if record.step == 1 else f"frame (means of {record.step})")


def _draw_samples(samples: Sequence[tuple[int, Any]], path: Path) -> None:
    rows = -(-len(samples) // _COLUMNS)
    height, width, _ = samples[0][1].shape
    with figure(path, 3.5 * _COLUMNS, (3.5 * height / width + 0.3) * rows) as drawn:
        for axes, (number, pixels) in zip(drawn.subplots(rows, _COLUMNS, squeeze=False).flat, samples, strict=False):
            axes.imshow(pixels)
            axes.set_title(f"frame {number}")
        for axes in drawn.axes:
            axes.set_axis_off()
