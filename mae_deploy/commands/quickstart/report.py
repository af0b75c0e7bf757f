"""The quickstart's tables, pictures and page."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from mae_deploy.commands.quickstart.speed import has_vnni
from mae_deploy.reporting import plots
from mae_deploy.reporting.machine import machine_table
from mae_deploy.reporting.markdown import Page, Picture
from mae_deploy.reporting.tables import Column, Row, Table

_NAMES = {
    "teacher": "teacher, pretrained and fine-tuned",
    "teacher_from_scratch": "same network from scratch",
    "student": "student, distilled",
    "student_from_scratch": "same student from scratch",
}

_SPEED = (
    Column("model", "model"),
    Column("engine", "engine"),
    Column("precision", "precision"),
    Column("patches", "patches"),
    Column("p50 ms", "p50_ms", "{:.1f}"),
    Column("ratio", "ratio", "{:.2f}"),
)

_SHORT = {"vit_small_patch16": "ViT-S", "vit_base_patch16": "ViT-B"}


def result_tables(report: dict[str, Any]) -> list[Table]:
    """What was measured: of the digits, of real sizes, and of the stream."""
    note = "ratio: to the model's 196 patches in FP32 on that engine; one thread, batch 1, random weights."
    return [
        Table("The chain on digits", (Column("measure", "measure"), Column("value", "value")), _digits(report)),
        Table("Patches and precision at 224 pixels", _SPEED, report["speed"], [note, *_int8_notes(report)]),
        Table("A stream", (Column("measure", "measure"), Column("value", "value")), _stream(report["stream"])),
    ]


def report_page(report: dict[str, Any]) -> Page:
    """The report for people."""
    dataset, protocol = report["dataset"], report["protocol"]
    seeds = ", ".join(map(str, protocol["seeds"]))
    digits, speed, stream = result_tables(report)
    columns = (
        Column("stage", "stage"),
        Column("planned", "planned_seconds", "{:.0f} s"),
        Column("took", "seconds", "{:.0f} s"),
    )
    return Page(
        title="Quickstart report",
        command=report["command"],
        parts=[
            f"Made in {report['seconds']:.0f} s.",
            digits,
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
            "![original, masked and reconstructed digits](reconstruction.png)",
            speed,
            Picture(
                "latency of all patches and of a quarter, FP32 and INT8", partial(_draw, rows=report["speed"]), "speed"
            ),
            (
                "Every row is a graph as `mae-deploy export` writes it; a visible-token graph takes the patches to look"
                " at as an input. `mae-deploy benchmark` times bundles of yours in the same way."
            ),
            stream,
            "![frames of the stream; what was not computed is dark](stream.png)",
            (
                "Of the first frame everything is computed; then what changed, and the oldest patches in turn. The"
                " features are those of the whole frame (`backbone.stream()`). Random weights say nothing about how"
                " near a trained encoder's features are."
            ),
            Table("Time", columns, report["stages"]),
            machine_table(report),
        ],
    )


def _digits(report: dict[str, Any]) -> list[Row]:
    loss = report["mae_loss"]
    found = {"MAE loss, first → last": f"{loss['first']:.3f} → {loss['last']:.3f}"}
    for key, name in _NAMES.items():
        top1 = report["top1"][key]
        range_ = f" ({top1['min']:.1f} to {top1['max']:.1f})" if len(top1["by_seed"]) > 1 else ""
        found[f"top-1, {name}"] = f"{top1['mean']:.1f} %{range_}"
    for name, parity in report["parity"].items():
        result = "ok" if parity["passed"] else "MISS"
        found[f"parity of {name}"] = f"{result}, cosine {parity['cosine']:.7f}, max abs {parity['max_abs']:.1e}"
    found |= {f"size of {name}": f"{size / 1e6:.2f} MB" for name, size in report["size_bytes"].items()}
    return [{"measure": measure, "value": value} for measure, value in found.items()]


def _stream(stream: dict[str, Any]) -> list[Row]:
    found = {
        "frame, whole": f"{stream['whole_ms']:.1f} ms",
        "frame of the stream": f"{stream['stream_ms']:.1f} ms, ratio {stream['ratio']:.2f}",
        "operations": f"{100 * stream['operations']:.0f} % of the whole frame's",
        "cosine of cls with the whole frame's": f"{stream['cosine']:.4f}",
        "model": f"{stream['model']}, random weights, {stream['frames']} made frames, one thread",
    }
    return [{"measure": measure, "value": value} for measure, value in found.items()]


def _int8_notes(report: dict[str, Any]) -> list[str]:
    notes = []
    if not has_vnni():
        notes.append(
            "This CPU has no VNNI: INT8 has weights of 7 bits on ONNX Runtime, and brings nothing on OpenVINO"
            " (docs/int8-rejected.md)."
        )
    if "openvino" not in report["machine"]["engines"]:
        notes.append("OpenVINO is not installed: pip install 'mae-deploy[openvino]' adds a second engine.")
    return notes


def _draw(path: Path, rows: list[Row]) -> None:
    """A panel for each model: a bar for each engine, precision and number of patches."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    width, height = plots.PANEL
    with plots.figure(path, width * len(models), height * 0.7) as drawn:
        for axes, model in zip(drawn.subplots(1, len(models), squeeze=False)[0], models, strict=True):
            own = [row for row in rows if row["model"] == model]
            labels = [f"{row['engine']}, {row['precision'].upper()}, {row['patches']} patches" for row in own]
            most = max(row["patches"] for row in own)
            colours = [f"C{0 if row['patches'] == most else 1}" for row in own]
            bars = axes.barh(labels, [row["p50_ms"] for row in own], color=colours)
            axes.bar_label(bars, [f"{row['p50_ms']:.0f} ms" for row in own], padding=3)
            axes.set(title=_SHORT.get(model, model), xlabel="ms an image, median, one thread")
            axes.margins(x=0.12)
            axes.invert_yaxis()
            axes.yaxis.grid(False)
