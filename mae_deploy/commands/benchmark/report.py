"""A benchmark's result: its tables, its page and its picture."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from mae_deploy.reporting import plots
from mae_deploy.reporting.machine import machine_table
from mae_deploy.reporting.markdown import Page, Picture
from mae_deploy.reporting.tables import Column, Row, Table, numbered
from mae_deploy.results import as_text

_NUMBER = Column("#", "number")
_LATENCY = (
    _NUMBER,
    Column("graph", "graph"),
    Column("precision", "precision"),
    Column("engine", "engine"),
    Column("batch", "batch"),
    Column("patches", "patches"),
    Column("p50 ms", "p50_ms", "{:.2f}"),
    Column("ratio", "ratio", "{:.3f}"),
)
_THROUGHPUT = (
    _NUMBER,
    Column("p95 ms", "p95_ms", "{:.2f}"),
    Column("p99 ms", "p99_ms", "{:.2f}"),
    Column("images/s", "images_per_second", "{:.1f}"),
    Column("× over full", "speedup_over_full", "{:.2f}"),
)
_COST = (
    _NUMBER,
    Column("GFLOP", "gflop_per_image", "{:.3g}"),
    Column("GFLOP/s", "gflops", "{:.1f}"),
    Column("of GEMM", "gemm_share", "{:.0f} %", 100),
    Column("bound", "bound"),
    Column("load s", "load_seconds", "{:.2f}"),
    Column("peak MiB", "peak_mib", "{:.0f}"),
    Column("size MB", "size_bytes", "{:.2f}", 1e-6),
    Column("cosine", "cosine", "{:.4f}"),
    Column("top-1", "top1", "{:.1f} %", 100),
)

_NOTES = (
    "Rows took turns, round by round; times are of the engine alone, without reading, cropping and normalising. × over"
    " full: compared with all patches in the same precision, batch size and engine; ratio: the time of an image over"
    " that of row 1. GFLOP are of one image; of GEMM: the share of the rate at which the same engine multiplied"
    " matrices in this run, in FP32, on a GPU in FP16, which lower precisions may exceed; bound: what takes most of a"
    " row's time, the arithmetic (compute), reading weights and activations (weights), or neither, which leaves the"
    " cost of calls and kernels (launch). Load time and peak memory are those of a fresh process for"
    " each row. The cosine is that of the features with those of all patches, by the FP32 graph where there is one, its"
    " mean over {images}."
)


def result_tables(report: dict[str, Any]) -> list[Table]:
    """Narrow enough for 80 characters: how long it takes; what it needs and is worth."""
    rows = numbered([{**row, "bound": row["roofline"] and row["roofline"]["bound"]} for row in report["rows"]])
    return [
        Table("Latency", _LATENCY, rows),
        Table("Tail and throughput", _THROUGHPUT, rows),
        Table("Cost and accuracy", _COST, rows),
    ]


def report_page(report: dict[str, Any]) -> Page:
    """The report for people."""
    rates = {engine: f"{rate:.0f} GFLOP/s" for engine, rate in report["gemm_gflops"].items()}
    read = {engine: f"{rate / 1e9:.0f} GB/s" for engine, rate in report["bytes_per_second"].items()}
    left_out = [f"- {combination['row']}: {combination['why']}" for combination in report["left_out"]]
    return Page(
        title="Benchmark",
        command=report["command"],
        parts=[
            machine_table(report, **{"GEMM": as_text(rates), "weights read": as_text(read)}),
            *result_tables(report),
            _NOTES.format(images=report["images"]),
            *(["## Left out", "\n".join(left_out)] if left_out else []),
            Picture("accuracy and latency against patches", partial(_draw, rows=report["rows"])),
        ],
    )


def _draw(path: Path, rows: list[Row]) -> None:
    """Top-1 and cosine, as far as there are any, and the latency of an image, each against the number of patches; a
    line for each graph.
    """
    panels: list[tuple[str, str, Callable[[Row], Any]]] = [
        ("top-1, %", "top1", lambda row: 100 * row["top1"]),
        ("cosine with all patches", "cosine", lambda row: row["cosine"]),
        ("ms an image, median", "p50_ms", lambda row: row["p50_ms"] / row["batch"]),
    ]
    panels = [panel for panel in panels if any(row[panel[1]] is not None for row in rows)]
    lines = _lines(rows)
    width, height = plots.PANEL
    with plots.figure(path, width * len(panels), height + 0.2 * len(lines)) as drawn:
        all_axes = drawn.subplots(1, len(panels), squeeze=False)[0]
        for axes, (title, key, value) in zip(all_axes, panels, strict=True):
            for index, (name, line) in enumerate(lines.items()):
                style = {**plots.line_style(index), "label": name}
                points = sorted(
                    (row["patches"], value(row)) for row in line if row["patches"] is not None and row[key] is not None
                )
                if points:
                    axes.plot(*zip(*points, strict=True), **style)
                elif line[0][key] is not None:
                    # A graph of other origin that takes whole images does not say how many patches those have.
                    axes.axhline(value(line[0]), linestyle=":", **style)
            axes.set(title=title, xlabel="patches kept")
            axes.xaxis.get_major_locator().set_params(integer=True)
        all_axes[-1].set_ylim(bottom=0)
        plots.legend_below(drawn, all_axes[-1])


def _lines(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows by what they have in common but the number of patches."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        parts = [row["graph"], row["precision"], row["engine"], f"batch {row['batch']}"]
        found.setdefault(", ".join(part for part in parts if part is not None), []).append(row)
    return found
