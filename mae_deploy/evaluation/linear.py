"""Linear classifiers on features that are computed once: ridge regression in closed form, and multinomial logistic
regression by L-BFGS.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mae_deploy.evaluation.accuracy import Accuracy
from mae_deploy.evaluation.config import Solver
from mae_deploy.progress import progress
from mae_deploy.seeding import derive_seed

STRENGTHS: dict[Solver, tuple[float, ...]] = {
    "ridge": (1e1, 1e0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5),
    "logistic": (1e0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5),
}
"""Factors of the squared weights beside the mean loss of an image, on standardised features, from strong to weak;
scikit-learn's C is 1 / (factor * images)."""

_ITERATIONS = 300
"""L-BFGS steps at most for each strength; the weaker ones start from the stronger one's weights."""


@dataclass(frozen=True, slots=True)
class LinearFit:
    """A linear classifier of features as they are, and how it was chosen."""

    weight: Tensor
    """float64 `(classes, D)`."""
    bias: Tensor
    """float64 `(classes,)`."""
    strength: float
    """The factor of the squared weights."""
    held_out_top1: dict[float, float]
    """Top-1 in per cent on the held-out training images for each strength; empty where nothing could be held out."""

    def scores(self, features: Tensor) -> Tensor:
        """`(S, D) -> (S, classes)`, float64."""
        return features.double() @ self.weight.T + self.bias

    def accuracy(self, features: Tensor, labels: Tensor) -> Accuracy:
        """What it gets right."""
        counted = Accuracy(len(self.weight))
        for part, given in zip(features.split(8192), labels.split(8192), strict=True):
            counted.add(self.scores(part).numpy(), given.numpy())
        return counted


def fit_linear(
    solver: Solver,
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    held_out: float,
    seed: int,
    device: torch.device | None = None,
    strengths: tuple[float, ...] | None = None,
) -> LinearFit:
    """Choose the regularisation on a held-out share of each class, then fit all images: `(S, D)` float32, `(S,)` int64.

    Features are standardised first (mean 0 and deviation 1 of each channel over the images fitted), and the weights are
    given back for features as they are.
    """
    solve = {"ridge": ridge, "logistic": logistic}[solver]
    strengths = strengths or STRENGTHS[solver]
    kept, out = hold_out(labels, held_out, seed)
    found: dict[float, float] = {}
    strength = strengths[len(strengths) // 2]  # where no class has two images, nothing can be chosen
    if len(out) and len(strengths) > 1:
        fits = _fit(solve, features[kept], labels[kept], num_classes, strengths, device)
        found = {fit.strength: fit.accuracy(features[out], labels[out]).top1 for fit in fits}
        strength = max(found, key=lambda key: (found[key], key))  # of equals, the strongest
    (best,) = _fit(solve, features, labels, num_classes, (strength,), device)
    return LinearFit(best.weight, best.bias, strength, found)


def hold_out(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices to fit and to hold out, drawn class by class; of a class with two images or more, at least one is on
    either side.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "held-out"))
    kept: list[Tensor] = []
    out: list[Tensor] = []
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        members = members[torch.randperm(len(members), generator=generator)]
        number = min(max(1, round(share * len(members))), len(members) - 1)
        out.append(members[:number])
        kept.append(members[number:])
    return torch.cat(kept), torch.cat(out)


def ridge(
    features: Tensor, labels: Tensor, num_classes: int, strengths: tuple[float, ...]
) -> list[tuple[Tensor, Tensor]]:
    """Least squares on one-hot labels in closed form, the intercept free: for each strength, `(classes, D)` and
    `(classes,)` in float64.

    Minimises the mean over images of `|W x + b - y|²`, plus strength times `|W|²`. One eigendecomposition serves all
    strengths.
    """
    S = len(features)
    x = features.double()
    mean = x.mean(dim=0)
    x = x - mean
    targets = F.one_hot(labels, num_classes).double()
    share = targets.mean(dim=0)
    values, vectors = torch.linalg.eigh(x.T @ x / S)
    rotated = vectors.T @ (x.T @ (targets - share) / S)
    found = []
    for strength in strengths:
        weight = (vectors @ (rotated / (values.clamp_min(0) + strength)[:, None])).T
        found.append((weight, share - weight @ mean))
    return found


def logistic(
    features: Tensor, labels: Tensor, num_classes: int, strengths: tuple[float, ...]
) -> list[tuple[Tensor, Tensor]]:
    """Multinomial logistic regression: for each strength, `(classes, D)` and `(classes,)`.

    Minimises the mean cross-entropy plus half the strength times `|W|²`, the intercept free, by L-BFGS.
    """
    weight = torch.zeros(
        num_classes, features.shape[1], dtype=features.dtype, device=features.device, requires_grad=True
    )
    bias = torch.zeros(num_classes, dtype=features.dtype, device=features.device, requires_grad=True)
    found = []
    with progress("logistic", len(strengths), enabled=len(strengths) > 1) as bar:
        for strength in strengths:
            optimizer = torch.optim.LBFGS(
                [weight, bias],
                max_iter=_ITERATIONS,
                history_size=20,
                line_search_fn="strong_wolfe",
                tolerance_grad=1e-5,
                tolerance_change=1e-8,
            )

            def closure(optimizer: torch.optim.LBFGS = optimizer, strength: float = strength) -> Tensor:
                optimizer.zero_grad()
                loss = (
                    F.cross_entropy(F.linear(features, weight, bias), labels) + 0.5 * strength * weight.square().sum()
                )
                loss.backward()
                return loss

            optimizer.step(closure)
            found.append((weight.detach().double(), bias.detach().double()))
            bar.advance(1)
    return found


Solve = Callable[[Tensor, Tensor, int, tuple[float, ...]], list[tuple[Tensor, Tensor]]]


def _fit(
    solve: Solve,
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    strengths: tuple[float, ...],
    device: torch.device | None,
) -> list[LinearFit]:
    """Standardise, solve for all strengths, and undo the standardisation in the weights."""
    mean, deviation = features.double().mean(dim=0), features.double().std(dim=0, correction=0)
    deviation = torch.where(deviation > 1e-12, deviation, 1.0)  # a channel that is the same for all images
    standardised = ((features - mean.float()) / deviation.float()).to(device)
    fits = []
    for strength, (weight, bias) in zip(
        strengths, solve(standardised, labels.to(device), num_classes, strengths), strict=True
    ):
        raw, offset = unstandardise(weight.cpu(), bias.cpu(), mean, deviation)
        fits.append(LinearFit(raw, offset, strength, {}))
    return fits


def unstandardise(weight: Tensor, bias: Tensor, mean: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor]:
    """`W ((x - mean) / deviation) + b = W' x + b'`: `(classes, D), (classes,), (D,), (D,)` to `W'` and `b'` in
    float64.
    """
    raw = weight.double() / deviation.double()
    return raw, bias.double() - raw @ mean.double()
