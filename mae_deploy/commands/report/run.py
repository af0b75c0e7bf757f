"""`mae-deploy report`: what students are worth on the device they are for: FP32 and INT8, top-1, size, operations and
latency side by side.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from mae_deploy import __version__
from mae_deploy.commands.benchmark.rows import BenchmarkRow, LoadedGraph, bundle_subject
from mae_deploy.commands.report.config import ReportConfig
from mae_deploy.commands.report.student import Student, drop, linears_in_int8
from mae_deploy.errors import ConfigError
from mae_deploy.export.int8_config import Int8Config
from mae_deploy.models.mask_config import keep_count
from mae_deploy.progress import heading, notice, progress
from mae_deploy.reporting.command_line import command_line
from mae_deploy.reporting.machine import describe_machine, machine_table
from mae_deploy.reporting.markdown import Page, write_report
from mae_deploy.reporting.tables import Column, Table, numbered, stacked
from mae_deploy.results import Result
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.engines.base import EngineOptions
from mae_deploy.runtime.flops import flops_per_image
from mae_deploy.runtime.parity.bounds import CONFIDENCE
from mae_deploy.runtime.parity.certificate import Classes, Speed
from mae_deploy.runtime.registry import load_engine
from mae_deploy.runtime.timing import Timing, measure

STUDENTS = "students"
"""The folder of the bundles, one below it for each run."""

_COST = (
    Column("run", "run"),
    Column("params M", "parameters", "{:.2f}", 1e-6),
    Column("patches", "patches"),
    Column("GFLOP", "gflop", "{:.3g}"),
)
_WORTH = (
    Column("top-1", "top1", "{:.2f}"),
    Column("INT8 top-1", "int8_top1", "{:.2f}"),
    Column("drop", "int8_drop", "{:+.2f}"),
    Column("FP32 ms", "fp32_ms", "{:.3g}"),
    Column("INT8 ms", "int8_ms", "{:.3g}"),
    Column("ratio", "int8_ratio", "{:.2f}"),
    Column("INT8", "verdict"),
)

_DISTURBED = 1.5
"""The median over the fastest call of a row, above which its time says more of the machine than of the network."""

_Timings = dict[tuple[int, str, float], Timing]
"""By the number of the student, the precision and the share of the patches."""


def run_report(config: ReportConfig) -> Result:
    """Export, evaluate and time every run; what an earlier call has finished is kept.

    Raises:
        ConfigError: a run is not a classifier, or the images are not of its classes.
        CheckFailed: an FP32 graph does not compute what PyTorch computes.
        MissingDependency: the engine is not installed.
    """
    folder = config.out
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / STUDENTS).is_dir()):
        raise ConfigError(f"--out {folder} holds something else", hint="choose another --out")
    students = [
        Student(path, folder / STUDENTS / name, config)
        for path, name in zip(config.runs, folder_names(config.runs), strict=True)
    ]
    for student in students:
        heading(str(student.run))
        student.check()
    timings, version = _time(config, students)
    if disturbed := was_disturbed(timings.values()):
        notice(
            "busy machine:",
            "most calls took far longer than the fastest of their kind; the same command measures the times again, and"
            " nothing else",
        )
    rows = [row for number, student in enumerate(students) for row in _rows(number, student, timings)]
    report: dict[str, Any] = {
        "mae_deploy": __version__,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command_line("report", config),
        "machine": describe_machine(version, threads=config.threads, affinity=config.affinity),
        "images": students[0].images,
        "disturbed": disturbed,
        "rows": rows,
    }
    write_report(folder, "report", report, _page(config, report))
    return Result(report, stacked(_tables(config, report)))


def folder_names(runs: Sequence[Path]) -> list[str]:
    """A name for each run: the parts of its path that the others do not begin with.

    Raises:
        ConfigError: a run is named twice.
    """
    whole = [path.resolve() for path in runs]
    if len(set(whole)) < len(whole):
        raise ConfigError(f"a run is named twice: {', '.join(map(str, runs))}")
    shared = Path(os.path.commonpath([path.parent for path in whole]))
    return ["-".join(path.relative_to(shared).parts) for path in whole]


def was_disturbed(timings: Iterable[Timing]) -> bool:
    """Whether something else kept the processor from what was timed: the median of a row is far above its fastest
    call.
    """
    return any(timing.median > _DISTURBED * timing.percentile(0) for timing in timings)


def _time(config: ReportConfig, students: Sequence[Student]) -> tuple[_Timings, dict[str, str]]:
    """One image at a time, every student, precision and share in turns; and the engine's version."""
    options = EngineOptions(device=config.device, threads=config.threads, affinity=config.affinity)
    calls: dict[tuple[int, str, float], Callable[[], object]] = {}
    versions: dict[str, str] = {}
    with ExitStack() as stack:
        for number, student in enumerate(students):
            for precision, checked in (("fp32", student.fp32), ("int8", student.int8)):
                if checked is None:
                    continue
                subject = bundle_subject(checked.bundle)
                assert subject.bundle is not None
                engine = stack.enter_context(load_engine(subject.bundle, config.engine, options))
                versions[engine.name] = engine.version
                for share in student.shares:
                    row = BenchmarkRow(
                        LoadedGraph(subject, engine),
                        1,
                        None if subject.keep is None else keep_count(subject.num_patches, share),
                    )
                    calls[number, precision, share] = partial(engine.run, row.inputs(config.seed))
        with progress("timing", (config.warmup + config.repeats) * len(calls)) as bar:
            return measure(calls, repeats=config.repeats, warmup=config.warmup, after_call=bar.advance), versions


def _rows(number: int, student: Student, timings: _Timings) -> list[dict[str, Any]]:
    """A row for each share of the patches."""
    bundle, rows = Bundle.load(student.fp32.bundle), []
    for index, share in enumerate(student.shares):
        patches, fp32 = keep_count(bundle.num_patches, share), timings[number, "fp32", share]
        flops = flops_per_image(bundle.manifest, patches)
        row: dict[str, Any] = {
            "run": str(student.run),
            "model": bundle.model["name"],
            "parameters": student.parameters,
            "keep_ratio": share,
            "patches": patches,
            "gflop": None if flops is None else flops / 1e9,
            "top1": student.fp32.top1[index],
            "fp32_ms": 1000 * fp32.median,
            "fp32_min_ms": 1000 * fp32.percentile(0),
            "fp32_bundle": str(student.fp32.bundle),
        }
        if (checked := student.int8) is not None:
            speed = Speed(timing=timings[number, "int8", share], baseline=fp32)
            classes = checked.beside(student.fp32)[index]
            row |= {
                "int8_top1": checked.top1[index],
                "int8_drop": drop(student.fp32.top1[index], checked.top1[index]),
                "int8_drop_interval": list(classes.interval),
                "int8_ms": 1000 * speed.timing.median,
                "int8_min_ms": 1000 * speed.timing.percentile(0),
                "int8_ratio": speed.ratio,
                "int8_ratio_interval": list(speed.interval),
                "int8_bundle": str(checked.bundle),
                "int8_linears": linears_in_int8(Bundle.load(checked.bundle)),
                "verdict": _int8_result(classes, speed, student.config.int8),
            }
        else:
            row["verdict"] = f"rejected: {student.rejected}"
        rows.append(row)
    return rows


def _int8_result(classes: Classes, speed: Speed, int8: Int8Config) -> str:
    """Whether INT8 is worth having, on the ends of the intervals, as `export` judges it."""
    assert int8.max_drop is not None
    wrong = []
    if not classes.rule(int8.max_drop).passed:
        lost = classes.lost - classes.gained
        seen = 100 * lost > int8.max_drop * len(classes)
        few = f"may lose {classes.interval[1]:.2f} points: {len(classes)} images show no less"
        wrong.append(f"loses more than {int8.max_drop:g} points" if seen else few)
    if not speed.rule(int8.max_latency).passed:
        slower = "not faster" if int8.max_latency == 1 else f"more than {int8.max_latency:g} of FP32's latency"
        wrong.append(slower if speed.ratio >= int8.max_latency else f"perhaps {slower}")
    return "; ".join(wrong) or "ok"


def _tables(config: ReportConfig, report: dict[str, Any]) -> list[Table]:
    """Narrow enough for 80 characters: what the rows are and cost; what they are worth."""
    rows, number = numbered(report["rows"]), Column("#", "number")
    return [
        Table("Students", (number, *_COST), rows),
        Table(f"On {report['images']} images of {config.data}", (number, *_WORTH), rows),
    ]


def _page(config: ReportConfig, report: dict[str, Any]) -> Page:
    busy = " **The machine was busy: these times mean little.**" if report["disturbed"] else ""
    return Page(
        title="Students",
        command=report["command"],
        parts=[
            Table("", (*_COST, *_WORTH), report["rows"]),
            (
                f"Top-1 in per cent on {report['images']} images of {config.data}, by the bundles on their engine;"
                " drop: FP32 less INT8, in points. GFLOP of one image, two for a multiply-add. Milliseconds: median of"
                f" {config.repeats} rounds of one image, FP32 and INT8 of all rows in turns; ratio: INT8 over FP32."
                f" INT8 is ok where it is shown, with {CONFIDENCE:.0%} confidence each, to lose at most"
                f" {config.int8.max_drop:g} points and to take less than {config.int8.max_latency:g} of FP32's"
                f" latency.{busy}"
            ),
            machine_table(report),
        ],
    )
