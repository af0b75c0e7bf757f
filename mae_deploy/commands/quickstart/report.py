"""The quickstart's table and its report in Markdown and JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from mae_deploy.files import write_json, write_text

_NAMES = {
    "teacher": "teacher, pretrained and fine-tuned",
    "teacher_from_scratch": "same network from scratch",
    "student": "student, distilled",
    "student_from_scratch": "same student from scratch",
}


def quickstart_table(report: dict[str, Any]) -> Table:
    """Everything that was measured, a row each."""
    table = Table("measure", "value", title=f"Quickstart, {report['seconds']:.0f} s")
    for name, value in _rows(report):
        table.add_row(name, value)
    return table


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Write `report.json` and `report.md`."""
    write_json(folder / "report.json", report)
    dataset, protocol = report["dataset"], report["protocol"]
    rows = "\n".join(f"| {name} | {value} |" for name, value in _rows(report))
    seeds = ", ".join(map(str, protocol["seeds"]))
    write_text(
        folder / "report.md",
        f"""# Quickstart report

Made by `mae-deploy quickstart` in {report["seconds"]:.0f} s.

Data: {dataset["name"]}, {dataset["images"]}. Source: {dataset["source"]}. Licence: {dataset["licence"]}.

Protocol: {protocol["unlabelled_images"]} images without labels for pretraining and distillation; {protocol["labels_per_class"]} labels a class for
fine-tuning; top-1 on {protocol["test_images"]} other images, after the last epoch. Seeds {seeds}; a seed changes {protocol["a_seed_changes"]}.
Pretraining and feature distillation ran once, with seed {protocol["pretraining_seed"]}. Accuracies are means, the range over the seeds in brackets.

| measure | value |
|---|---|
{rows}

![original, masked and reconstructed digits](reconstruction.png)
""",
    )


def _rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    loss = report["mae_loss"]
    rows = [("MAE loss, first → last", f"{loss['first']:.3f} → {loss['last']:.3f}")]
    for key, name in _NAMES.items():
        found = report["top1"][key]
        rows.append((f"top-1, {name}", f"{found['mean']:.1f} % ({found['min']:.1f} to {found['max']:.1f})"))
    for name, found in report["parity"].items():
        rows.append(
            (
                f"parity of {name}",
                f"{'ok' if found['passed'] else 'MISS'}, cosine {found['cosine']:.7f}, max abs {found['max_abs']:.1e}",
            )
        )
    for name, found in report["latency"].items():
        value = f"full {found['full_ms']:.2f} ms, visible 25 % {found['visible_ms']:.2f} ms, ratio {found['ratio']:.2f}"
        rows.append((f"latency, {name.replace('_', ' ')}, one thread", value))
    rows += [(f"size of {name}", f"{size / 1e6:.2f} MB") for name, size in report["size_bytes"].items()]
    return rows
