"""How results look on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from mae_deploy.runtime.layers import LayerReport
from mae_deploy.runtime.manifest import EngineEntry
from mae_deploy.runtime.parity.checks import Verification


def verification_table(verification: Verification) -> Table:
    """A row for each output in each check."""
    engine = f"{verification.engine} {verification.engine_version} ({verification.device})"
    table = Table(title=Text(f"{verification.bundle} on {engine}, {verification.num_samples} samples"))
    for name in ("check", "output", "cosine", "centred cosine", "max abs", "SQNR dB", "result"):
        table.add_column(name, justify="left" if name in ("check", "output") else "right")
    for check in verification.checks:
        found = check.comparison
        result = "[red]miss[/red]" if check.failures else "[green]ok[/green]"
        figures = (f"{found.cosine:.7f}", f"{found.centred_cosine:.7f}", f"{found.max_abs:.2e}", f"{found.sqnr_db:.1f}")
        table.add_row(check.name, found.name, *figures, result)
    return table


def layers_table(report: LayerReport) -> Table:
    """A row for each block; the one where precision is lost is marked."""
    table = Table(title=Text(f"after each block, {report.num_tokens} tokens of {report.num_samples} samples"))
    for name in ("block", "cosine", "centred cosine", "SQNR dB", "drop dB", "max abs", "peak |x|", ""):
        table.add_column(name, justify="right" if name else "left")
    for layer in report.layers:
        found, drop = layer.comparison, "-" if layer.drop_db is None else f"{layer.drop_db:.1f}"
        figures = (
            f"{found.cosine:.7f}",
            f"{found.centred_cosine:.7f}",
            f"{found.sqnr_db:.1f}",
            drop,
            f"{found.max_abs:.2e}",
            f"{layer.peak:.4g}",
        )
        table.add_row(str(layer.block), *figures, "[red]here[/red]" if layer is report.lost_at else "")
    return table


def prediction_table(paths: Sequence[Path], ranked: Sequence[Sequence[tuple[str, float]]]) -> Table:
    """A row for each image: its most likely classes."""
    table = Table("image", "classes")
    for path, classes in zip(paths, ranked, strict=True):
        table.add_row(
            Text(str(path), overflow="fold"), Text("  ".join(f"{name} {share:.1%}" for name, share in classes))
        )
    return table


def engine_summary(entry: EngineEntry) -> str:
    """One line on a TensorRT engine: precision, version, GPU, sizes and latency."""
    profiles = "; ".join(
        " ".join(f"{name}:{','.join(map(str, sizes))}" for name, sizes in profile.items())
        for profile in entry["profiles"]
    )
    latency = "" if entry["latency_ms"] is None else f", {entry['latency_ms']:.2f} ms"
    return f"{entry['precision']}, TensorRT {entry['tensorrt']}, {entry['gpu']}, {profiles}{latency}"
