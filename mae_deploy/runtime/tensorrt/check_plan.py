"""Whether a TensorRT engine computes what PyTorch computed, at every size that it was built for.

TensorRT is known to build engines that are wrong for some shapes without a word, so no engine is kept that was not
compared at its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import util
from typing import Any

import numpy as np

from mae_deploy.errors import MissingDependency
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.cache import runner
from mae_deploy.runtime.engines.base import EngineOptions, run_in_chunks
from mae_deploy.runtime.engines.onnxruntime import OnnxRuntimeEngine
from mae_deploy.runtime.manifest import IDS_KEEP, IMAGES, NUM_KEEP, PATCHES, TOKEN_INPUTS, UPDATES
from mae_deploy.runtime.parity.checks import GOLDEN, Check, tolerance_for, verify_engine
from mae_deploy.runtime.parity.compare import compare
from mae_deploy.runtime.parity.invariances import Arrays
from mae_deploy.runtime.profiles import Profile, batch_that_fits
from mae_deploy.runtime.tensorrt.engine import TensorRtEngine

Expected = Mapping[int | None, tuple[Arrays, Arrays]]
"""For each K of the profiles, None for graphs of all patches: samples with so many patches, and their outputs."""


def check_plan(bundle: Bundle, engine: TensorRtEngine, profiles: Sequence[Profile], expected: Expected) -> list[Check]:
    """Every check of a fresh engine; what missed is in `Check.failures`.

    The golden samples against PyTorch and under the invariances, then the smallest, usual and largest sizes of each
    profile; an engine that uses CUDA graphs is compared as it replays them.

    Args:
        expected: see `expected_outputs`.

    Raises:
        CheckFailed: a file of the bundle is not what was exported.
        MaeDeployError: the engine refuses the samples.
    """
    tolerance = tolerance_for(bundle, engine)
    at_sizes: list[Check] = []
    # First of all: only the first shapes that an engine meets get graphs.
    run = runner(engine, bundle.manifest).run
    for where, inputs, wanted in _at_every_size(profiles, expected):
        if engine.use_graphs:
            run(inputs, bundle.output_names)  # the graph of a shape is recorded after its first run
        found = run(inputs, bundle.output_names)
        for name in bundle.output_names:
            comparison = compare(wanted[name], found[name], name)
            at_sizes.append(Check(where, comparison, tuple(comparison.failures(tolerance))))
    checks = [*verify_engine(bundle, engine).checks, *at_sizes]
    return [replace(check, name=f"{check.name}, CUDA graph") for check in checks] if engine.use_graphs else checks


def expected_outputs(bundle: Bundle, profiles: Sequence[Profile]) -> Expected:
    """What an engine is compared with at every size: by ONNX Runtime on the CPU; where it cannot compute the graph,
    PyTorch's outputs at the golden samples' own K alone.

    Raises:
        CheckFailed: a file of the bundle is not what was exported.
        MissingDependency: no ONNX Runtime, and a K other than the golden samples'.
        MaeDeployError: ONNX Runtime refuses the samples.
    """
    golden = bundle.golden()
    wanted = list(dict.fromkeys(K for _, K in _sizes(profiles)))
    if not _is_computed_by_onnxruntime(bundle):
        own = golden_keeps(bundle)[-1] if IDS_KEEP in bundle.input_names else None
        others = [K for K in wanted if K != own]
        if others and not _has_onnxruntime():
            raise MissingDependency(
                f"without onnxruntime an engine can be checked at the golden samples' {own} patches alone, not at"
                f" {others[0]}",
                hint="pip install onnxruntime",
            )
        inputs = {name: golden[name] for name in bundle.sample_names}
        return {own: (inputs, {name: golden[name] for name in bundle.output_names})}
    # INT8 and FP8 are compared with the FP16 graph: ONNX Runtime's rounding is not the engine's.
    name = bundle.baseline or bundle.manifest["graph"]["file"]
    graph = bundle.graph(name)
    with OnnxRuntimeEngine(graph, EngineOptions(device="cpu"), check=bundle.checks[name]) as engine:
        reference, found = runner(engine, bundle.manifest), {}
        for K in wanted:
            inputs = inputs_at(bundle, golden, K)
            outputs = run_in_chunks(reference, inputs, batch=bundle.fixed_batch, outputs=bundle.output_names)
            found[K] = (inputs, outputs)
    return found


def golden_keeps(bundle: Bundle) -> list[int]:
    """How many patches the golden samples take: K; of streams, that of each update."""
    golden = bundle.golden()
    lengths: list[int] = golden[UPDATES][0].tolist() if UPDATES in golden else [golden[IDS_KEEP].shape[1]]
    return lengths


def inputs_at(bundle: Bundle, golden: Arrays, keep: int | None) -> Arrays:
    """The golden samples with `keep` patches each: their own where they have as many, else random ones; of a ragged
    graph, of one patch to all of them; of streams, two updates of so many.
    """
    rng = np.random.default_rng(0)
    if bundle.token_mode == "cached":
        assert keep is not None
        patches, updates = golden[PATCHES], np.full((len(golden[IDS_KEEP]), 2), keep, np.int64)
        S, M, _ = patches.shape
        ids = np.stack([np.concatenate([rng.permutation(bundle.num_patches)[:keep] for _ in "12"]) for _ in range(S)])
        return {PATCHES: patches[:, rng.integers(0, M, 2 * keep)], IDS_KEEP: ids.astype(np.int64), UPDATES: updates}
    if keep is None or golden[IDS_KEEP].shape[1] == keep:
        return {name: golden[name] for name in bundle.input_names}
    S = len(golden[IMAGES])
    ids = np.stack([rng.permutation(bundle.num_patches)[:keep] for _ in range(S)]).astype(np.int64)
    lengths = np.linspace(1, keep, S).round().astype(np.int64)
    chosen = {IDS_KEEP: ids, NUM_KEEP: lengths}
    return {IMAGES: golden[IMAGES], **{name: chosen[name] for name in TOKEN_INPUTS[bundle.token_mode]}}


def repeated(arrays: Arrays, batch: int) -> Arrays:
    """The samples again and again, until there are `batch`."""
    return {name: np.ascontiguousarray(array[np.arange(batch) % len(array)]) for name, array in arrays.items()}


def parity_record(checks: Sequence[Check]) -> dict[str, Any]:
    """For the manifest: the golden samples' figures, and of each output the worst over all checks against a
    reference.
    """
    compared = [check for check in checks if not check.name.startswith("run again")]
    worst: dict[str, dict[str, float | None]] = {}
    for name in dict.fromkeys(check.comparison.name for check in compared):
        figures = [check.comparison.to_dict() for check in compared if check.comparison.name == name]
        worst[name] = {
            measure: _least([row[measure] for row in figures]) for measure in ("cosine", "centred_cosine", "sqnr_db")
        }
    return {
        "passed": not any(check.failures for check in checks),
        "checks": len(checks),
        "sizes": list(dict.fromkeys(check.name for check in checks if check.name.startswith("profile"))),
        "golden": [check.to_dict() for check in checks if check.name == GOLDEN],
        "worst": worst,
    }


def _at_every_size(profiles: Sequence[Profile], expected: Expected) -> Iterator[tuple[str, Arrays, Arrays]]:
    """Name, inputs and what the outputs must be, for each size of each profile of which that is known."""
    for (B, K), name in _sizes(profiles).items():
        if K not in expected:
            continue
        inputs, outputs = expected[K]
        others = inputs[UPDATES][0].tolist() if UPDATES in inputs else []  # a whole frame before the K of the samples
        if all(batch_that_fits(profiles, B, other) == B for other in others):
            yield name, repeated(inputs, B), repeated(outputs, B)


def _sizes(profiles: Sequence[Profile]) -> dict[tuple[int, int | None], str]:
    """Smallest, usual and largest B and K of each profile, each pair once, with a name."""
    found: dict[tuple[int, int | None], str] = {}
    for index, profile in enumerate(profiles):
        for which, place in enumerate(("min", "opt", "max")):
            sizes = {name: numbers[which] for name, numbers in profile.items()}
            shown = ", ".join(f"{name}={size}" for name, size in sizes.items())
            found.setdefault((sizes["B"], sizes.get("K")), f"profile {index} {place}, {shown}")
    return found


def _is_computed_by_onnxruntime(bundle: Bundle) -> bool:
    """Not a strongly typed BF16 graph, whose products it has no kernels for."""
    return _has_onnxruntime() and (bundle.precision, bundle.manifest["typing"]) != ("bf16", "strong")


def _has_onnxruntime() -> bool:
    return util.find_spec("onnxruntime") is not None


def _least(values: Sequence[float | None]) -> float | None:
    """The smallest number; None where each is infinite."""
    return min((value for value in values if value is not None), default=None)
