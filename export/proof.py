"""The parity gate: a graph on an engine against PyTorch, for every sample, at both ends of K, and under the
invariances.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mae_deploy.errors import CheckFailed
from mae_deploy.export.job import ExportJob, keep_of
from mae_deploy.export.trials import GOLDEN, Arrays
from mae_deploy.files import temporary_folder
from mae_deploy.images.read import Array
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.engines.base import Engine, EngineOptions, run_in_chunks
from mae_deploy.runtime.layers import blocks_of, first_broken_block
from mae_deploy.runtime.parity.certificate import Classes, Speed, certificate, classes_of
from mae_deploy.runtime.parity.checks import Verification, first_causes, verify_engine
from mae_deploy.runtime.parity.compare import Comparison, compare
from mae_deploy.runtime.parity.trials import tolerance_of_trial
from mae_deploy.runtime.registry import ALIASES, OPENVINO, load_engine, open_graph
from mae_deploy.runtime.tolerance import TOLERANCES, Tolerance
from mae_deploy.runtime.verify import verify_and_trace_alone


@dataclass(frozen=True, slots=True)
class ParityRecord:
    """What was measured and what missed."""

    comparisons: list[Comparison]
    """Each output over all samples."""
    verification: Verification
    """Golden samples and invariances, as `mae-deploy verify` repeats them."""
    classes: Classes | None
    """Of a classifier: what PyTorch and the graph take the images for."""
    certificate: dict[str, Any]
    """What the graph is worth on this machine, see `runtime.parity.certificate`."""
    failures: list[str]
    blocks_db: list[float] | None
    """The SQNR after each block; None where it cannot be told."""

    def figures(self) -> list[dict[str, Any]]:
        """Each output's measures, as plain values."""
        return [
            {key: value for key, value in comparison.to_dict().items() if key != "reason"}
            for comparison in self.comparisons
        ]


def engine_name(engine: str) -> Literal["onnxruntime", "openvino", "tensorrt", "tensorrt-rtx"]:
    """The runtime's name of `--engine`."""
    return ALIASES.get(engine, engine)  # type: ignore[return-value]


def judging_engine(engine: str) -> Literal["onnxruntime", "openvino"]:
    """The engine that graphs are checked on: their own, but a graph for TensorRT, which builds for minutes, on ONNX
    Runtime.
    """
    return "openvino" if engine == "openvino" else "onnxruntime"


def tolerance_of(job: ExportJob) -> Tolerance:
    """What every output must meet: the precision's limits, and for INT8 the budget that was asked for."""
    tolerance, int8 = TOLERANCES[job.config.precision], job.config.int8
    if int8.min_sqnr is not None:
        tolerance = replace(tolerance, sqnr_db=int8.min_sqnr)
    if int8.min_cosine is not None:
        tolerance = replace(
            tolerance, centred_cosine=int8.min_cosine, cosine=min(tolerance.cosine or 1, int8.min_cosine)
        )
    if (
        int8.max_drop is not None
    ):  # with labels the accuracy is measured, and two models of one accuracy may differ in many images
        tolerance = replace(tolerance, top1_agreement=None if job.labels is not None else 1 - int8.max_drop / 100)
    return tolerance


def check_parity(job: ExportJob, bundle: Bundle, tolerance: Tolerance, speed: Speed | None = None) -> ParityRecord:
    """Run everything on the engine that graphs of this bundle are checked on.

    Args:
        speed: against FP32, where it was measured.
    """
    name, options = judging_engine(job.config.engine), EngineOptions(threads=job.config.threads)
    alone, blocks_db = verify_and_trace_alone(bundle, name, options) if name == OPENVINO else (None, None)
    with _judging(job, bundle, name, options) as engine:
        comparisons, failures, classes = compare_samples(job, engine, tolerance)
        verification = verify_engine(bundle, engine) if alone is None else alone
        record = certificate(
            engine,
            precision=job.config.precision,
            images=job.samples.source,
            comparisons=comparisons[: len(job.names)],
            tolerance=tolerance,
            classes=classes,
            speed=speed,
            max_drop=job.config.int8.max_drop,
            max_latency=job.config.int8.max_latency,
        )
    failures = list(dict.fromkeys(failures + verification.failures))
    if alone is None and not failures and not job.config.emulates_bf16:
        blocks_db = blocks_of(bundle, name, options)
    return ParityRecord(comparisons[: len(job.names)], verification, classes, record, failures, blocks_db)


@contextmanager
def _judging(job: ExportJob, bundle: Bundle, name: str, options: EngineOptions) -> Iterator[Engine]:
    """The bundle's graph; where its products are BF16, which ONNX Runtime's CPU has not got, one that computes the same
    of rounded numbers.
    """
    if not job.config.emulates_bf16:
        with load_engine(bundle, name, options) as engine:
            yield engine
        return
    with temporary_folder() as folder:
        files = job.graph(emulates_bf16=True).save(folder / "emulated.onnx")
        with open_graph(files[0], name, options) as engine:
            yield engine


def compare_samples(
    job: ExportJob, engine: Engine, tolerance: Tolerance, batches: Callable[[int | None], Sequence[int]] | None = None
) -> tuple[list[Comparison], list[str], Classes | None]:
    """Against PyTorch: each output over all samples, over the golden ones alone and in each other form, every miss, and
    the classes. Of forms that have a tolerance of their own, misses alone.

    Args:
        batches: for a K (None in a graph of all patches), how many samples at a time to run, each of which is checked;
            default: the fixed batch, or 8.
    """
    comparisons: list[Comparison] = []
    failures: list[str] = []
    scores: list[tuple[Array, Array]] = []

    def judge_one(where: str, expected: Arrays, found: Arrays, limits: Tolerance = tolerance) -> None:
        for name in job.names:
            comparison = compare(expected[name], found[name], name)
            if limits == tolerance:
                comparisons.append(comparison)
            failures.extend(where + failure for failure in comparison.failures(limits))

    for trial in job.trials:
        K = keep_of(trial.inputs)
        for batch in [job.config.fixed_batch or GOLDEN] if batches is None else batches(K):
            given = job.as_graph_takes(trial.inputs, trial.pixels)
            found = run_in_chunks(job.runner(engine), given, batch=batch, outputs=job.names)
            where = "" if batches is None else f"B={batch}: "
            if trial.name:
                limits = tolerance_of_trial(trial.name, job.config.precision, tolerance)
                judge_one(f"{where}{trial.name}: ", trial.expected, found, limits)
                continue
            judge_one(where, trial.expected, found)
            expected, few = (
                {name: array[:GOLDEN] for name, array in outputs.items()} for outputs in (trial.expected, found)
            )
            judge_one(f"{where}golden: ", expected, few)  # centred on a mean of their own
            if job.class_output is not None and not scores:
                scores = [(trial.expected[job.class_output], found[job.class_output]), *_more(job, engine, batch)]
    classes = None
    if scores:
        expected_scores, found_scores = (np.concatenate(part) for part in zip(*scores, strict=True))
        classes = classes_of(expected_scores, found_scores, job.labels)
    if classes is not None and (most := job.config.int8.max_drop) is not None and (missed := classes.failure(most)):
        failures.append(missed)
    return comparisons, failures, classes


def _more(job: ExportJob, engine: Engine, batch: int) -> Iterator[tuple[Array, Array]]:
    """The scores of the images behind the samples, PyTorch's and the graph's."""
    assert job.class_output is not None
    for (inputs, pixels), expected in zip(job.more_batches(), job.more_scores, strict=True):
        given = job.as_graph_takes(inputs, pixels)
        yield (
            expected,
            run_in_chunks(job.runner(engine), given, batch=batch, outputs=[job.class_output])[job.class_output],
        )


def refuse(job: ExportJob, bundle: Bundle, proof: ParityRecord, table: Path | None = None) -> CheckFailed:
    """What `export` says when a graph misses its tolerance: of each output the first miss, from which the rest follows;
    of NaN and infinite values also the block where they begin.

    Args:
        table: where the layers of a search in eight bits were left.
    """
    config = job.config
    causes = first_causes(proof.failures, job.names)
    failures = ["; ".join(causes)]
    overflows = any(comparison.not_finite for comparison in proof.comparisons)
    if overflows:
        failures = causes
        if not config.emulates_bf16:
            options = EngineOptions(threads=config.threads)
            failures = [*first_broken_block(bundle, judging_engine(config.engine), options), *failures]
    hint = "nothing was written; please report this with the checkpoint's metadata.json"
    if config.quantized:  # what the search accepted on the same checks
        hint = "nothing was written; give the search a stricter budget (--min-sqnr), or export fp32 or bf16" + (
            f"; the layers are in {table}" if table else ""
        )
    elif config.precision != "fp32":
        kept, others = config.islands, "fp32" if config.precision == "bf16" else "fp32 or bf16"
        more = [op for op in ("residual", "norm", "gelu", "softmax") if op not in kept]
        ends = "FP16 ends at 65,504; " if overflows and config.stored_precision == "fp16" else ""
        if config.keeps_ops and more:
            way = f"keep more in FP32, with --fp32-ops {','.join([*kept, *more])}, or export {others}"
        else:
            way = f"this model does not bear {config.precision} within the tolerance: export {others}"
        hint = f"nothing was written; {ends}{way}"
    return CheckFailed(
        f"the exported {config.precision} graph misses parity with PyTorch: {failures[0]}",
        details=failures[1:],
        hint=hint,
    )
