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
from mae_deploy.runtime.parity.own_noise import CHANNELS_DB, GOLDEN_DB, own_noise, reason_against_own_noise
from mae_deploy.runtime.parity.trials import Trial, changed_entries, tolerance_of_trial, trials
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

_NOISE_DB = 1.5
"""By how much more an output may be off than it was at export, where the engine and the CPU are the same: on 1 to 4
threads, FP16, BF16 and INT8 were the same to 0.01 dB."""

_FEW_DB, _ENOUGH = 6.0, 64
"""The same of an output with fewer values, of which one that is rounded to its other side can be most of the noise."""

_SUMMATION_DB, _SUMMED_DB = 3.0, 125.0
"""The same of FP32, whose noise is the order in which threads add; above so many dB it says nothing: a mean of 200
patches fell from 139 to 133 dB on three threads."""

_CHANNEL_DB = 3.0
"""The same of the worst channel of an output, except in FP32."""

MANIFEST = "manifest"
"""The check of what the manifest says of the graph against what it said at export."""


@dataclasses.dataclass(frozen=True, slots=True)
class Check:
    """One output in one check."""

    name: str
    """`golden`, `as exported`, `preprocessing`, `manifest`, `run again`, `permuted ids_keep`, `sorted ids_keep`, `other
    padding`, `longer padding`, `repeated update`, `sample alone`, `other batches`, `largest batch`, `other neighbours`,
    `other lengths`, or the name of a trial of the golden file."""
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
    trials: tuple[str, ...] = ()
    """Checks against PyTorch's outputs of other inputs than the golden samples."""

    @property
    def outputs(self) -> tuple[Check, ...]:
        """The checks against PyTorch's outputs, one for each output."""
        return tuple(check for check in self.checks if check.name == GOLDEN)

    @property
    def invariances(self) -> tuple[Check, ...]:
        """The checks of the golden samples in other forms."""
        others = (GOLDEN, AS_EXPORTED, PREPROCESSING, MANIFEST, *self.trials)
        return tuple(check for check in self.checks if check.name not in others)

    @property
    def preprocessing(self) -> Check | None:
        """The check of what makes the graph's input of an image; None in bundles that were exported before there was
        one.
        """
        return next((check for check in self.checks if check.name == PREPROCESSING), None)

    @property
    def outputs_pass(self) -> bool:
        """Whether the outputs are PyTorch's, whatever the other checks found."""
        against_pytorch = (GOLDEN, AS_EXPORTED, *self.trials)
        return not any(check.failures for check in self.checks if check.name in against_pytorch)

    @property
    def figures(self) -> dict[str, Comparison]:
        """Each comparison with PyTorch by the name that its noise is recorded under."""
        return {_noise_name(check): check.comparison for check in self.checks if check.name in (GOLDEN, *self.trials)}

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
            "trials": [check.to_dict() for check in self.checks if check.name in self.trials],
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
    others = [*trials(bundle)]
    checks = _Checks(bundle, engine).all(inputs, {name: golden[name] for name in bundle.output_names}, others)
    unlike = reason_against_own_noise(bundle, engine)
    found = Verification(
        bundle=str(bundle.path),
        engine=engine.name,
        engine_version=engine.version,
        device=engine.device,
        num_samples=bundle.manifest["golden"]["num_samples"],
        tolerance=tolerance_for(bundle, engine),
        checks=(*check_manifest(bundle), *checks),
        left_out=() if unlike is None else (f"'{AS_EXPORTED}' (how near to PyTorch it was then): {unlike}",),
        trials=tuple(trial.name for trial in others),
    )
    more = (*_as_exported(bundle, engine, found), *check_preprocessing(bundle))
    return dataclasses.replace(found, checks=(*found.checks, *more))


def check_manifest(bundle: Bundle) -> list[Check]:
    """A check that fails for each entry of the manifest that is not as it was exported.

    Raises:
        CheckFailed: the golden samples are not what was exported.
    """
    return [Check(MANIFEST, Comparison(name=MANIFEST, reason=line), (line,)) for line in changed_entries(bundle)]


def _noise_name(check: Check) -> str:
    name = check.comparison.name
    return name if check.name == GOLDEN else f"{check.name}: {name}"


def _as_exported(bundle: Bundle, engine: Engine, verification: Verification) -> list[Check]:
    """Each output, and its worst channel, against how near to PyTorch they were at export, where that was on this
    engine and CPU.
    """
    before, found = own_noise(bundle, engine), []
    is_fp32 = bundle.precision == "fp32"
    for name, comparison in verification.figures.items():
        output_db, channel_db = (before.get(kind, {}).get(name) for kind in (GOLDEN_DB, CHANNELS_DB))
        is_small = comparison.num_values < _ENOUGH
        if output_db is None or (is_fp32 and is_small):
            continue
        least = output_db - (_FEW_DB if is_small else _NOISE_DB)
        if is_fp32:
            least = min(output_db - _SUMMATION_DB, _SUMMED_DB)
        failures = []
        if not comparison.sqnr_db >= least:
            failures.append(f"{name}: sqnr_db {comparison.sqnr_db:.1f}, at export {output_db:.1f}")
        elif channel_db is not None and not (
            is_fp32 or is_small or comparison.channel_sqnr_db >= channel_db - _CHANNEL_DB
        ):
            failures.append(
                f"{name}: sqnr_db of the worst channel {comparison.channel_sqnr_db:.1f}, at export {channel_db:.1f}"
            )
        if failures or name == comparison.name:  # of other trials, what misses
            lines = tuple(f"{line} on the same engine and CPU" for line in failures)
            found.append(Check(AS_EXPORTED, dataclasses.replace(comparison, name=name), lines))
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

    def all(self, inputs: Arrays, golden: Arrays, more: Sequence[Trial]) -> list[Check]:
        """Every check of the golden samples, and other trials."""
        found = self._run(inputs)
        checks = self._judge(GOLDEN, golden, found)
        for trial in more:
            if self._takes(trial.inputs):
                limits = tolerance_of_trial(trial.name, self.bundle.precision, self.tolerance)
                checks += self._judge(trial.name, trial.expected, self._run(trial.inputs), limits)
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
        S, total = self.bundle.manifest["golden"]["num_samples"], len(next(iter(found.values())))
        judged: list[Check] = []
        # Where samples come more than once, each time by itself: of so many one may get another class.
        for first in dict.fromkeys([*range(0, total - S + 1, S), total - S]):
            right, new = ({name: a[first : first + S] for name, a in arrays.items()} for arrays in (expected, found))
            checks = self._judge(variation.name, right, new)
            pairs = zip(judged or checks, checks, strict=True)
            judged = [check if check.failures and not before.failures else before for before, check in pairs]
        return judged

    def _run(self, inputs: Arrays) -> Arrays:
        return run_in_chunks(self.runner, inputs, batch=self.bundle.fixed_batch, outputs=self.bundle.output_names)

    def _judge(self, name: str, expected: Arrays, found: Arrays, tolerance: Tolerance | None = None) -> list[Check]:
        checks = []
        for output in self.bundle.output_names:
            comparison = compare(expected[output], found[output], output)
            checks.append(Check(name, comparison, tuple(comparison.failures(tolerance or self.tolerance))))
        return checks
