"""Build a TensorRT engine for a bundle on this machine, check it, time it, and keep it only if it is right, and INT8
only if it is also faster than FP16. TensorRT for RTX builds without a GPU; then it is checked where it is first used.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from mae_deploy.errors import CheckFailed, ConfigError, MissingDependency
from mae_deploy.files import temporary_folder
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.cache import CacheShape, last_update
from mae_deploy.runtime.cuda.driver import Gpu
from mae_deploy.runtime.cuda.open_memory import open_memory
from mae_deploy.runtime.engines.base import EngineOptions
from mae_deploy.runtime.manifest import QUANTIZED, UPDATES, EngineEntry, Precision
from mae_deploy.runtime.parity.bounds import CONFIDENCE, ratio_interval
from mae_deploy.runtime.parity.checks import Check
from mae_deploy.runtime.profiles import Profile, read_profiles
from mae_deploy.runtime.tensorrt.add_plan import add_plan
from mae_deploy.runtime.tensorrt.api import load_tensorrt
from mae_deploy.runtime.tensorrt.build import BuiltPlan, Report, build_plan
from mae_deploy.runtime.tensorrt.check_plan import (
    Expected,
    check_plan,
    expected_outputs,
    golden_keeps,
    inputs_at,
    parity_record,
    repeated,
)
from mae_deploy.runtime.tensorrt.engine import TensorRtEngine, TensorRtRtxEngine, gpu_index
from mae_deploy.runtime.tensorrt.options import BuildOptions
from mae_deploy.runtime.tensorrt.plans import find_plan, graph_for
from mae_deploy.runtime.tensorrt.rtx import find_gpu, load_builder, load_rtx, target
from mae_deploy.runtime.timing import Timing, take_turns

_ROUNDS, _WARMUP, _REPLAYS = 20, 4, 5
"""Timed rounds at each profile's usual size, those before them, and the runs in each."""

_BUILDING = 0.8
"""The share of the time that goes into a build; the rest is for the checks."""

_HINT = "nothing was kept; another --precision, --optimization-level or TensorRT version may compute it right"


@dataclass(frozen=True, kw_only=True, slots=True)
class Built:
    """What `build_engine` left in the bundle."""

    entry: EngineEntry
    checks: tuple[Check, ...]
    """Those that it passed; none where there was no GPU to check it."""
    baseline: dict[str, Any] | None
    """INT8 and FP8 only: latencies of both, and their worst ratio."""
    rejected: str | None
    """Why FP16 was kept in place of what was asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Candidate:
    precision: Precision
    source: str
    """The graph's file in the bundle."""
    plan: BuiltPlan
    engine: TensorRtEngine
    checks: tuple[Check, ...]

    @property
    def failures(self) -> list[str]:
        return [f"{check.name}: {failure}" for check in self.checks for failure in check.failures]


def build_engine(
    bundle: Bundle,
    *,
    precision: Precision | None = None,
    profiles: Sequence[Profile] = (),
    options: BuildOptions = BuildOptions(),
    device: str = "auto",
    rtx: bool = False,
    prefer: Literal["fp16"] | None = None,
    max_latency: float = 1.0,
    on_progress: Report | None = None,
) -> Built:
    """Build an engine from the bundle's graph and add it to the bundle; nothing is added unless every check is passed.

    With INT8 and FP8, FP16 is built beside it from the bundle's baseline graph: only what is faster at the usual size
    of every profile is kept. TensorRT for RTX builds without a GPU as well: what it builds is then neither checked nor
    timed, and `check_first_use` does the former where it is loaded.

    Args:
        precision: None: the bundle's.
        profiles: sizes to build for; without any, those that the bundle was exported for.
        device: the GPU on which and for which it is built, see `EngineOptions`; with TensorRT for RTX the one that
            checks it, if there is one.
        rtx: build with TensorRT for RTX.
        prefer: fp16 keeps FP16 where INT8 or FP8 is not worth it, instead of an error.
        max_latency: the share of FP16's latency below which INT8 or FP8 must stay.
        on_progress: is told what is being done and the share of it all, from 0 to 1.

    Raises:
        ConfigError: a precision, sizes or options that the bundle, this TensorRT or this GPU cannot have.
        MissingDependency: no driver, GPU, `tensorrt`, or neither pycuda nor cuda-bindings.
        CheckFailed: the engine's outputs are not PyTorch's, or INT8 is not faster; both figures are in the message.
        MaeDeployError: TensorRT cannot build it, or the bundle cannot be written.
    """
    api = load_builder() if rtx else load_tensorrt(gpu_index(device))
    gpu = _gpu_that_checks(device) if rtx else api.gpu
    wanted = precision or bundle.manifest["precision"]
    complete = resolve_profiles(bundle, profiles)
    precisions: list[Precision] = [wanted, "fp16"] if wanted in QUANTIZED and gpu is not None else [wanted]
    sources = {name: graph_for(bundle, name) for name in precisions}
    expected = expected_outputs(bundle, complete) if gpu is not None else {}
    with temporary_folder() as folder, ExitStack() as stack:
        # All are built before one is opened: on a Jetson, an engine on the GPU takes from what a build can have.
        plans = [
            build_plan(
                bundle.graph(sources[name]),
                folder / f"{name}.plan",
                precision=name,
                typing=bundle.manifest["typing"],
                profiles=complete,
                options=options,
                index=api.gpu.index,
                rtx=rtx,
                on_progress=_part_of(
                    on_progress, name, _BUILDING * index / len(precisions), _BUILDING / len(precisions)
                ),
            )
            for index, name in enumerate(precisions)
        ]
        if gpu is None:
            unverified = add_plan(
                bundle,
                plans[0],
                version=api.version,
                gpu=target(wanted),
                precision=wanted,
                profiles=complete,
                build={**plans[0].record, **_origin(bundle, sources[wanted])},
                parity={},
                latency_ms=None,
            )
            return Built(entry=unverified, checks=(), baseline=None, rejected=None)
        found: list[_Candidate] = []
        for index, (name, plan) in enumerate(zip(precisions, plans, strict=True)):
            if on_progress is not None:
                on_progress(f"{name}: parity", _BUILDING + (1 - _BUILDING) * index / len(precisions))
            found.append(_try(stack, bundle, name, sources[name], plan, complete, options, expected, device, rtx=rtx))
        first, last = found[0], found[-1]  # one and the same, or INT8 and FP16
        if last.failures:
            raise CheckFailed(
                f"the {api.title} engine in {last.precision} misses parity: {'; '.join(last.failures)}",
                hint=_HINT,
            )
        timings = _time(bundle, found, complete)
        speed = (
            compare_speed(timings[first.precision], timings[last.precision], first.precision)
            if first is not last
            else None
        )
        rejected = (
            None if speed is None else reason_against_quantized(first.precision, first.failures, speed, max_latency)
        )
        if rejected is not None and prefer != "fp16":
            raise CheckFailed(rejected, hint="--prefer fp16 keeps FP16 in its place")
        kept = first if rejected is None else last
        entry = add_plan(
            bundle,
            kept.plan,
            version=api.version,
            gpu=target(kept.precision) if rtx else gpu,
            precision=kept.precision,
            profiles=complete,
            build={**kept.plan.record, **_origin(bundle, kept.source), "against_fp16": speed, "rejected": rejected},
            parity={gpu.name: parity_record(kept.checks)} if rtx else parity_record(kept.checks),
            latency_ms=1000 * timings[kept.precision][0].median,
        )
    return Built(entry=entry, checks=kept.checks, baseline=speed, rejected=rejected)


def _gpu_that_checks(device: str) -> Gpu | None:
    """The GPU that runs what TensorRT for RTX has built; None without one, or without access to its memory."""
    index = gpu_index(device)
    try:
        gpu = find_gpu(index)
        with open_memory(index=index):
            return gpu
    except (MissingDependency, ConfigError):
        return None


def build_missing_engine(bundle: Bundle, device: str, *, rtx: bool = False) -> None:
    """Build an engine with the defaults of `build_engine` unless the bundle has one that fits this machine.

    Args:
        device: see `EngineOptions`.
        rtx: one of TensorRT for RTX.

    Raises:
        ConfigError, MissingDependency, CheckFailed, MaeDeployError: as `build_engine`.
    """
    api = (load_rtx if rtx else load_tensorrt)(gpu_index(device))
    if find_plan(bundle, api.version, api.gpu) is None:
        build_engine(bundle, device=device, rtx=rtx)


def resolve_profiles(bundle: Bundle, given: Sequence[Profile]) -> list[Profile]:
    """The sizes to build for, complete: those that the bundle was exported for unless some are given; what they leave
    out is what the graph was checked for.

    Raises:
        ConfigError: sizes that the graph does not have or was not checked for, none that the golden samples have, or a
            graph of streams that was not exported for TensorRT.
    """
    if bundle.token_mode == "cached" and not CacheShape.of(bundle.manifest).fixed_rows:
        raise ConfigError(
            f"the graph of {bundle.path} leaves open how many rows of the cache it takes, for which TensorRT has no"
            " profile",
            hint="export with --engine trt --tokens cached, which always takes all of them",
        )
    checked = {name: (numbers[0], numbers[1], numbers[2]) for name, numbers in bundle.manifest["profile"].items()}
    fixed = {"B": bundle.fixed_batch, "K": bundle.fixed_keep}
    found: list[Profile] = []
    for profile in given or _exported_profiles(bundle) or [{}]:
        for name, numbers in profile.items():
            shown = f"--profile {name}:{','.join(map(str, numbers))}"
            if name not in checked:
                raise ConfigError(f"{shown}: a graph of all patches has no {name}", hint="leave it out")
            if fixed[name] is not None and numbers != checked[name]:
                raise ConfigError(
                    f"{shown}: the graph is fixed to {name} = {fixed[name]}",
                    hint="leave it out, or export with the size open",
                )
            if name == "K" and not checked["K"][0] <= numbers[0] <= numbers[2] <= checked["K"][2]:
                raise ConfigError(
                    f"{shown}: the graph was checked for K from {checked['K'][0]} to {checked['K'][2]}",
                    hint="export with another --profile",
                )
        found.append({**checked, **profile})
    for keep in golden_keeps(bundle) if "K" in checked else ():
        if not any(profile["K"][0] <= keep <= profile["K"][2] for profile in found):
            raise ConfigError(
                f"no --profile holds K = {keep}, with which the golden samples check the engine",
                hint=f"add another, such as '; K:{keep},{keep},{keep}'",
            )
    return found


def _exported_profiles(bundle: Bundle) -> list[Profile]:
    """`--profile` of the export, of which the manifest's own profile is the outline."""
    record = bundle.manifest["provenance"].get("export")
    text = record.get("profile") if isinstance(record, dict) else None
    return read_profiles(text) if isinstance(text, str) else []


def compare_speed(quantized: Sequence[Timing], fp16: Sequence[Timing], precision: str) -> dict[str, Any]:
    """Latencies at each profile's usual size, and the worst ratio of the two with its interval."""
    ratios = [mine.ratio(other) for mine, other in zip(quantized, fp16, strict=True)]
    worst = ratios.index(max(ratios))
    milliseconds = {
        name: [1000 * timing.median for timing in timings] for name, timings in ((precision, quantized), ("fp16", fp16))
    }
    interval = list(ratio_interval(quantized[worst], fp16[worst]))
    return {
        "latency_ratio": ratios[worst],
        "latency_ratio_interval": interval,
        "profile": worst,
        "latency_ms": milliseconds,
    }


def reason_against_quantized(
    precision: str, failures: Sequence[str], speed: dict[str, Any], max_latency: float = 1.0
) -> str | None:
    """Why INT8 or FP8 is rejected, with both figures; None where it is right and, by the upper end of the ratio's
    interval, fast enough.
    """
    ratio, at, (low, high) = speed["latency_ratio"], speed["profile"], speed["latency_ratio_interval"]
    if not failures and high < max_latency:
        return None
    why = (
        f"it misses its budget ({'; '.join(failures)})"
        if failures
        else "it is not shown to be fast enough"
        if ratio < max_latency
        else "it is not fast enough"
        if ratio < 1
        else "it is not faster"
    )
    mine, other = (speed["latency_ms"][name][at] for name in (precision, "fp16"))
    return (
        f"{precision.upper()} is rejected: {why}; it takes {ratio:.2f} of FP16's latency, {mine:.3f} against"
        f" {other:.3f} ms ({low:.2f} to {high:.2f} with {CONFIDENCE:.0%} confidence)"
    )


def _try(
    stack: ExitStack,
    bundle: Bundle,
    precision: Precision,
    source: str,
    plan: BuiltPlan,
    profiles: Sequence[Profile],
    options: BuildOptions,
    expected: Expected,
    device: str,
    *,
    rtx: bool,
) -> _Candidate:
    """Load and check an engine, launch by launch and as CUDA graphs; the latter stays open for the timing."""
    load = partial(
        TensorRtRtxEngine if rtx else TensorRtEngine,
        plan.file,
        precision=precision,
        profiles=profiles,
        host_code=options.version_compatible,
        weights=bundle.graph(source) if options.strip else None,
    )
    with load(EngineOptions(device=device, cuda_graphs=False)) as plain:
        checks = check_plan(bundle, plain, profiles, expected)
    engine = stack.enter_context(load(EngineOptions(device=device)))
    checks += check_plan(bundle, engine, profiles, expected)
    return _Candidate(precision=precision, source=source, plan=plan, engine=engine, checks=tuple(checks))


def _time(bundle: Bundle, candidates: Sequence[_Candidate], profiles: Sequence[Profile]) -> dict[str, list[Timing]]:
    """All engines in turns, at the usual size of each profile, by the GPU's clock: copies from and to the host, as
    much as the network itself in large batches, would bring every ratio towards 1.
    """
    golden = bundle.golden()
    found: dict[str, list[Timing]] = {candidate.precision: [] for candidate in candidates}
    for profile in profiles:
        inputs = repeated(inputs_at(bundle, golden, profile["K"][1] if "K" in profile else None), profile["B"][1])
        if UPDATES in inputs:
            inputs = last_update(inputs, CacheShape.of(bundle.manifest), bundle.input_names)
        timers = {candidate.precision: candidate.engine.timer(inputs, replays=_REPLAYS) for candidate in candidates}
        for name, timing in take_turns(timers, repeats=_ROUNDS, warmup=_WARMUP).items():
            found[name].append(timing)
    return found


def _origin(bundle: Bundle, source: str) -> dict[str, str]:
    return {"graph": source, "graph_sha256": bundle.manifest["files"][source]["sha256"]}


def _part_of(report: Report | None, name: str, begin: float, share_of_all: float) -> Report | None:
    """Reports of one build as a part of the whole."""
    if report is None:
        return None

    def part(phase: str, share: float) -> None:
        report(f"{name}: {phase}", begin + share_of_all * share)

    return part
