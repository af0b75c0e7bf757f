"""What a training run found, or with `--plan` will take, for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mae_deploy.reporting.command_line import next_command
from mae_deploy.reporting.tables import Column, Table, facts_table
from mae_deploy.results import Result
from mae_deploy.text import amount, as_size, duration

SETTINGS, COUNTED, MEASURED, ESTIMATED = "settings", "counted", "measured", "estimated"
"""Where a number of a plan is from."""

_PLAN = (Column("", "what"), Column("", "value"), Column("", "source"))


def run_result(found: dict[str, Any]) -> Result:
    """The summary of a run, or its plan."""
    if "steps_done" in found:
        return Result(found, _plan(found))
    out = found["out"]
    return Result(found, facts_table("", _summary(found)), then=next_command("export", out, out=f"{out}-bundle"))


def _summary(found: Mapping[str, Any]) -> dict[str, Any]:
    """What is known, with units."""
    facts: dict[str, Any] = {"run folder": found["out"]}
    if found.get("steps"):
        facts["steps"] = f"{found['steps']:,}"
    if "first_loss" in found:
        facts["loss"] = f"{found['first_loss']:.4f} at the start, {found['last_loss']:.4f} in the last epoch"
    if "images_per_second" in found:
        facts["speed"] = f"{found['images_per_second']:.3g} images/s"
    for name, title in {"top1": "top-1", "top5": "top-5"}.items():
        if found.get(name) is not None:
            facts[title] = f"{found[name]:.2f} %"
    if found.get("best_top1") is not None and found["best_top1"] != found.get("top1"):
        facts["top-1"] = f"{facts['top-1']}, best {found['best_top1']:.2f} %"
    known = {"out", "steps", "first_loss", "last_loss", "images_per_second", "top1", "top5", "best_top1"}
    others = {name.replace("_", " "): value for name, value in found.items() if name not in known}
    return facts | {name: value for name, value in others.items() if value not in (0, None)}


def _plan(found: Mapping[str, Any]) -> Table:
    rows: list[tuple[str, str, str]] = [
        ("images", f"{found['images']:,}", COUNTED),
        ("epochs", f"{found['epochs']:,}", SETTINGS),
        ("images a step", _batch(found), SETTINGS),
        ("steps", _steps(found), SETTINGS),
        ("learning rate", f"{found['peak_lr']:.3g} after {found['warmup_epochs']:g} epochs of warm-up", SETTINGS),
        ("device", f"{found['device']}, {found['precision']}", SETTINGS),
        (
            "parameters",
            f"{amount(found['parameters'], '')}, {amount(found['trained_parameters'], '')} trained",
            COUNTED,
        ),
    ]
    if "step_seconds" not in found:
        return _table(found, rows, ["The run is at its end: no step is left."])
    rows += [
        ("operations", _operations(found), COUNTED),
        ("a step", f"{duration(found['step_seconds'])}, {found['images_per_second']:.3g} images/s", MEASURED),
        ("waiting for images", f"{found['data_wait']:.0%} of it", MEASURED),
    ]
    if found["validations"]:
        each = duration(found["validation_seconds"])
        rows.append(("a validation", f"{each}, {found['validation_images']:,} images", ESTIMATED))
    rows += [
        ("memory", _memory(found), MEASURED),
        ("a checkpoint", as_size(found["checkpoint_bytes"]), COUNTED),
        (
            "disk",
            f"{as_size(found['run_folder_bytes'])} at most, {as_size(found['free_bytes'])} free",
            ESTIMATED,
        ),
        ("time", duration(found["seconds"]), ESTIMATED),
    ]
    notes = [
        f"Measured on {found['measured_steps']} step{'' if found['measured_steps'] == 1 else 's'} of this run, of which"
        " nothing is kept. The time is that of its steps and validations, without checkpoints and pictures."
    ]
    if found["data_wait"] > 0.2:
        notes.append("The device waits for images: try more --num-workers, smaller images (data pack), or --cache.")
    if found["run_folder_bytes"] > found["free_bytes"]:
        notes.append("The disk has not enough room: fewer --keep-checkpoints, or another --out.")
    return _table(found, rows, notes)


def _table(found: Mapping[str, Any], rows: list[tuple[str, str, str]], notes: list[str]) -> Table:
    titles = [column.key for column in _PLAN]
    return Table(f"Plan: {found['stage']}", _PLAN, [dict(zip(titles, row, strict=True)) for row in rows], notes)


def _batch(found: Mapping[str, Any]) -> str:
    parts = [f"{found['batch_size']:,}"]
    parts += [f"{found[name]} {word}" for name, word in _SHARES.items() if found[name] > 1]
    return f"{found['images_per_step']:,}" + (f" = {' x '.join(parts)}" if len(parts) > 1 else "")


_SHARES = {"accum_iter": "accumulated", "processes": "processes"}


def _steps(found: Mapping[str, Any]) -> str:
    done = f", {found['steps_done']:,} of them done" if found["steps_done"] else ""
    return f"{found['steps']:,} = {found['steps_per_epoch']:,} an epoch{done}"


def _operations(found: Mapping[str, Any]) -> str:
    rate = amount(found["step_operations"] / found["step_seconds"], "FLOP/s")
    return f"{amount(found['operations'], 'FLOP')}, {amount(found['step_operations'], 'FLOP')} a step, {rate}"


def _memory(found: Mapping[str, Any]) -> str:
    parts = []
    if "gpu_memory_bytes" in found:
        total = as_size(found["gpu_memory_total_bytes"])
        parts.append(f"{as_size(found['gpu_memory_bytes'])} of {total} on the GPU")
    if found["memory_bytes"] is not None:
        parts.append(f"{as_size(found['memory_bytes'])}{' in this process' if found['workers'] else ''}")
    if found["workers"] and found["workers_memory_bytes"] is not None:
        parts.append(f"{as_size(found['workers_memory_bytes'])} in the workers ({found['workers']})")
    return ", ".join(parts) or "-"
