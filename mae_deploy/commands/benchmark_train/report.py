"""What `benchmark-train` found: a table for the terminal, JSON and Markdown."""

from __future__ import annotations

import shlex
from functools import reduce
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from mae_deploy.commands.benchmark_train.config import BenchmarkTrainConfig
from mae_deploy.files import atomic_path, write_json, write_text
from mae_deploy.models.config import DecoderConfig, EncoderConfig
from mae_deploy.options import flags_of

JSON_FILE, MARKDOWN_FILE = "benchmark-train.json", "benchmark-train.md"

_ALWAYS = ("--model", "--decoder-embed-dim")

_COLUMNS = (
    ("step", "step", "{}"),
    ("precision", "precision", "{}"),
    ("ms a step", "step_ms", "{:.1f}"),
    ("images/s", "images_per_second", "{:.2f}"),
    ("TFLOP/s", "tflops", "{:.3f}"),
    ("of GEMM", "gemm_share", "{:.0%}"),
)


def report_view(report: dict[str, Any]) -> Group:
    """The table, and below it what it is compared with."""
    table = Table(box=SIMPLE_HEAD)
    for number, (title, _, _) in enumerate(_COLUMNS):
        table.add_column(title, justify="right" if number > 1 else "left")
    for cells in _cells(report):
        table.add_row(*cells)
    return Group(table, *(Text(line) for line in _notes(report)))


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Write JSON and Markdown, both or neither."""
    with atomic_path(folder) as aside:
        aside.mkdir()
        write_json(aside / JSON_FILE, report)
        write_text(aside / MARKDOWN_FILE, markdown(report))


def markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    rows = [[title for title, _, _ in _COLUMNS], ["---"] * len(_COLUMNS), *_cells(report)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    notes = "\n".join(f"- {line}" for line in _notes(report))
    return f"# Benchmark of the training step\n\n```sh\n{report['command']}\n```\n\n{table}\n\n{notes}\n"


def command_line(config: BenchmarkTrainConfig) -> str:
    """The command that makes this run; what has its default is left out."""
    words = ["mae-deploy", "benchmark-train"]
    # Numbers that follow from the names of model and decoder are defaults too.
    decoder = DecoderConfig(decoder_embed_dim=config.decoder.decoder_embed_dim)
    defaults = BenchmarkTrainConfig(model=EncoderConfig(name=config.model.name), decoder=decoder)
    for flag in flags_of(BenchmarkTrainConfig):
        value, default = _setting(config, flag.path), _setting(defaults, flag.path)
        if value == default and flag.name not in _ALWAYS:
            continue
        if isinstance(value, bool):
            words.append(flag.name if value else f"--no-{flag.name[2:]}")
        else:
            words += [flag.name, ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return shlex.join(words)


def _setting(config: Any, path: tuple[str, ...]) -> Any:
    return reduce(getattr, path, config)


def _cells(report: dict[str, Any]) -> list[list[str]]:
    return [[form.format(row[key]) for _, key, form in _COLUMNS] for row in report["rows"]]


def _notes(report: dict[str, Any]) -> list[str]:
    machine, losses = report["machine"], report["first_loss"]
    rates = ", ".join(f"{kind} {rate:.3f} TFLOP/s" for kind, rate in report["gemm_tflops"].items())
    return [
        f"{report['speedup']:.2f} times as fast as the plain step (medians of rounds that took turns)",
        (
            f"first losses {', '.join(f'{name} {loss:.6f}' for name, loss in losses.items())}: relative difference"
            f" {report['loss_difference']:.1e}"
        ),
        (
            f"products of large matrices, the yardstick of GEMM: {rates}; {report['rows'][0]['gflop_per_image']:.1f}"
            " GFLOP an image, forward and backward"
        ),
        f"{machine['device']}, {machine['threads']} threads, PyTorch {machine['torch']}",
    ]
