"""`mae-deploy benchmark`: engines, precisions, token counts and batch sizes on one machine, timed in turns;
torch-free.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import datetime, timezone
from typing import Any

from mae_deploy import __version__
from mae_deploy.commands.benchmark.accuracy import Accuracy, AccuracyCheck
from mae_deploy.commands.benchmark.config import BenchmarkConfig
from mae_deploy.commands.benchmark.report import report_page, result_tables
from mae_deploy.commands.benchmark.roofline import (
    Kind,
    Yardstick,
    measure_on_gpu,
    open_yardsticks,
    rates_of,
    roofline,
)
from mae_deploy.commands.benchmark.rows import (
    BenchmarkRow,
    LeftOut,
    LoadedGraph,
    Subject,
    bundle_subject,
    combinations,
    file_subject,
)
from mae_deploy.errors import CheckFailed, ConfigError, MaeDeployError
from mae_deploy.files import refuse_to_overwrite
from mae_deploy.progress import notice, progress
from mae_deploy.reporting.command_line import command_line
from mae_deploy.reporting.machine import describe_machine
from mae_deploy.reporting.markdown import write_report
from mae_deploy.reporting.tables import stacked
from mae_deploy.results import Result
from mae_deploy.runtime.engines.base import Engine, EngineOptions
from mae_deploy.runtime.flops import flops_per_image
from mae_deploy.runtime.manifest import PLANNED
from mae_deploy.runtime.probe import Probe, probe_graph
from mae_deploy.runtime.registry import DEFAULT, load_engine, open_graph
from mae_deploy.runtime.timing import Timing, measure


def run_benchmark(config: BenchmarkConfig) -> Result:
    """Time every combination that can run, with what it needs and what it is worth; those that cannot are named.

    Raises:
        ConfigError: a graph is named twice or cannot be fed, or no combination is left.
        CheckFailed: a file of a bundle is not what was exported.
        MaeDeployError: the reason why the first combination cannot run, if none can.
    """
    if config.out is not None:
        refuse_to_overwrite(config.out)
    options = EngineOptions(device=config.device, threads=config.threads, affinity=config.affinity)
    accuracy_check = AccuracyCheck(config.images, config.num_images, config.seed)
    subjects = _subjects(config)
    with ExitStack() as stack:
        rows, left_out = _Plan(config, options, stack).rows(subjects)
        for combination in left_out:
            notice("left out:", f"{combination.row}: {combination.why}")
        inputs = {row: row.inputs(config.seed) for row in rows}
        with progress("accuracy", len(rows)) as bar:
            accuracies = accuracy_check.accuracies(rows, bar.advance)
        probes = _probe(rows, inputs, options) if config.probe else {}
        engines = list(dict.fromkeys(row.loaded.engine.name for row in rows))
        marks = open_yardsticks(engines, options, stack)
        calls: dict[BenchmarkRow | Yardstick, Callable[[], object]] = {row: row.call(config.seed) for row in rows}
        with progress("timing", (config.warmup + config.repeats) * (len(calls) + len(marks))) as bar:
            timings = measure({**calls, **marks}, repeats=config.repeats, warmup=config.warmup, after_call=bar.advance)
        on_gpu = measure_on_gpu(engines, options, repeats=config.repeats)
    rates = rates_of({**{mark: timings[mark].median for mark in marks}, **on_gpu})
    report: dict[str, Any] = {
        "mae_deploy": __version__,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command_line("benchmark", config),
        "machine": describe_machine(
            {row.loaded.engine.name: row.loaded.engine.version for row in rows},
            threads=config.threads,
            affinity=config.affinity,
        ),
        "images": accuracy_check.source,
        "gemm_gflops": {engine: rates[engine]["compute"] / 1e9 for engine in rates},
        "bytes_per_second": {engine: rates[engine]["weights"] for engine in rates},
        "rows": [_figures(row, rows, timings, accuracies[row], probes.get(row), rates) for row in rows],
        "left_out": [{"row": combination.row, "why": combination.why} for combination in left_out],
    }
    if config.out is not None:
        write_report(config.out, "benchmark", report, report_page(report))
    return Result(report, stacked(result_tables(report)))


def _subjects(config: BenchmarkConfig) -> list[Subject]:
    others = config.against or ()
    names = [str(path) for path in (*config.bundles, *others)]
    if len(set(names)) < len(names):
        raise ConfigError(f"a graph is named twice: {', '.join(names)}")
    bundles = [bundle_subject(path) for path in config.bundles]
    return [*bundles, *(file_subject(path, like=bundles[0]) for path in others)]


class _Plan:
    """Finds the rows that can run: loads each graph on each engine once, and runs every combination once."""

    def __init__(self, config: BenchmarkConfig, options: EngineOptions, stack: ExitStack) -> None:
        self._config = config
        self._options = options
        self._stack = stack
        """Closes the engines."""
        self._left_out: list[LeftOut] = []
        self._errors: list[MaeDeployError] = []

    def rows(self, subjects: Sequence[Subject]) -> tuple[list[BenchmarkRow], list[LeftOut]]:
        """The rows in the order of the subjects, and what is left out."""
        rows: list[BenchmarkRow] = []
        for subject in subjects:
            found, outside = combinations(subject, self._config.batch_size, self._config.keeps)
            self._left_out += outside
            self._errors += [
                ConfigError(f"nothing is left to time: {combination.row}: {combination.why}") for combination in outside
            ]
            if found:
                # A file of other origin runs on the engines that the bundles run on and that read files.
                others = dict.fromkeys(row.loaded.engine.name for row in rows if row.loaded.engine.name not in PLANNED)
                engines = self._config.engine if subject.bundle is not None else others or [DEFAULT]
                candidates = [
                    BenchmarkRow(loaded, batch, keep)
                    for loaded in self._load(subject, list(engines))
                    for batch, keep in found
                ]
                rows += [row for row in candidates if self._runs(row)]
        if not rows:
            raise self._errors[0]
        return rows, self._left_out

    def _load(self, subject: Subject, engines: Sequence[str]) -> list[LoadedGraph]:
        found: dict[str, LoadedGraph] = {}
        for name in engines:
            try:
                engine = _open(subject, name, self._options)
            except (ConfigError, CheckFailed):
                raise
            except MaeDeployError as error:
                self._leave_out(f"{subject.name} on {name}", error)
                continue
            self._stack.enter_context(engine)
            found.setdefault(engine.name, LoadedGraph(subject, engine))  # auto may be one of those that are named too
        return list(found.values())

    def _runs(self, row: BenchmarkRow) -> bool:
        try:
            row.loaded.engine.run(row.inputs(self._config.seed))
        except MaeDeployError as error:
            self._leave_out(row.label, error)
            return False
        return True

    def _leave_out(self, row: str, error: MaeDeployError) -> None:
        self._left_out.append(LeftOut(row, str(error)))
        self._errors.append(error)


def _open(subject: Subject, engine: str, options: EngineOptions) -> Engine:
    return (
        load_engine(subject.bundle, engine, options)
        if subject.bundle is not None
        else open_graph(subject.graph, engine, options, check=subject.check)
    )


def _probe(
    rows: Sequence[BenchmarkRow], inputs: dict[BenchmarkRow, dict[str, Any]], options: EngineOptions
) -> dict[BenchmarkRow, Probe]:
    """Load time and peak memory of each row, one after the other; a row whose process fails is left without."""
    found: dict[BenchmarkRow, Probe] = {}
    with progress("load time and memory", len(rows)) as bar:
        for row in rows:
            try:
                subject, name = row.subject, row.loaded.engine.name
                bundle = None if subject.bundle is None else subject.bundle.path
                found[row] = probe_graph(
                    subject.graph, name, options, inputs[row], precision=subject.arithmetic, bundle=bundle
                )
            except MaeDeployError as error:
                notice("no load time and memory:", f"{row.label}: {error}")
            bar.advance()
    return found


def _figures(
    row: BenchmarkRow,
    rows: Sequence[BenchmarkRow],
    timings: dict[BenchmarkRow | Yardstick, Timing],
    accuracy: Accuracy,
    probe: Probe | None,
    all_rates: dict[str, dict[Kind, float]],
) -> dict[str, Any]:
    subject, engine, timing = row.subject, row.loaded.engine, timings[row]
    rates = all_rates.get(engine.name, {})
    full = _full_row(row, rows)
    flops = (
        flops_per_image(subject.bundle.manifest, row.patches)
        if subject.bundle is not None and row.patches is not None
        else None
    )
    gflops = None if flops is None else flops * row.batch / timing.median / 1e9
    return {
        "graph": subject.name,
        "tokens": subject.token_mode,
        "precision": row.precision,
        "engine": engine.name,
        "device": engine.device,
        "batch": row.batch,
        "patches": row.patches,
        **timing.to_dict(),
        "images_per_second": row.batch / timing.median,
        "ratio": timing.ratio(timings[rows[0]]) * rows[0].batch / row.batch,
        "speedup_over_full": None if full is None else timings[full].ratio(timing),
        "gflop_per_image": None if flops is None else flops / 1e9,
        "gflops": gflops,
        "gemm_share": None if gflops is None or not rates else 1e9 * gflops / rates["compute"],
        "roofline": roofline(row, timing.median, flops, rates),
        "load_seconds": probe.load_seconds if probe is not None else None,
        "peak_mib": probe.peak_mib if probe is not None else None,
        "size_bytes": subject.size_bytes,
        "cosine": accuracy.cosine,
        "top1": accuracy.top1,
    }


def _full_row(row: BenchmarkRow, rows: Sequence[BenchmarkRow]) -> BenchmarkRow | None:
    """The row of all patches on the same engine, in the same precision and batch size: of a full graph of the model,
    else of the graph itself.
    """
    own = (row.loaded.engine.name, row.precision, row.batch)
    found = [
        other
        for other in rows
        if other.patches == other.subject.num_patches
        and (other.loaded.engine.name, other.precision, other.batch) == own
        and row.subject.same_network(other.subject)
    ]
    return min(
        found, key=lambda other: (other.subject.token_mode != "full", other.subject is not row.subject), default=None
    )
