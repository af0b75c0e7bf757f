"""INT8 and FP8: which Linears, with which ranges, and whether the result is worth having.

All of it is measured on the engine that will run it. A graph for TensorRT, which builds for minutes, is checked on ONNX
Runtime here; whether its engine is faster than one in FP16 is measured once, on the device (`runtime.engine_build`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mae_deploy.errors import CheckFailed
from mae_deploy.export.graph.builder import GraphBuilder
from mae_deploy.export.job import ExportJob
from mae_deploy.export.proof import compare_samples, judging_engine, tolerance_of
from mae_deploy.export.quantization.calibrate import Calibration, calibrate_job
from mae_deploy.export.quantization.fake_quant import macs_per_token
from mae_deploy.export.quantization.layer_table import LayerRow, table_rows, write_table
from mae_deploy.export.quantization.other_quantizers import (
    OtherGraph,
    facts_of,
    input_scales,
    quantize_elsewhere,
)
from mae_deploy.export.quantization.sensitivity import BudgetCheck, choose, sensitivities
from mae_deploy.files import remove
from mae_deploy.models.quantization.activations import ActivationStats, attention_scales
from mae_deploy.models.quantization.policy import Policy
from mae_deploy.models.quantization.rounding import AttentionScales, eligible_linears, rounding_of
from mae_deploy.models.quantization.smoothing import bias_corrections, correct_biases, smooth, smoothed_stats
from mae_deploy.progress import notice
from mae_deploy.runtime.bundle import int8_arithmetic
from mae_deploy.runtime.engines.base import Engine, EngineOptions
from mae_deploy.runtime.manifest import IMAGES, UPDATES
from mae_deploy.runtime.parity.certificate import Speed, time_both
from mae_deploy.runtime.parity.checks import RUN_AGAIN, Verification
from mae_deploy.runtime.parity.compare import Comparison
from mae_deploy.runtime.parity.trials import EXTREMES
from mae_deploy.runtime.registry import OPENVINO, open_graph
from mae_deploy.runtime.verify import try_alone
from mae_deploy.weights.load import LoadedWeights

_MARGIN_DB = 0.3
"""By which the search stays above the floor, so that what passed passes on fewer samples, and on another engine,
too."""

_SENSITIVITY_SAMPLES = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Int8Plan:
    """A quantised graph that met its budget, and how it came about."""

    job: ExportJob
    """With the weights as they are quantised."""
    quantized: dict[str, float | None]
    attention: dict[str, AttentionScales]
    rows: list[LayerRow]
    """The per-layer table; empty where no search was needed."""
    speed: Speed | None
    """INT8 against FP32; None where the device has to be asked."""
    num_linears: int
    facts: dict[str, Any]
    """Policy, smoothing and calibration, for the manifest."""
    other: OtherGraph | None = None
    """What the quantiser of others made."""

    def graph(self) -> GraphBuilder | OtherGraph:
        """The graph to ship."""
        return self.other or self.job.graph(
            quantized=self.quantized, attention_scales=self.attention, weight_bits=self.facts["weight_bits"]
        )

    def summary(self) -> dict[str, Any]:
        """For the command's result."""
        record = self.record()
        text = (
            f"{len(self.quantized)} of {self.num_linears} Linears in {self.job.config.precision.upper()}"
            f" ({self.facts['policy']}{', weights of 7 bits' if self.facts['weight_bits'] == 7 else ''}"
            f"{', by ' + self.facts['quantizer'] if self.other is not None else ''})"
        )
        if self.speed is not None:
            text += f", {self.speed.words()}"
        return {"text": text, **record}

    def record(self) -> dict[str, Any]:
        """For the manifest."""
        found = {
            **self.facts,
            "linears": self.num_linears,
            "quantized": dict(self.quantized),
            "attention": list(self.attention),
        }
        if self.speed is not None:
            found["latency_ratio"] = self.speed.ratio
            found["latency_ms"] = {
                name: 1000 * timing.median
                for name, timing in (("fp32", self.speed.baseline), ("int8", self.speed.timing))
            }
        return found

    def write_table(self, folder: Path) -> list[Path]:
        """The per-layer table beside the graph, where a search made one."""
        return write_table(folder / "sensitivity", self.rows) if self.rows else []

    def leave_table(self, out: Path) -> Path | None:
        """The table beside `out`, where the bundle itself is refused; None where no search made one."""
        return _leave_table(out, self.rows)


Verify = Callable[[Int8Plan, Engine], Verification]
"""What `verify` finds of the bundle of a plan, on an engine with its graph."""


def plan_int8(job: ExportJob, folder: Path, verify: Verify) -> Int8Plan:
    """Quantise everything; where that misses the budget, find the fastest mix that meets it; refuse what is not faster
    than FP32, if that can be known here.

    Args:
        folder: for graphs that are only tried; they are removed again.
        verify: the checks of the finished bundle, which decide about a mix as well.

    Raises:
        CheckFailed: nothing meets the budget, or what does is not faster than FP32; the per-layer table is left beside
            `--out`.
        ConfigError: too few calibration images that can be read.
    """
    attempt = _Attempt(job, folder, verify)
    everything = frozenset(attempt.scales)
    searches = job.config.int8.search and attempt.other is None
    rows: list[LayerRow] = []
    failures = ""
    chosen: frozenset[str] | None = everything
    budget = attempt.check_budget(everything)
    if not budget.passes and attempt.rest == "bf16":
        attempt.rest = "fp32"
        budget = attempt.check_budget(everything)
    if not budget.passes:
        chosen, failures = None, "; ".join(attempt.failures)
        if searches:
            notice(
                f"{attempt.name}:",
                f"with all {len(everything)} Linears it misses the budget ({failures}); searching for the fastest mix"
                " that meets it",
            )
            chosen, rows = attempt.search()
    if chosen is None:
        none = f"no mix of {attempt.name} and higher precision meets the budget; " if searches else ""
        raise attempt.rejected(
            rows, f"{none}all {len(everything)} Linears in {attempt.name}: {failures}", attempt.time(everything)
        )
    speed = attempt.time(chosen)
    if speed is not None and not speed.rule(job.config.int8.max_latency).passed:
        shown = "shown to be " if speed.ratio < job.config.int8.max_latency else ""
        raise attempt.rejected(rows, f"it is not {shown}faster ({attempt.accuracy(chosen)})", speed)
    return attempt.plan(chosen, rows, speed)


class _Attempt:
    """Tries sets of Linears in eight bits on the engine that runs them."""

    def __init__(self, job: ExportJob, folder: Path, verify: Verify) -> None:
        int8 = job.config.int8
        self.config, self.folder, self._verify = job.config, folder, verify
        self.name, self.weight_bits = job.config.precision.upper(), int8.weight_bits
        self.rounding = rounding_of(job.config.precision, self.weight_bits)
        self.tolerance = tolerance_of(job)
        self.names = eligible_linears(job.reference.model)
        self.failures: list[str] = []
        self._figures: dict[frozenset[str], list[Comparison]] = {}
        self.attention: dict[str, AttentionScales] = {}
        halves = self.config.resolved_typing == "strong" or self.config.is_planned
        self.rest = "fp16" if halves else "bf16" if self.config.engine == "openvino" else "fp32"
        """What is not INT8: OpenVINO may compute it in BF16, as long as that meets the budget."""
        self.other: OtherGraph | None = None
        if int8.quantizer == "own":
            self._quantise(job)
        else:
            self._take_other(job)

    def _take_other(self, job: ExportJob) -> None:
        """What the quantiser of others makes of the FP32 graph."""
        self.name += f" by {job.config.int8.quantizer}"
        self.other = quantize_elsewhere(job, self.names)
        self.job, self.scales, self.facts = job, input_scales(self.other, self.names), facts_of(job)
        self.stats: dict[str, ActivationStats] = {}
        self.corrections: dict[str, Tensor] = {}

    def _quantise(self, job: ExportJob) -> None:
        """Our own: calibrate, smooth, and choose the ranges."""
        int8 = job.config.int8
        policy = Policy(
            static=job.config.policy == "static",
            smooth_alpha=int8.smooth_alpha if int8.smooth_quant else None,
            method=int8.calib_method,
            percentile=int8.calib_percentile,
            rounding=self.rounding,
        )
        calibration = calibrate_job(job, self.names)
        divisors = policy.divisors(job.loaded.tensors, self.names, calibration.stats if calibration else None)
        self.stats = smoothed_stats(calibration.stats, divisors) if calibration else {}
        self.job = _with_tensors(job, smooth(job.loaded.tensors, divisors))
        self.scales = policy.scales(self.names, self.stats)
        self.corrections = (
            bias_corrections(self.job.loaded.tensors, self.stats, self.rounding) if int8.bias_correction else {}
        )
        if int8.int8_attention and calibration:
            self.attention = attention_scales(
                job.reference.model, calibration.attention_absmax, divisors, self.rounding
            )
        self.facts = {**_facts(job, calibration, self.scales), "weight_bits": self.weight_bits}

    def plan(self, chosen: frozenset[str], rows: list[LayerRow], speed: Speed | None = None) -> Int8Plan:
        """With this set in eight bits."""
        return Int8Plan(
            job=self.job_for(chosen),
            quantized={name: scale for name, scale in self.scales.items() if name in chosen},
            attention=self.attention_for(chosen),
            rows=rows,
            speed=speed,
            num_linears=len(self.names),
            facts={**self.facts, "rest": self.rest},
            other=self.other,
        )

    def check_budget(self, chosen: frozenset[str]) -> BudgetCheck:
        """Build this set's graph and compare its outputs with PyTorch's, on all samples and as `verify` will: a sample
        alone has other dynamic ranges than among others.
        """
        with ExitStack() as stack:
            engine = self._engine(stack, self._graph(chosen), self.config.precision)
            comparisons, failures, _ = compare_samples(self.job, engine, self.tolerance)
            self._figures[chosen] = list(comparisons)
            if not failures:
                verification = self._verify(self.plan(chosen, []), engine)
                failures = verification.failures
                left_out = (RUN_AGAIN, EXTREMES)
                comparisons += [check.comparison for check in verification.checks if check.name not in left_out]
        above = -max(self._deficit(comparison) for comparison in comparisons)
        self.failures = failures or (
            [f"only {above:.2f} dB above the floor, {_MARGIN_DB} are wanted"] if above < _MARGIN_DB else []
        )
        return BudgetCheck(passes=not self.failures, deficit_db=_MARGIN_DB - above if math.isfinite(above) else None)

    def search(self) -> tuple[frozenset[str] | None, list[LayerRow]]:
        """The fastest mix that meets the budget, or None, and the per-layer table."""
        model, N = self.job.reference.model, self.job.loaded.encoder_config.num_tokens
        few = {name: array[:_SENSITIVITY_SAMPLES] for name, array in self.job.trials[0].inputs.items()}
        if UPDATES in few:  # of streams, the frames: a patch meets the same weights in all
            few = {IMAGES: few[IMAGES]}
        noise = sensitivities(
            model, self.scales, few, attention=self.attention, corrections=self.corrections, rounding=self.rounding
        )
        K = self.job.ranges["K"][1] if "K" in self.job.ranges else N
        prefix = self.job.loaded.encoder_config.num_prefix
        tokens = {name: 1 + N if name.startswith("decoder_") else prefix + K for name in self.names}
        cost = {name: float(macs_per_token(model, name) * tokens[name]) for name in self.names}
        chosen = choose(noise, cost, self.check_budget)
        return chosen, table_rows(
            noise,
            cost,
            self.scales,
            self.stats,
            chosen or frozenset(),
            precision=self.config.precision,
            otherwise=self.rest,
        )

    def time(self, chosen: frozenset[str]) -> Speed | None:
        """FP32 and this set in turns: the usual number of patches, one image unless the batch is fixed; None for
        TensorRT, which the device times.
        """
        if self.config.is_planned:
            return None
        inputs = self.job.trials[0].inputs
        samples = np.arange(self.config.fixed_batch or 1) % len(
            self.job.samples.pixels
        )  # a batch may be larger than what there is
        batch = {name: array[samples] for name, array in self.job.as_graph_takes(inputs).items()}
        with ExitStack() as stack:
            graphs = {"fp32": self.job.in_precision("fp32").graph(), "int8": self._graph(chosen)}
            engines = {name: self._engine(stack, graph, name) for name, graph in graphs.items()}
            return time_both(
                {name: partial(self.job.runner(engine).run, batch) for name, engine in engines.items()}, "int8", "fp32"
            )

    def job_for(self, chosen: frozenset[str]) -> ExportJob:
        """With the biases of this set corrected, if that was asked for."""
        if not self.corrections:
            return self.job
        return _with_tensors(self.job, correct_biases(self.job.loaded.tensors, self.corrections, sorted(chosen)))

    def attention_for(self, chosen: frozenset[str]) -> dict[str, AttentionScales]:
        """Attention in eight bits where both its Linears are."""
        return {name: scales for name, scales in self.attention.items() if {f"{name}.qkv", f"{name}.proj"} <= chosen}

    def accuracy(self, chosen: frozenset[str]) -> str:
        """The worst output's figures in words."""
        worst = max(self._figures[chosen], key=self._deficit)
        return f"{worst.name}: SQNR {worst.sqnr_db:.1f} dB, centred cosine {worst.centred_cosine:.5f}"

    def rejected(self, rows: list[LayerRow], why: str, speed: Speed | None) -> CheckFailed:
        """With both figures, and the per-layer table left beside `--out`."""
        config, faster = self.config, ""
        if speed is not None:
            why += f"; it takes {speed.words()}"
            if not speed.rule(config.int8.max_latency).passed:
                if speed.ratio < config.int8.max_latency:
                    faster = "; on a machine with nothing else to do the interval is narrower"
                elif config.engine == "onnx" and self.weight_bits == 8 and config.int8.has_weight_bits:
                    faster = "; on an x86 CPU without VNNI, try --weight-bits 7"
        table = _leave_table(config.out, rows)
        other = "fp16 (--prefer fp16)" if config.is_planned else "fp32 or bf16"
        return CheckFailed(
            f"{self.name} is rejected: {why}",
            hint=("" if config.int8.search else "leave out --no-search, ")
            + f"export {other}, or give the budget that you can accept: --min-sqnr, --min-cosine, --max-drop,"
            f" --max-latency{faster}" + (f"; the layers are in {table}" if table else ""),
        )

    def _graph(self, chosen: frozenset[str]) -> GraphBuilder | OtherGraph:
        if self.other is not None:
            return self.other
        quantized = {name: scale for name, scale in self.scales.items() if name in chosen}
        return self.job_for(chosen).graph(
            quantized=quantized, attention_scales=self.attention_for(chosen), weight_bits=self.weight_bits
        )

    def _engine(self, stack: ExitStack, graph: GraphBuilder | OtherGraph, precision: str) -> Engine:
        files = graph.save(self.folder / f"tried-{precision}.onnx")
        options = EngineOptions(threads=self.config.threads)
        if precision == "int8":
            precision = int8_arithmetic({"weight_bits": self.weight_bits, "rest": self.rest})
        name = judging_engine(self.config.engine)
        if name == OPENVINO and not self._figures:  # the first graph; what it dies of lies in the shapes
            inputs = {key: array[: self.config.fixed_batch or 1] for key, array in self.job.trials[0].inputs.items()}
            try_alone(files[0], name, options, precision, self.job.as_graph_takes(inputs), self.job.cache_shape)
        engine = stack.enter_context(open_graph(files[0], name, options, precision=precision))
        for file in files:  # the engine has read them
            remove(file)
        return engine

    def _deficit(self, comparison: Comparison) -> float:
        """By how many dB of noise an output misses the tolerance; negative where it meets it."""
        tolerance = self.tolerance
        if comparison.reason is not None:
            return math.inf
        found = [tolerance.sqnr_db - comparison.sqnr_db] if tolerance.sqnr_db is not None else []
        for measure_ in ("cosine", "centred_cosine"):  # 1 - cosine is half the share of noise
            if (least := getattr(tolerance, measure_)) is not None and least < 1:
                found.append(10 * math.log10(max(1 - getattr(comparison, measure_), 1e-12) / (1 - least)))
        agreement, least = comparison.top1_agreement, tolerance.top1_agreement
        if agreement is not None and least is not None:
            differing = (
                0.0 if least == 1 else max(1 - least, 1 / comparison.num_samples)
            )  # one sample may always differ
            if 1 - agreement > differing + 1e-9:  # images change class in proportion to the noise's magnitude
                found.append(20 * math.log10((1 - agreement) / max(differing, 1e-3)))
        return max(found)


def _leave_table(out: Path, rows: list[LayerRow]) -> Path | None:
    return write_table(out.with_name(f"{out.name}-sensitivity"), rows)[0] if rows else None


def _facts(job: ExportJob, calibration: Calibration | None, scales: dict[str, float | None]) -> dict[str, Any]:
    int8 = job.config.int8
    facts: dict[str, Any] = {
        "policy": job.config.policy,
        "smooth_alpha": int8.smooth_alpha if int8.smooth_quant else None,
    }
    if calibration is not None:  # dynamic ranges need no method: it only smooths and corrects
        method = (
            None if job.config.policy == "dynamic" else "minmax" if job.config.precision == "fp8" else int8.calib_method
        )
        facts["calibration"] = {"method": method, **calibration.record(scales)}
    return facts


def _with_tensors(job: ExportJob, tensors: dict[str, Tensor]) -> ExportJob:
    """The same job with other weights; PyTorch's outputs stay those of the original weights."""
    return replace(job, loaded=LoadedWeights(job.loaded.metadata, tensors, job.loaded.record))
