"""What is told of a bundle: its parity with PyTorch, output by output and block by block, and its engines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from mae_deploy.reporting.command_line import next_command
from mae_deploy.reporting.tables import Column, Table, facts_table
from mae_deploy.runtime.bundle import Bundle
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
        [
            *(f"left out: {reason}" for reason in verification.left_out),
            *([] if verification.preprocessing is not None else [_NO_FRAME]),
        ],
    )


def certificate_tables(record: Mapping[str, Any]) -> list[Table]:
    """A certificate in words, and its rules: the record of `runtime.parity.certificate`."""
    facts: dict[str, str] = {"measured on": _place(record), "images": record["images"]}
    if (classes := record["classes"]) is not None:
        low, high = classes["agreement_interval"]
        facts["same class as FP32"] = (
            f"{classes['agreement']:.2%} of {classes['images']} images ({low:.2%} to {high:.2%})"
        )
        if classes["labelled"]:
            low, high = classes["drop_interval"]
            facts["top-1"] = f"{classes['top1']:.2f} %, FP32 {classes['fp32_top1']:.2f} %"
            facts["points lost"] = (
                f"{classes['drop']:.2f} ({low:.2f} to {high:.2f}): {classes['lost']} images lost, {classes['gained']}"
                f" gained, McNemar p = {classes['mcnemar_p']:.3g}"
            )
        else:
            facts["top-1"] = "not known: the images have no labels"
    if (speed := record["speed"]) is not None:
        low, high = speed["ratio_interval"]
        facts["latency"] = (
            f"{speed['ratio']:.2f} of {speed['baseline'].upper()}'s ({low:.2f} to {high:.2f}), {speed['ms']:.2f}"
            f" against {speed['baseline_ms']:.2f} ms in {speed['rounds']} rounds"
        )
    for output in record["outputs"]:
        decibels = output["worst_sqnr_db"]
        facts[f"worst image, {output['name']}"] = (
            f"SQNR {'infinite' if decibels is None else f'{decibels:.1f} dB'}, centred cosine"
            f" {output['centred_cosine']:.6f}"
        )
    rules = [
        {
            "rule": rule["rule"],
            "limit": next(
                f"{words} {rule[kind]:g}"
                for kind, words in (("at_least", "at least"), ("at_most", "at most"), ("below", "below"))
                if kind in rule
            ),
            "value": rule["value"],
            "result": "ok" if rule["passed"] else "miss",
        }
        for rule in record["rules"]
    ]
    result = Column("result", "result", colour=lambda text: "red" if text == "miss" else "green")
    columns = (Column("rule", "rule"), Column("limit", "limit"), Column("value", "value", "{:.6g}"), result)
    title = f"Certificate, intervals of {record['confidence']:.0%} confidence"
    return [facts_table(title, facts), Table("Rules", columns, rules)]


def _place(record: Mapping[str, Any]) -> str:
    count = record["threads"]
    threads = "" if count is None else f", {count} thread{'' if count == 1 else 's'}"
    return f"{record['engine']} {record['engine_version']}, {record['device']}, {record['cpu']}{threads}"


def run_command(bundle: Bundle, address: object) -> str:
    """The command that uses a bundle, as a line to copy; what takes K patches of a stream always can only be timed."""
    if bundle.token_mode != "cached":
        return next_command("predict", address, "IMAGES")
    return next_command("stream", "VIDEO", address) if bundle.fixed_keep is None else next_command("benchmark", address)


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
