"""The parity gate: a graph on an engine against PyTorch, for every sample, at both ends of K, and under the invariances."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from mae_deploy.errors import CheckFailed
from mae_deploy.export.job import Arrays, Job
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.engine import Engine, EngineOptions, run_in_chunks
from mae_deploy.runtime.manifest import IDS_KEEP
from mae_deploy.runtime.parity import TOLERANCES, Comparison, Tolerance, compare
from mae_deploy.runtime.registry import load_engine
from mae_deploy.runtime.verify import Verification, verify_engine

GOLDEN = 8
"""Samples that go into the bundle; also how many are run at a time."""


@dataclass(frozen=True, slots=True)
class Proof:
    """What was measured and what missed."""

    comparisons: list[Comparison]
    """Each output over all samples."""
    verification: Verification
    """Golden samples and invariances, as `mae-deploy verify` repeats them."""
    accuracy: tuple[float, float] | None
    """Top-1 in percent of PyTorch and of the graph, where the samples lie in folders named by class."""
    failures: list[str]

    def figures(self) -> list[dict[str, Any]]:
        """Each output's measures, as plain values."""
        return [{key: value for key, value in comparison.to_dict().items() if key != "reason"} for comparison in self.comparisons]


def engine_name(engine: Literal["onnx", "openvino"]) -> Literal["onnxruntime", "openvino"]:
    """The runtime's name of `--engine`."""
    return "onnxruntime" if engine == "onnx" else engine


def tolerance_of(job: Job) -> Tolerance:
    """What every output must meet: the precision's limits, and for INT8 the budget that was asked for."""
    tolerance, int8 = TOLERANCES[job.config.precision], job.config.int8
    if int8.min_sqnr is not None:
        tolerance = replace(tolerance, sqnr_db=int8.min_sqnr)
    if int8.min_cosine is not None:
        tolerance = replace(tolerance, centred_cosine=int8.min_cosine, cosine=min(tolerance.cosine or 1, int8.min_cosine))
    if int8.max_drop is not None:  # with labels the accuracy is judged, and two models of one accuracy may differ in many images
        tolerance = replace(tolerance, top1_agreement=None if labels(job) is not None else 1 - int8.max_drop / 100)
    return tolerance


def prove(job: Job, bundle: Bundle, tolerance: Tolerance) -> Proof:
    """Run everything on the engine that the bundle is made for."""
    with load_engine(bundle, engine_name(job.config.engine), EngineOptions(threads=job.config.threads)) as engine:
        comparisons, failures, accuracy = judge(job, engine, tolerance)
        verification = verify_engine(bundle, engine)
    return Proof(comparisons[: len(job.names)], verification, accuracy, list(dict.fromkeys(failures + verification.failures)))


def judge(job: Job, engine: Engine, tolerance: Tolerance) -> tuple[list[Comparison], list[str], tuple[float, float] | None]:
    """Against PyTorch: each output over all samples, over the golden ones alone and at the ends of K, every miss, and the accuracies."""
    comparisons: list[Comparison] = []
    failures: list[str] = []
    accuracy = None

    def judge_one(where: str, expected: Arrays, found: Arrays) -> None:
        for name in job.names:
            comparisons.append(compare(expected[name], found[name], name))
            failures.extend(where + failure for failure in comparisons[-1].failures(tolerance))

    for inputs, expected in job.trials:
        found = run_in_chunks(engine, job.as_graph_takes(inputs), batch=job.config.fixed_batch or GOLDEN, outputs=job.names)
        if comparisons:
            judge_one(f"K={inputs[IDS_KEEP].shape[1]}: ", expected, found)
            continue
        judge_one("", expected, found)
        judge_one("golden: ", *({name: array[:GOLDEN] for name, array in outputs.items()} for outputs in (expected, found)))  # centred on a mean of their own
        accuracy = _accuracy(job, expected, found)
    if accuracy is not None and job.config.int8.max_drop is not None and accuracy[0] - accuracy[1] > job.config.int8.max_drop:
        failures.append(
            f"top-1 is {accuracy[1]:.2f}, {accuracy[0] - accuracy[1]:.2f} points below FP32's {accuracy[0]:.2f}; --max-drop {job.config.int8.max_drop:g}"
        )
    return comparisons, failures, accuracy


def refuse(job: Job, failures: list[str]) -> CheckFailed:
    """What `export` says when a graph misses its tolerance."""
    precision = job.config.precision
    hint = "nothing was written; please report this with the checkpoint's metadata.json"
    if precision != "fp32":
        hint = f"nothing was written; this model does not bear {precision} within the tolerance: export fp32" + (" or bf16" if precision != "bf16" else "")
    return CheckFailed(f"the exported {precision} graph misses parity with PyTorch: {'; '.join(failures)}", hint=hint)


def labels(job: Job) -> np.ndarray[Any, np.dtype[np.int64]] | None:
    """The class of every sample, where all lie in folders named by class."""
    names = job.loaded.metadata.class_names
    if names is None or not job.samples.paths or "logits" not in job.names:
        return None
    folders = [path.parent.name for path in job.samples.paths]
    return np.array([names.index(folder) for folder in folders]) if set(folders) <= set(names) else None


def _accuracy(job: Job, expected: Arrays, found: Arrays) -> tuple[float, float] | None:
    classes = labels(job)
    if classes is None:
        return None
    reference, graph = (float(100 * (outputs["logits"].argmax(1) == classes).mean()) for outputs in (expected, found))
    return reference, graph
