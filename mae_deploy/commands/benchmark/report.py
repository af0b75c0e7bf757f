"""A benchmark's result as tables in the terminal and in Markdown, as JSON and as a plot."""

from __future__ import annotations

import dataclasses
import platform
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from mae_deploy.commands.benchmark.config import BenchmarkConfig
from mae_deploy.errors import MissingDependency, import_optional
from mae_deploy.files import atomic_path, write_json, write_text
from mae_deploy.machine import cpu_features, cpu_name, granted_cores
from mae_deploy.options import flags_of
from mae_deploy.progress import notice
from mae_deploy.runtime.cuda.driver import gpus
from mae_deploy.runtime.engines.base import EngineOptions
from mae_deploy.runtime.registry import TENSORRT

JSON_FILE, MARKDOWN_FILE, PLOT_FILE = "benchmark.json", "benchmark.md", "benchmark.png"

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Column:
    """One column: its title, the figure that it shows, and how."""

    title: str
    key: str
    form: str = "{}"
    scale: float | None = None

    def cell(self, row: Row) -> str:
        """The figure as text; a dash where there is none."""
        value = row[self.key]
        if value is None:
            return "-"
        return self.form.format(value if self.scale is None else value * self.scale)


LATENCY = (
    Column("#", "number"),
    Column("graph", "graph"),
    Column("precision", "precision"),
    Column("engine", "engine"),
    Column("batch", "batch"),
    Column("patches", "patches"),
    Column("p50 ms", "p50_ms", "{:.2f}"),
    Column("ratio", "ratio", "{:.3f}"),
)
THROUGHPUT = (
    Column("#", "number"),
    Column("p95 ms", "p95_ms", "{:.2f}"),
    Column("p99 ms", "p99_ms", "{:.2f}"),
    Column("images/s", "images_per_second", "{:.1f}"),
    Column("× over full", "speedup_over_full", "{:.2f}"),
)
COST = (
    Column("#", "number"),
    Column("GFLOP", "gflop_per_image", "{:.3g}"),
    Column("GFLOP/s", "gflops", "{:.1f}"),
    Column("of GEMM", "gemm_share", "{:.0f} %", 100),
    Column("load s", "load_seconds", "{:.2f}"),
    Column("peak MiB", "peak_mib", "{:.0f}"),
    Column("size MB", "size_bytes", "{:.2f}", 1e-6),
    Column("cosine", "cosine", "{:.4f}"),
    Column("top-1", "top1", "{:.1f} %", 100),
)
_TEXT = ("graph", "precision", "engine")


def report_view(report: dict[str, Any]) -> Group:
    """Tables for the terminal, narrow enough for 80 characters: how long it takes; what it needs and is worth."""
    return Group(*(_rich(title, columns, report) for title, columns in _tables(report)))


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Write the JSON, the Markdown and, where matplotlib is installed, the picture: all of them or nothing."""
    with atomic_path(folder) as aside:
        aside.mkdir()
        picture = True
        try:
            plot(aside / PLOT_FILE, report["rows"])
        except MissingDependency as error:
            notice("no picture:", f"{error}; {error.hint}")
            picture = False
        write_json(aside / JSON_FILE, report)
        write_text(aside / MARKDOWN_FILE, markdown(report, picture=picture))


def markdown(report: dict[str, Any], *, picture: bool) -> str:
    """The report as a page."""
    facts = "\n".join(f"| {name} | {value} |" for name, value in _facts(report).items())
    parts = [f"# Benchmark\n\n```sh\n{report['command']}\n```\n\n| machine | |\n|---|---|\n{facts}\n"]
    parts += [f"## {title}\n\n{_markdown_table(columns, report)}\n" for title, columns in _tables(report)]
    parts.append(_NOTES.format(images=report["images"]))
    if picture:
        parts.append(f"![accuracy and latency against patches]({PLOT_FILE})\n")
    if report["left_out"]:
        parts.append(
            "## Left out\n\n"
            + "\n".join(f"- {_escaped(combination['row'])}: {combination['why']}" for combination in report["left_out"])
            + "\n"
        )
    return "\n".join(parts)


_NOTES = """Rows took turns, round by round; times are of the engine alone, without reading, cropping and normalising. "× over full" compares with all
patches in the same precision, batch size and engine; "ratio" is the time of an image over that of row 1. GFLOP are of one image; "of GEMM" is the share of
the rate at which the same engine multiplied FP32 matrices in this run, which INT8 and BF16 may exceed. Load time and peak memory are those of a fresh
process for each row. The cosine is that of the features with those of all patches, by the FP32 graph where there is one, its mean over {images}.
"""


# --- tables ----------------------------------------------------------------------------------------------------------


def _tables(report: dict[str, Any]) -> list[tuple[str, list[Column]]]:
    """Titles and columns, without the columns in which nothing stands."""
    tables = (("Latency", LATENCY), ("Tail and throughput", THROUGHPUT), ("Cost and accuracy", COST))
    return [
        (title, [column for column in columns if any(column.cell(row) != "-" for row in _numbered(report))])
        for title, columns in tables
    ]


def _numbered(report: dict[str, Any]) -> list[Row]:
    return [{"number": index, **row} for index, row in enumerate(report["rows"], start=1)]


def _rich(title: str, columns: list[Column], report: dict[str, Any]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column.title, justify="left" if column.key in _TEXT else "right", overflow="fold")
    for row in _numbered(report):
        table.add_row(*(Text(column.cell(row)) for column in columns))
    return table


def _markdown_table(columns: list[Column], report: dict[str, Any]) -> str:
    lines = [[column.title for column in columns], ["---" if column.key in _TEXT else "--:" for column in columns]]
    lines += [[_escaped(column.cell(row)) for column in columns] for row in _numbered(report)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def _facts(report: dict[str, Any]) -> dict[str, str]:
    machine = report["machine"]
    threads = f"{machine['threads']} of {machine['cores']} cores" + (
        f", bound to {machine['affinity']}" if machine["affinity"] else ""
    )
    versions = {
        "mae-deploy": report["mae_deploy"],
        "Python": machine["python"],
        "NumPy": machine["numpy"],
        **machine["engines"],
    }
    return {
        "CPU": ", ".join([machine["cpu"], *machine["instructions"]]),
        "threads": threads,
        **({"GPU": machine["gpu"]} if machine["gpu"] else {}),
        "system": machine["system"],
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "GEMM, FP32": (
            ", ".join(f"{engine} {rate:.0f} GFLOP/s" for engine, rate in report["gemm_gflops"].items()) or "-"
        ),
        "date": report["created"],
    }


# --- the machine and the command -------------------------------------------------------------------------------------


def describe_machine(
    engines: dict[str, str], *, threads: int | None, affinity: tuple[int, ...] | None
) -> dict[str, Any]:
    """What the figures depend on; `engines` are names and versions."""
    cores = granted_cores()
    return {
        "cpu": cpu_name(),
        "instructions": cpu_features() or [],
        "cores": cores,
        "threads": EngineOptions(threads=threads, affinity=affinity).num_threads or cores,
        "affinity": ",".join(map(str, affinity)) if affinity else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "gpu": ", ".join(f"{gpu.name}, CUDA {gpu.driver}" for gpu in gpus()[:1]) if TENSORRT in engines else None,
        "engines": engines,
    }


def command_line(config: BenchmarkConfig) -> str:
    """The command that makes this run; what has its default is left out."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    words = ["mae-deploy", "benchmark"]
    for flag in flags_of(BenchmarkConfig):
        value = getattr(config, flag.path[0])
        if flag.argument:
            words += map(str, value)
        elif value != defaults[flag.path[0]]:
            words += _option(flag.name, value)
    return shlex.join(words)


def _option(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [name if value else f"--no-{name[2:]}"]
    return [name, ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]


# --- the picture -----------------------------------------------------------------------------------------------------


def plot(path: Path, rows: list[Row]) -> None:
    """Top-1 and cosine, as far as there are any, and the latency of an image, each against the number of patches; a
    line for each graph.

    Raises:
        MissingDependency: matplotlib is not installed.
    """
    figure_module = import_optional("matplotlib.figure", extra="plot")
    panels: list[tuple[str, str, Callable[[Row], Any]]] = [
        ("top-1, %", "top1", lambda row: 100 * row["top1"]),
        ("cosine with all patches", "cosine", lambda row: row["cosine"]),
        ("ms an image, median", "p50_ms", lambda row: row["p50_ms"] / row["batch"]),
    ]
    panels = [panel for panel in panels if any(row[panel[1]] is not None for row in rows)]
    series_by_name = _series(rows)
    figure = figure_module.Figure(figsize=(5 * len(panels), 4 + 0.2 * len(series_by_name)), layout="constrained")
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, key, value) in zip(all_axes, panels, strict=True):
        for index, (name, series) in enumerate(series_by_name.items()):
            style = {"color": f"C{index % 10}", "marker": "os^v"[index // 10 % 4], "label": name}
            points = sorted(
                (row["patches"], value(row)) for row in series if row["patches"] is not None and row[key] is not None
            )
            if points:
                axes.plot(*zip(*points, strict=True), **style)
            elif (
                series[0][key] is not None
            ):  # a graph of other origin of whole images: it does not say how many patches those have
                axes.axhline(value(series[0]), linestyle=":", **style)
        axes.set(title=title, xlabel="patches kept")
        axes.grid(alpha=0.3)
    all_axes[-1].set_ylim(bottom=0)
    figure.legend(*all_axes[-1].get_legend_handles_labels(), loc="outside lower center", fontsize="small")
    figure.savefig(path, dpi=150)


def _series(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows by what they have in common but the number of patches."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        parts = [row["graph"], row["precision"], row["engine"], f"batch {row['batch']}"]
        name = ", ".join(part for part in parts if part is not None).replace("$", r"\$")
        found.setdefault(name, []).append(row)
    return found
