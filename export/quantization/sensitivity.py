"""Which Linears suffer from INT8, and the fastest mix of INT8 and higher precision that meets a budget."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mae_deploy.export.quantization.fake_quant import fake_quantized
from mae_deploy.export.reference import restoring
from mae_deploy.images.read import Array
from mae_deploy.models.mae import MaskedAutoencoder
from mae_deploy.models.quantization.rounding import INT8, AttentionScales, Rounding
from mae_deploy.models.vit import Classifier, Encoder, run_blocks
from mae_deploy.progress import progress
from mae_deploy.runtime.manifest import IDS_KEEP, IMAGES, NUM_KEEP

_BATCH = 8

_CAUTION = 0.95
"""Share of the noise that a result allows, to which the next set is filled: the noise of single Linears adds up
nearly, not exactly."""

_WORTH = 0.01
"""Share of the cost below which one more Linear in INT8 is not worth another check."""


@torch.no_grad()
def sensitivities(
    model: Encoder,
    scales: Mapping[str, float | None],
    inputs: Mapping[str, Array],
    *,
    attention: Mapping[str, AttentionScales] | None = None,
    corrections: Mapping[str, Tensor] | None = None,
    rounding: Rounding = INT8,
) -> dict[str, float]:
    """For each Linear noise over signal, in energy, of the worst output when it alone is in eight bits.

    The outputs are CLS and patch tokens, `pooled` and `logits` of a classifier, and pixels if there are Linears of a
    decoder. A run begins with the block of its Linear, at what the FP32 blocks before it gave.

    Args:
        scales: for each Linear the scale of its input, or None for a range found at each call.
        inputs: `images`, float32 `(S, C, H, W)`, normalised; `ids_keep`, int64 `(S, K)`, unless all patches are seen;
            `num_keep`, int64 `(S,)`, where its rows are padded.
        attention: scales of attention products in INT8; what they add is counted with the qkv before them.
        corrections: of the biases, where they will be corrected (`models.quantization.smoothing.bias_corrections`).
    """
    model.eval()
    signal: dict[str, float] = defaultdict(float)
    noise: dict[tuple[str, str], float] = defaultdict(float)
    decode = any(name.startswith("decoder_") for name in scales)
    batches = _batches(inputs)
    with progress("sensitivity", len(scales) * len(batches)) as bar:
        for images, ids_keep in batches:
            run = _Run(model, images, ids_keep, decode)
            expected = run.outputs(len(model.blocks))
            for output, value in expected.items():
                signal[output] += _energy(value)
            for name, scale in scales.items():
                products = {key: value for key, value in (attention or {}).items() if name == f"{key}.qkv"}
                with fake_quantized(model, {name: scale}, products, corrections=corrections, rounding=rounding):
                    found = run.outputs(len(model.blocks) if name.startswith("decoder_") else int(name.split(".")[1]))
                for output, value in expected.items():
                    noise[name, output] += _energy(found[output] - value)
                bar.advance(1, name)
    return {name: max(noise[name, output] / signal[output] for output in signal) for name in scales}


def _batches(inputs: Mapping[str, Array]) -> list[tuple[Array, Array | None]]:
    """Images and patches, 8 at a time; where rows are padded one by one, without the padding."""
    images, ids_keep, num_keep = inputs[IMAGES], inputs.get(IDS_KEEP), inputs.get(NUM_KEEP)
    if ids_keep is not None and num_keep is not None:
        return [(images[row : row + 1], ids_keep[row : row + 1, :length]) for row, length in enumerate(num_keep)]
    starts = range(0, len(images), _BATCH)
    return [
        (images[first : first + _BATCH], None if ids_keep is None else ids_keep[first : first + _BATCH])
        for first in starts
    ]


def _energy(values: Tensor) -> float:
    return float(values.double().square().sum())


class _Run:
    """One batch, from any block to the outputs."""

    def __init__(self, model: Encoder, images: Array, ids_keep: Array | None, decode: bool) -> None:
        device = model.device
        self.model, self.decode = model, decode
        self.ids_keep = None if ids_keep is None else torch.from_numpy(ids_keep).to(device)
        self.inputs = [model.embed(torch.from_numpy(images).to(device), self.ids_keep)]
        """Of each block, and of what follows the last one."""
        self.turns = model.turns(self.ids_keep) or []
        for index in range(len(model.blocks)):
            step = slice(index, index + 1)
            self.inputs.append(run_blocks(model.blocks[step], self.inputs[-1], self.turns[step]))

    def outputs(self, block: int) -> dict[str, Tensor]:
        """All outputs, computed from this block on."""
        model = self.model
        tokens = model.norm(run_blocks(model.blocks[block:], self.inputs[block], self.turns[block:]))
        if self.decode:
            assert isinstance(model, MaskedAutoencoder)
            assert self.ids_keep is not None
            return {"pixels": model.forward_decoder(tokens, restoring(self.ids_keep, model.config.num_patches))}
        if isinstance(model, Classifier) and model.pool == "avg":
            pooled = model.pool_latent(tokens)
            return {"pooled": pooled, "logits": model.head(pooled)}
        head = {"logits": model.head(model.pool_latent(tokens))} if isinstance(model, Classifier) else {}
        cls = {"cls": tokens[:, 0]} if model.config.class_token else {}
        return {**cls, "tokens": tokens[:, model.config.num_prefix :], **head}


@dataclass(frozen=True, slots=True)
class BudgetCheck:
    """What the real graph on the real engine shows for one set of Linears in INT8."""

    passes: bool
    """Whether the budget is met."""
    deficit_db: float | None = None
    """By how many dB the noise must shrink to meet the budget just so; negative by how many it could grow; None where
    that cannot be told."""


def choose(
    noise: Mapping[str, float],
    cost: Mapping[str, float],
    check: Callable[[frozenset[str]], BudgetCheck],
    *,
    trials: int = 8,
) -> frozenset[str] | None:
    """The set of Linears of the largest cost that meets the budget in INT8, or None if none does.

    The noise of a set is predicted as the sum of what its members add alone. Each check tells how much predicted
    noise is allowed; the next set is filled up to that, the Linears of the least noise for their cost first. So the
    first set, all of them, is tightened until one meets the budget, and Linears are admitted again as long as there is
    room between the last set that meets it and the first that does not.

    Args:
        noise: for each Linear noise over signal when it alone is in INT8 (`sensitivities`).
        cost: for each Linear what it saves, such as its multiply-accumulates.
        check: whether a set meets the budget; expensive, and asked for at most `trials` different sets.
    """
    order = sorted(noise, key=lambda name: (noise[name] / cost[name], name))
    worth = _WORTH * _total(cost, order)
    best, fits, fails = frozenset[str](), 0.0, math.inf
    candidate, checked = frozenset(order), set[frozenset[str]]()
    while candidate not in checked and len(checked) < trials:
        checked.add(candidate)
        predicted, result = _total(noise, candidate), check(candidate)
        if result.passes:
            best, fits = candidate, predicted
        else:
            fails = min(fails, predicted)
        candidate = _filled(order, noise, _allowed(result, predicted, fits, fails))
        if _total(cost, candidate) < _total(cost, best) + worth:
            break
    return best or None


def _allowed(result: BudgetCheck, predicted: float, fits: float, fails: float) -> float:
    """Predicted noise to which the next set is filled: as the last check says, or half-way between the last set that
    fits and the first that fails.
    """
    allowed = math.inf if result.deficit_db is None else predicted * 10 ** (-result.deficit_db / 10) * _CAUTION
    return allowed if allowed < fails else (fits + fails) / 2


def _filled(order: Sequence[str], noise: Mapping[str, float], limit: float) -> frozenset[str]:
    """As many as fit, in this order."""
    chosen: list[str] = []
    total = 0.0
    for name in order:
        if total + noise[name] <= limit:
            chosen.append(name)
            total += noise[name]
    return frozenset(chosen)


def _total(values: Mapping[str, float], names: Iterable[str]) -> float:
    return math.fsum(values[name] for name in names)
