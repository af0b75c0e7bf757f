"""The quickstart's table and page."""

from __future__ import annotations

from typing import Any

from mae_deploy.reporting.markdown import Page
from mae_deploy.reporting.tables import Column, Row, Table

_NAMES = {
    "teacher": "teacher, pretrained and fine-tuned",
    "teacher_from_scratch": "same network from scratch",
    "student": "student, distilled",
    "student_from_scratch": "same student from scratch",
}


def quickstart_table(report: dict[str, Any], title: str = "") -> Table:
    """Everything that was measured, a row each."""
    return Table(title, (Column("measure", "measure"), Column("value", "value")), _rows(report))


def report_page(report: dict[str, Any]) -> Page:
    """The report for people."""
    dataset, protocol = report["dataset"], report["protocol"]
    seeds = ", ".join(map(str, protocol["seeds"]))
    return Page(
        title="Quickstart report",
        command=report["command"],
        parts=[
            f"Made in {report['seconds']:.0f} s.",
            (
                f"Data: {dataset['name']}, {dataset['images']}. Source: {dataset['source']}. Licence:"
                f" {dataset['licence']}."
            ),
            (
                f"Protocol: {protocol['unlabelled_images']} images without labels for pretraining and distillation;"
                f" {protocol['labels_per_class']} labels a class for fine-tuning; top-1 on"
                f" {protocol['test_images']} other images, after the last epoch. Seeds {seeds}; a seed changes"
                f" {protocol['a_seed_changes']}. Pretraining and feature distillation ran once, with seed"
                f" {protocol['pretraining_seed']}. Accuracies are means, the range over the seeds in brackets."
            ),
            quickstart_table(report),
            "![original, masked and reconstructed digits](reconstruction.png)",
        ],
    )


def _rows(report: dict[str, Any]) -> list[Row]:
    loss = report["mae_loss"]
    found = {"MAE loss, first → last": f"{loss['first']:.3f} → {loss['last']:.3f}"}
    for key, name in _NAMES.items():
        top1 = report["top1"][key]
        found[f"top-1, {name}"] = f"{top1['mean']:.1f} % ({top1['min']:.1f} to {top1['max']:.1f})"
    for name, parity in report["parity"].items():
        result = "ok" if parity["passed"] else "MISS"
        found[f"parity of {name}"] = f"{result}, cosine {parity['cosine']:.7f}, max abs {parity['max_abs']:.1e}"
    for name, times in report["latency"].items():
        found[f"latency, {name.replace('_', ' ')}, one thread"] = (
            f"full {times['full_ms']:.2f} ms, visible 25 % {times['visible_ms']:.2f} ms, ratio {times['ratio']:.2f}"
        )
    found |= {f"size of {name}": f"{size / 1e6:.2f} MB" for name, size in report["size_bytes"].items()}
    return [{"measure": measure, "value": value} for measure, value in found.items()]
