"""Whether a TensorRT engine computes what PyTorch computed, at every size that it was built for, launch by launch and
as a CUDA graph.

TensorRT is known to build engines that are wrong for some shapes without a word, so no engine is kept that was not
compared at its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib import util
from typing import Any

import numpy as np

from mae_deploy.errors import MissingDependency
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.engines.base import Engine, EngineOptions, run_in_chunks
from mae_deploy.runtime.engines.onnxruntime import OnnxRuntimeEngine
from mae_deploy.runtime.manifest import IDS_KEEP, IMAGES, NUM_KEEP, TOKEN_INPUTS
from mae_deploy.runtime.parity.checks import GOLDEN, Check, tolerance_for, verify_engine
from mae_deploy.runtime.parity.compare import compare
from mae_deploy.runtime.parity.invariances import Arrays
from mae_deploy.runtime.profiles import Profile
from mae_deploy.runtime.tensorrt.engine import TensorRtEngine


def check_plan(bundle: Bundle, engine: TensorRtEngine, profiles: Sequence[Profile]) -> list[Check]:
    """Every check of an engine; what missed is in `Check.failures`.

    The golden samples against PyTorch and under the invariances, then the smallest, usual and largest sizes of each
    profile against ONNX Runtime on the CPU: all of it with CUDA graphs and without.

    Raises:
        CheckFailed: a file of the bundle is not what was exported.
        MissingDependency: no ONNX Runtime to compare with at other numbers of patches than the golden samples'.
        MaeDeployError: an engine refuses the samples.
    """
    tolerance = tolerance_for(bundle, engine)
    at_sizes: list[Check] = []
    # First of all: only the first shapes that an engine meets get graphs.
    for where, inputs, expected in _at_every_size(bundle, profiles):
        for graphs in (False, True):
            engine.use_graphs = graphs
            if graphs:
                engine.run(inputs, bundle.output_names)  # the graph of a shape is recorded after its first run
            found = engine.run(inputs, bundle.output_names)
            for name in bundle.output_names:
                comparison = compare(expected[name], found[name], name)
                at_sizes.append(_named(Check(where, comparison, tuple(comparison.failures(tolerance))), graphs))
    verified: list[Check] = []
    for graphs in (False, True):
        engine.use_graphs = graphs
        verified += [_named(check, graphs) for check in verify_engine(bundle, engine).checks]
    return verified + at_sizes


def inputs_at(bundle: Bundle, golden: Arrays, keep: int | None) -> Arrays:
    """The golden samples with `keep` patches each: their own where they have as many, else random ones; of a ragged
    graph, of one patch to all of them.
    """
    if keep is None or golden[IDS_KEEP].shape[1] == keep:
        return {name: golden[name] for name in bundle.input_names}
    S, rng = len(golden[IMAGES]), np.random.default_rng(0)
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


def _at_every_size(bundle: Bundle, profiles: Sequence[Profile]) -> Iterator[tuple[str, Arrays, Arrays]]:
    """A name, inputs and what the outputs must be, for each size of each profile that can be judged."""
    golden = bundle.golden()
    known: dict[int | None, Arrays] = {}
    with ExitStack() as stack:
        reference = _reference(bundle, stack)
        for (B, K), name in _sizes(profiles).items():
            inputs = inputs_at(bundle, golden, K)
            if reference is not None and K not in known:
                known[K] = run_in_chunks(reference, inputs, batch=bundle.fixed_batch, outputs=bundle.output_names)
            elif reference is None and (K is None or K == golden[IDS_KEEP].shape[1]):
                known[K] = {output: golden[output] for output in bundle.output_names}
            elif K not in known and not _has_onnxruntime():
                raise MissingDependency(
                    f"without onnxruntime an engine can be proven for the golden samples' {golden[IDS_KEEP].shape[1]}"
                    f" patches alone, not for {K}",
                    hint="pip install onnxruntime",
                )
            if K in known:
                yield name, repeated(inputs, B), repeated(known[K], B)


def _sizes(profiles: Sequence[Profile]) -> dict[tuple[int, int | None], str]:
    """Smallest, usual and largest B and K of each profile, each pair once, with a name."""
    found: dict[tuple[int, int | None], str] = {}
    for index, profile in enumerate(profiles):
        for which, place in enumerate(("min", "opt", "max")):
            sizes = {name: numbers[which] for name, numbers in profile.items()}
            shown = ", ".join(f"{name}={size}" for name, size in sizes.items())
            found.setdefault((sizes["B"], sizes.get("K")), f"profile {index} {place}, {shown}")
    return found


def _reference(bundle: Bundle, stack: ExitStack) -> Engine | None:
    """ONNX Runtime on the CPU, with the FP16 graph in place of one in INT8 or FP8: its rounding is not the engine's.

    None for a strongly typed BF16 graph, which it cannot compute, and where it is not installed: there PyTorch's golden
    outputs are what there is.
    """
    if (bundle.precision, bundle.manifest["typing"]) == ("bf16", "strong") or not _has_onnxruntime():
        return None
    return stack.enter_context(OnnxRuntimeEngine(bundle.graph(bundle.baseline), EngineOptions(device="cpu")))


def _has_onnxruntime() -> bool:
    return util.find_spec("onnxruntime") is not None


def _named(check: Check, graphs: bool) -> Check:
    return replace(check, name=f"{check.name}, CUDA graph") if graphs else check


def _least(values: Sequence[float | None]) -> float | None:
    """The smallest number; None where each is infinite."""
    return min((value for value in values if value is not None), default=None)
