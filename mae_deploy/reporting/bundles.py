"""What is told of a bundle: its parity with PyTorch, output by output and block by block, and its engines."""

from __future__ import annotations

from dataclasses import asdict

from mae_deploy.reporting.tables import Column, Table
from mae_deploy.runtime.layers import LayerReport
from mae_deploy.runtime.manifest import EngineEntry, plan_engine
from mae_deploy.runtime.parity.checks import Verification
from mae_deploy.runtime.tensorrt.plans import TENSORRT_RTX, title

UNVERIFIED = "no GPU has run it yet, the first one that loads it checks it"

PARITY = (
    Column("cosine", "cosine", "{:.7f}"),
    Column("centred cosine", "centred_cosine", "{:.7f}"),
    Column("max abs", "max_abs", "{:.2e}"),
    Column("SQNR dB", "sqnr_db", "{:.1f}"),
)
"""The figures of a `Comparison`."""


_NO_FRAME = "preprocessing was not checked: only bundles have a frame for that, and those of older versions have none"


def verification_table(verification: Verification) -> Table:
    """A row for each output in each check."""
    engine = f"{verification.engine} {verification.engine_version} ({verification.device})"
    rows = [
        {"check": check.name, **asdict(check.comparison), "result": "miss" if check.failures else "ok"}
        for check in verification.checks
    ]
    result = Column("result", "result", colour=lambda text: "red" if text == "miss" else "green")
    return Table(
        f"{verification.bundle} on {engine}, {verification.num_samples} samples",
        (Column("check", "check"), Column("output", "name"), *PARITY, result),
        rows,
        [] if verification.preprocessing is not None else [_NO_FRAME],
    )


def blocks_table(report: LayerReport) -> Table:
    """A row for each block; the one where precision is lost is marked."""
    rows = [
        {
            "block": layer.block,
            **asdict(layer.comparison),
            "drop_db": layer.drop_db,
            "peak": layer.peak,
            "lost": "here" if layer is report.lost_at else "",
        }
        for layer in report.layers
    ]
    columns = (
        Column("block", "block"),
        *PARITY,
        Column("drop dB", "drop_db", "{:.1f}"),
        Column("peak |x|", "peak", "{:.4g}"),
        Column("", "lost", colour=lambda _: "red"),
    )
    title = f"after each block, {report.num_tokens} tokens of {report.num_samples} samples"
    return Table(title, columns, rows, [report.conclusion])


def engine_summary(entry: EngineEntry) -> str:
    """One line on a TensorRT engine: precision, version, GPU, sizes and latency."""
    profiles = "; ".join(
        " ".join(f"{name}:{','.join(map(str, sizes))}" for name, sizes in profile.items())
        for profile in entry["profiles"]
    )
    latency = "" if entry["latency_ms"] is None else f", {entry['latency_ms']:.2f} ms"
    gpu, state = entry["gpu"], ""
    if plan_engine(entry) == TENSORRT_RTX:
        gpu = f"RTX GPUs from compute capability {'.'.join(map(str, entry['compute_capability']))} on"
        on = ", ".join(entry["parity"])
        state = f", verified on {on}" if on else f", not verified: {UNVERIFIED}"
    return f"{entry['precision']}, {title(entry)}, {gpu}, {profiles}{latency}{state}"
