"""The checks of `verify`: golden samples, invariances, and what the outputs should be."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.cache import runner
from mae_deploy.runtime.engines.base import Engine, run_in_chunks
from mae_deploy.runtime.manifest import FRAME, FRAME_IMAGE, IDS_KEEP, PLANNED
from mae_deploy.runtime.parity.compare import Comparison, compare
from mae_deploy.runtime.parity.invariances import (
    Arrays,
    Variation,
    even_rows,
    joined,
    other_lengths,
    samples_alone,
    variations,
)
from mae_deploy.runtime.parity.own_noise import GOLDEN_DB, own_noise, reason_against_own_noise
from mae_deploy.runtime.profiles import batch_that_fits
from mae_deploy.runtime.tolerance import TOLERANCES, Tolerance

GOLDEN = "golden"
"""The check of the golden samples as they are; in all others they come in another form."""


RUN_AGAIN = "run again"
"""The check of the same samples against the engine's own first outputs."""


PREPROCESSING = "preprocessing"
"""The check of a frame through the device's own preprocessing against what it was at export."""

_LEVELS = 1.5
"""By how many steps of 255 a pixel may differ: libraries round a resized pixel up or down."""


AS_EXPORTED = "as exported"
"""The check of the golden samples against how near to PyTorch they were at export, on this engine and CPU."""

_NOISE_DB = 2.0
"""By how much more an output may be off than it was at export, where the engine and the CPU are the same: half as much
noise again."""

_SUMMATION_DB = 3.0
"""The same of FP32, whose noise is the order in which threads add: it was seen to move by 1 dB."""

_ENOUGH = 64
"""Values that an output must have for its noise to be told."""


@dataclasses.dataclass(frozen=True, slots=True)
class Check:
    """One output in one check."""

    name: str
    """`golden`, `as exported`, `preprocessing`, `run again`, `permuted ids_keep`, `other padding`, `longer padding`,
    `repeated update`, `sample alone`, `other neighbours` or `other lengths`."""
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
    left_out: tuple[str, ...] = ()
    """Checks that could not be made, and why."""

    @property
    def outputs(self) -> tuple[Check, ...]:
        """The checks against PyTorch's outputs, one for each output."""
        return tuple(check for check in self.checks if check.name == GOLDEN)

    @property
    def invariances(self) -> tuple[Check, ...]:
        """The checks of the golden samples in other forms."""
        return tuple(check for check in self.checks if check.name not in (GOLDEN, AS_EXPORTED, PREPROCESSING))

    @property
    def preprocessing(self) -> Check | None:
        """The check of what makes the graph's input of an image; None in bundles that were exported before there was
        one.
        """
        return next((check for check in self.checks if check.name == PREPROCESSING), None)

    @property
    def outputs_pass(self) -> bool:
        """Whether the outputs are PyTorch's, whatever the other checks found."""
        return not any(check.failures for check in self.checks if check.name in (GOLDEN, AS_EXPORTED))

    @property
    def failures(self) -> list[str]:
        """Every miss, a line each."""
        return [f"{check.name}: {failure}" for check in self.checks for failure in check.failures]

    @property
    def not_finite(self) -> bool:
        """Whether an output has NaN or infinite values."""
        return any(check.comparison.not_finite for check in self.outputs)

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
            "preprocessing": None if self.preprocessing is None else self.preprocessing.to_dict(),
            "left_out": list(self.left_out),
            "failures": self.failures,
        }


def first_causes(failures: Sequence[str], names: Sequence[str]) -> list[str]:
    """Of each output the first miss: those of later checks follow from it. What names no output stays.

    Args:
        failures: in the order of the checks, each with the name of its output before the last colon but one.
    """
    found: dict[str, str] = {}
    for failure in failures:
        name = next((name for name in names if f": {failure}".find(f": {name}: ") >= 0), failure)
        found.setdefault(name, failure)
    return list(found.values())


def verify_engine(bundle: Bundle, engine: Engine) -> Verification:
    """`verify_bundle` on an engine that is loaded already.

    Raises:
        CheckFailed: the golden samples are not what was exported.
        MaeDeployError: the engine refuses the samples.
    """
    golden = bundle.golden()
    inputs = {name: golden[name] for name in bundle.sample_names}
    checks = _Checks(bundle, engine).all(inputs, {name: golden[name] for name in bundle.output_names})
    unlike = reason_against_own_noise(bundle, engine)
    return Verification(
        bundle=str(bundle.path),
        engine=engine.name,
        engine_version=engine.version,
        device=engine.device,
        num_samples=bundle.manifest["golden"]["num_samples"],
        tolerance=tolerance_for(bundle, engine),
        checks=(*checks, *_as_exported(bundle, engine, checks), *check_preprocessing(bundle)),
        left_out=() if unlike is None else (f"'{AS_EXPORTED}' (how near to PyTorch it was then): {unlike}",),
    )


def _as_exported(bundle: Bundle, engine: Engine, checks: Sequence[Check]) -> list[Check]:
    """Each output against how near to PyTorch it was at export, where that was on this engine and CPU."""
    before_db = own_noise(bundle, engine).get(GOLDEN_DB, {})
    found, golden = [], bundle.golden()
    for check in checks:
        name = check.comparison.name
        before = before_db.get(name)
        if check.name != GOLDEN or before is None or golden[name].size < _ENOUGH:
            continue
        least = before - (_SUMMATION_DB if bundle.precision == "fp32" else _NOISE_DB)
        missed = not check.comparison.sqnr_db >= least
        said = f"{name}: sqnr_db {check.comparison.sqnr_db:.1f}, at export {before:.1f} on the same engine and CPU"
        found.append(Check(AS_EXPORTED, check.comparison, (said,) if missed else ()))
    return found


def check_preprocessing(bundle: Bundle) -> list[Check]:
    """What this machine makes of the golden frame against what the exporting one made of it: crop, resize, order of the
    channels, mean and deviation. Empty where the bundle has no such frame.

    Raises:
        CheckFailed: the golden samples are not what was exported.
    """
    golden, spec = bundle.golden(), bundle.preprocess
    if not {FRAME, FRAME_IMAGE} <= golden.keys():
        return []
    comparison = compare(golden[FRAME_IMAGE][None], spec([golden[FRAME]]), FRAME)
    tolerance = Tolerance(max_abs=_LEVELS / 255 / min(spec.std))
    return [Check(PREPROCESSING, comparison, tuple(comparison.failures(tolerance)))]


def tolerance_for(bundle: Bundle, engine: Engine) -> Tolerance:
    """What every output must meet: the bundle's tolerance, or that of the precision in which TensorRT was told to
    compute an FP32 or INT8 bundle.
    """
    return bundle.tolerance if _precision(bundle, engine) == bundle.precision else TOLERANCES[engine.precision]


def _precision(bundle: Bundle, engine: Engine) -> str:
    return engine.precision if engine.name in PLANNED else bundle.precision


class _Checks:
    """Runs an engine and checks its outputs."""

    def __init__(self, bundle: Bundle, engine: Engine) -> None:
        self.bundle, self.engine, self.runner = bundle, engine, runner(engine, bundle.manifest)
        self.is_fp32 = _precision(bundle, engine) == "fp32"
        self.tolerance = tolerance_for(bundle, engine)

    def all(self, inputs: Arrays, golden: Arrays) -> list[Check]:
        """Every check of the golden samples."""
        found = self._run(inputs)
        checks = self._judge(GOLDEN, golden, found)
        checks += self._judge(RUN_AGAIN, found, self._run(inputs), None if self.is_fp32 else TOLERANCES["fp32"])
        # FP32 is compared with itself, which finds what PyTorch's outputs would hide in their tolerance. Lower
        # precisions are compared with PyTorch: the range of a dynamically quantised tensor spans the batch, so a sample
        # with other neighbours is rounded otherwise, and two right answers, each off by the error that is allowed,
        # differ by up to twice as much.
        base = found if self.is_fp32 else golden
        for variation in variations(self.bundle, inputs):
            if all(self._takes(part) for part in variation.parts):
                checks += self._vary(variation, base)
        if (
            self.bundle.token_mode == "ragged" and self.is_fp32
        ):  # the golden file has no PyTorch outputs of other lengths
            others = other_lengths(self.bundle, inputs)
            alone = samples_alone(self.bundle, others)
            if all(self._takes(part) for part in (others, *alone)):
                checks += self._vary(Variation(name="other lengths", parts=alone), self._run(others))
        return checks

    def _takes(self, inputs: Arrays) -> bool:
        """Whether the engine was made for this K, which may be for less than the graph is."""
        return IDS_KEEP not in inputs or batch_that_fits(self.runner.profiles, 1, inputs[IDS_KEEP].shape[1]) is not None

    def _vary(self, variation: Variation, base: Arrays) -> list[Check]:
        expected, found = even_rows([variation.arranged(base), joined([self._run(part) for part in variation.parts])])
        return self._judge(variation.name, expected, found)

    def _run(self, inputs: Arrays) -> Arrays:
        return run_in_chunks(self.runner, inputs, batch=self.bundle.fixed_batch, outputs=self.bundle.output_names)

    def _judge(self, name: str, expected: Arrays, found: Arrays, tolerance: Tolerance | None = None) -> list[Check]:
        checks = []
        for output in self.bundle.output_names:
            comparison = compare(expected[output], found[output], output)
            checks.append(Check(name, comparison, tuple(comparison.failures(tolerance or self.tolerance))))
        return checks
