"""Whether a bundle computes on this device what PyTorch computed when it was exported; no torch needed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from mae_deploy.preprocess import Array
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.engine import Engine, run_in_chunks
from mae_deploy.runtime.manifest import IDS_KEEP
from mae_deploy.runtime.parity import Comparison, Tolerance, compare
from mae_deploy.runtime.registry import load_engine

GOLDEN = "golden"
"""The check against PyTorch's outputs; all others compare the engine with itself."""

TOKENS = "tokens"
"""The output whose second axis follows `ids_keep`."""

Arrays = dict[str, Array]


@dataclasses.dataclass(frozen=True, slots=True)
class Check:
    """One output in one check."""

    name: str
    """`golden`, `permuted ids_keep`, `sample alone`, `other neighbours` or `run again`."""
    comparison: Comparison
    failures: tuple[str, ...]
    """What misses the tolerance; empty where all is met."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"check": self.name, "passed": not self.failures, **self.comparison.to_dict()}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """The result of `verify_bundle`."""

    bundle: str
    engine: str
    engine_version: str
    device: str
    num_samples: int
    tolerance: Tolerance
    checks: tuple[Check, ...]

    @property
    def outputs(self) -> tuple[Check, ...]:
        """The checks against PyTorch's outputs, one for each output."""
        return tuple(check for check in self.checks if check.name == GOLDEN)

    @property
    def invariances(self) -> tuple[Check, ...]:
        """The checks of the engine against itself."""
        return tuple(check for check in self.checks if check.name != GOLDEN)

    @property
    def failures(self) -> list[str]:
        """Every miss, a line each."""
        return [f"{check.name}: {failure}" for check in self.checks for failure in check.failures]

    @property
    def passed(self) -> bool:
        """Whether every check met the tolerance."""
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "passed": self.passed,
            "bundle": self.bundle,
            "engine": self.engine,
            "engine_version": self.engine_version,
            "device": self.device,
            "num_samples": self.num_samples,
            "tolerance": self.tolerance.to_dict(),
            "outputs": [check.to_dict() for check in self.outputs],
            "invariances": [check.to_dict() for check in self.invariances],
            "failures": self.failures,
        }


def verify_bundle(bundle: Bundle, engine: str = "auto", *, device: str = "cpu", threads: int | None = None) -> Verification:
    """Check the hash of every file, then run the golden samples and compare all outputs with PyTorch's and with themselves under invariances.

    Raises:
        CheckFailed: a file is not what was exported. A missed tolerance is no exception: see `Verification.passed`.
        ConfigError: an unknown engine or device.
        MissingDependency: the engine's package or its device is absent.
        MaeDeployError: the engine refuses the graph or the samples.
    """
    bundle.check_files()
    with load_engine(bundle, engine, device=device, threads=threads) as loaded:
        return verify_engine(bundle, loaded)


def verify_engine(bundle: Bundle, engine: Engine) -> Verification:
    """`verify_bundle` on an engine that is loaded already.

    Raises:
        CheckFailed: the golden samples are not what was exported.
        MaeDeployError: the engine refuses the samples.
    """
    golden = bundle.golden()
    inputs = {name: golden[name] for name in bundle.input_names}
    tolerance = bundle.tolerance
    checks = []
    for name, expected, found in _pairs(bundle, engine, inputs, golden):
        for output in bundle.output_names:
            comparison = compare(expected[output], found[output], output)
            checks.append(Check(name, comparison, tuple(comparison.failures(tolerance))))
    return Verification(
        bundle=str(bundle.path),
        engine=engine.name,
        engine_version=engine.version,
        device=engine.device,
        num_samples=len(golden[bundle.input_names[0]]),
        tolerance=tolerance,
        checks=tuple(checks),
    )


def _pairs(bundle: Bundle, engine: Engine, inputs: Arrays, golden: Arrays) -> Iterator[tuple[str, Arrays, Arrays]]:
    """Each check's name, what all outputs must be and what they are."""

    def run(samples: Arrays) -> Arrays:
        return run_in_chunks(engine, samples, batch=bundle.fixed_batch)

    batched = run(inputs)
    yield GOLDEN, golden, batched
    yield "run again", batched, run(inputs)
    if IDS_KEEP in inputs and inputs[IDS_KEEP].shape[1] > 1:
        order = _shuffled(inputs[IDS_KEEP].shape[1])
        permuted = run({**inputs, IDS_KEEP: np.ascontiguousarray(inputs[IDS_KEEP][:, order])})
        yield "permuted ids_keep", {name: array[:, order] if name == TOKENS else array for name, array in batched.items()}, permuted
    num_samples = len(next(iter(inputs.values())))
    if bundle.fixed_batch is None and num_samples > 1:
        alone = [run({name: array[index : index + 1] for name, array in inputs.items()}) for index in range(num_samples)]
        yield "sample alone", batched, {name: np.concatenate([outputs[name] for outputs in alone]) for name in batched}
    elif bundle.fixed_batch is not None and bundle.fixed_batch > 1:
        # A sample cannot be run alone here; it gets another place in the batch and other neighbours.
        order = np.arange(1, num_samples + 1) % num_samples
        rolled = run({name: array[order] for name, array in inputs.items()})
        yield "other neighbours", {name: array[order] for name, array in batched.items()}, rolled


def _shuffled(length: int) -> Array:
    """A fixed reordering of `length` items, never the order as it was."""
    order = np.random.default_rng(0).permutation(length)
    return order if (order != np.arange(length)).any() else order[::-1]
