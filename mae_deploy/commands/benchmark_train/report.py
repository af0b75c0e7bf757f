"""What `benchmark-train` found: its table and its page."""

from __future__ import annotations

from typing import Any

from mae_deploy.reporting.markdown import Page
from mae_deploy.reporting.tables import Column, Table

_COLUMNS = (
    Column("step", "step"),
    Column("precision", "precision"),
    Column("ms a step", "step_ms", "{:.1f}"),
    Column("images/s", "images_per_second", "{:.2f}"),
    Column("TFLOP/s", "tflops", "{:.3f}"),
    Column("of GEMM", "gemm_share", "{:.0f} %", 100),
)


def result_table(report: dict[str, Any]) -> Table:
    """Both steps, and below them what they are compared with."""
    machine, losses = report["machine"], report["first_loss"]
    rates = ", ".join(f"{kind} {rate:.3f} TFLOP/s" for kind, rate in report["gemm_tflops"].items())
    notes = (
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
    )
    return Table("", _COLUMNS, report["rows"], notes)


def report_page(report: dict[str, Any]) -> Page:
    """The report for people."""
    return Page(title="Benchmark of the training step", command=report["command"], parts=[result_table(report)])
