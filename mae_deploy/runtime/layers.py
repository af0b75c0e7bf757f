"""Where precision is lost: the tokens after every block of a bundle's graph against PyTorch's, without torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mae_deploy.errors import ConfigError, MaeDeployError
from mae_deploy.images.read import Array
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.cache import runner
from mae_deploy.runtime.engines.base import EngineOptions, run_in_chunks
from mae_deploy.runtime.manifest import BLOCKS, NUM_KEEP, num_prefix
from mae_deploy.runtime.parity.compare import Comparison, compare
from mae_deploy.runtime.parity.own_noise import BLOCKS_DB, own_noise
from mae_deploy.runtime.registry import load_engine

FLOOR_DB = 80.0
"""The least SQNR after a block where the bundle's tolerance names none: FP32 has 100 to 130 dB, whatever the order of
summation."""

_SUDDEN_DB = 15.0
"""A loss from one block to the next that rounding alone does not bring: a fault begins there, though it may take some
blocks more to fall below the floor."""

_CHANGED_DB = 2.0
"""A block's rounding does not vary so much on one engine and CPU."""

_FIRST_DB = 110.0
"""The least that the first block of an FP32 graph has, rounding alone."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LayerDrift:
    """The output of one block against PyTorch's."""

    block: int
    """From 0."""
    comparison: Comparison
    """Each token of each sample is one row: the cosines are those of the worst row, centred on the mean over all
    rows."""
    peak: float
    """The engine's largest magnitude; float16 ends at 65,504. NaN or infinite where a value is."""
    drop_db: float | None
    """By how much the SQNR is below that of the block before; None for the first block, and where one of the two is not
    finite."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        figures = {
            name: value for name, value in self.comparison.to_dict().items() if name not in ("name", "top1_agreement")
        }
        return {
            "block": self.block,
            **figures,
            "peak": self.peak if math.isfinite(self.peak) else None,
            "drop_db": self.drop_db,
        }


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LayerReport:
    """The result of `trace_layers`."""

    layers: tuple[LayerDrift, ...]
    floor_db: float
    """The least SQNR after a block."""
    outputs_pass: bool
    """Whether the graph's outputs meet their tolerance, and are as near to PyTorch as at export."""
    exported_db: tuple[float | None, ...] | None = None
    """The SQNR that each block had at export, where that was on this engine and CPU; None for one without noise."""
    num_samples: int
    num_tokens: int

    @property
    def broken(self) -> LayerDrift | None:
        """The first block whose output cannot be compared: NaN, infinity or another shape."""
        return next((layer for layer in self.layers if layer.comparison.reason is not None), None)

    @property
    def lost_at(self) -> LayerDrift | None:
        """Where precision is lost: the first block that has more noise than at export, where that is known. Else, up to
        the first block that is broken or below the floor, the first that loses much at once, else that block.

        Without one below, and if the outputs miss their tolerance all the same, the first that loses much at once, else
        the one that loses most; None if they meet it.
        """
        below = self._below
        if below is None and self.outputs_pass:
            return None
        changed = next((layer for layer in self.layers if self._since_export(layer) > _CHANGED_DB), None)
        if changed is not None:
            return changed
        before = self.layers if below is None else self.layers[: self.layers.index(below) + 1]
        sudden = next((layer for layer in before if self._loss(layer) > _SUDDEN_DB), None)
        losing = [layer for layer in self.layers if layer.drop_db is not None and layer.drop_db > 0]
        return sudden or below or max(losing, key=lambda layer: layer.drop_db or 0.0, default=None)

    @property
    def _below(self) -> LayerDrift | None:
        """The first block that is broken or below the floor; NaN is below."""
        return next((layer for layer in self.layers if not layer.comparison.sqnr_db >= self.floor_db), None)

    def _since_export(self, layer: LayerDrift) -> float:
        """Decibels that a block is worse than at export."""
        before = None if self.exported_db is None else self.exported_db[layer.block]
        if layer.comparison.reason is not None:
            return math.inf if self.exported_db is not None else 0.0
        return 0.0 if before is None else before - layer.comparison.sqnr_db

    def _loss(self, layer: LayerDrift) -> float:
        """Decibels that a block loses; 0 where nothing tells what it got."""
        if layer.block > 0:
            return layer.drop_db or 0.0
        return _FIRST_DB - layer.comparison.sqnr_db if self.floor_db == FLOOR_DB else 0.0

    @property
    def conclusion(self) -> str:
        """One line that names the block."""
        lost, above = self.lost_at, f"no block is below {self.floor_db:g} dB"
        if lost is not None and lost.comparison.reason is not None:
            return f"precision is lost in block {lost.block}: {lost.comparison.reason}"
        if lost is not None and lost is not self._below and self._since_export(lost) > _CHANGED_DB:
            before = lost.comparison.sqnr_db + self._since_export(lost)
            return f"precision is lost in block {lost.block}: {lost.comparison.sqnr_db:.1f} dB, at export {before:.1f}"
        if lost is not None and lost is not self._below and self._loss(lost) > _SUDDEN_DB:
            expected = lost.comparison.sqnr_db + self._loss(lost)
            return (
                f"precision is lost in block {lost.block}: {lost.comparison.sqnr_db:.1f} dB,"
                f" where {expected:.1f} were to be expected"
            )
        if lost is not None and lost.comparison.sqnr_db < self.floor_db:
            return (
                f"precision is lost in block {lost.block}, the first below {self.floor_db:g} dB:"
                f" {lost.comparison.sqnr_db:.1f} dB"
            )
        if self.outputs_pass:
            return above
        loss = (
            "after the last block"
            if lost is None
            else f"after the blocks, or in block {lost.block}, which loses most: {lost.drop_db:.1f} dB"
        )
        return f"{above}, but the outputs miss their tolerance: precision is lost {loss}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "floor_db": self.floor_db,
            "num_samples": self.num_samples,
            "num_tokens": self.num_tokens,
            "lost_at": None if self.lost_at is None else self.lost_at.block,
            "conclusion": self.conclusion,
            "blocks": [layer.to_dict() for layer in self.layers],
        }


def trace_layers(
    bundle: Bundle, engine: str = "auto", options: EngineOptions = EngineOptions(), *, outputs_pass: bool
) -> LayerReport:
    """Run the golden samples that have PyTorch's block outputs, and compare the tokens after every block.

    The engine is loaded once more (TensorRT: built once more), with every block as a further output: what it fuses
    across blocks elsewhere, it does not fuse here.

    Args:
        outputs_pass: whether `verify_bundle` found the outputs right; decides which block is named where all are above
            the floor.

    Raises:
        ConfigError: the bundle holds no block outputs, or this engine cannot show inner tensors.
        CheckFailed: a file is not what was exported.
        MissingDependency: the engine's package or its device is absent.
        MaeDeployError: the engine refuses the graph or the samples.
    """
    if not bundle.blocks:
        raise ConfigError(f"the bundle {bundle.path} holds no outputs of its blocks", hint="export the bundle again")
    golden = bundle.golden()
    expected_SLTD = golden[BLOCKS]
    S, _, T, _ = expected_SLTD.shape
    with load_engine(bundle, engine, options, taps=bundle.blocks) as loaded:
        inputs = {name: golden[name][:S] for name in bundle.sample_names}
        found = run_in_chunks(runner(loaded, bundle.manifest), inputs, batch=bundle.fixed_batch, outputs=bundle.blocks)
        exported_db = own_noise(bundle, loaded).get(BLOCKS_DB)
    layers: list[LayerDrift] = []
    for block, name in enumerate(bundle.blocks):
        comparison = compare(_rows(expected_SLTD[:, block]), _rows(found[name][:, :T]), name)
        peak = float(np.abs(_real(found[name], inputs, num_prefix(bundle.model)).astype(np.float64)).max())
        if comparison.reason is None and not math.isfinite(peak):
            comparison = Comparison(name=name, reason=f"NaN or infinite values behind the first {T} tokens")
        drop = (layers[-1].comparison.sqnr_db if layers else math.nan) - comparison.sqnr_db
        layers.append(
            LayerDrift(block=block, comparison=comparison, peak=peak, drop_db=drop if math.isfinite(drop) else None)
        )
    floor = bundle.tolerance.sqnr_db
    return LayerReport(
        layers=tuple(layers),
        floor_db=FLOOR_DB if floor is None else floor,
        outputs_pass=outputs_pass,
        num_samples=S,
        num_tokens=T,
        exported_db=None if exported_db is None or len(exported_db) != len(layers) else tuple(exported_db),
    )


def blocks_of(bundle: Bundle, engine: str, options: EngineOptions) -> list[float]:
    """The SQNR after each block.

    Raises:
        MaeDeployError: as `trace_layers`.
    """
    report = trace_layers(bundle, engine, options, outputs_pass=True)
    return [layer.comparison.sqnr_db for layer in report.layers]


def first_broken_block(bundle: Bundle, engine: str, options: EngineOptions) -> list[str]:
    """A line that names the first block whose output is not finite; none where all are, or where that cannot be
    told.
    """
    try:
        report = trace_layers(bundle, engine, options, outputs_pass=False)
    except MaeDeployError:  # a bundle or an engine without inner tensors
        return []
    broken = report.broken
    if broken is None:
        return []
    before = f", after a largest value of {report.layers[broken.block - 1].peak:.3g}" if broken.block else ""
    return [f"block {broken.block} is the first with NaN or infinite values{before}"]


def _real(tokens: Array, inputs: Mapping[str, Array], prefix: int) -> Array:
    """CLS, registers and the patches that are no padding, of all samples: `(S, T, D) -> (rows, D)`."""
    if NUM_KEEP not in inputs:
        return _rows(tokens)
    return np.concatenate([row[: prefix + int(length)] for row, length in zip(tokens, inputs[NUM_KEEP], strict=True)])


def _rows(tokens: Array) -> Array:
    """`(S, T, D) -> (S * T, D)`."""
    return tokens.reshape(-1, tokens.shape[-1])
