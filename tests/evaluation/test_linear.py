"""Linear classifiers against their definitions and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from torch import Tensor

from mae_deploy.evaluation.config import Solver
from mae_deploy.evaluation.linear import LinearFit, fit_linear, hold_out, logistic, ridge, unstandardise
from tests.models.tiny_models import random_tensor

CLASSES, D = 5, 7


def blobs(count: int, seed: int, noise: float = 1.0) -> tuple[Tensor, Tensor]:
    """A vector for each class and noise; channels of unequal scale and offset, one of them constant."""
    labels = torch.arange(count) % CLASSES
    features = random_tensor(CLASSES, D, seed=3)[labels] + noise * random_tensor(count, D, seed=seed)
    features = features * torch.tensor([1.0, 30.0, 0.1, 1.0, 5.0, 1.0, 0.0]) + torch.tensor(
        [0.0, 100.0, 0.0, -3.0, 0.0, 0.0, 2.0]
    )
    return features, labels


FEATURES, LABELS = blobs(61, 1)


def test_ridge_is_least_squares_in_float64() -> None:
    x, y = FEATURES.double().numpy(), np.eye(CLASSES)[LABELS.numpy()]
    strengths = (10.0, 0.1, 1e-3)
    for strength, (weight, bias) in zip(strengths, ridge(FEATURES, LABELS, CLASSES, strengths), strict=True):
        # scikit-learn sums over images where we take the mean.
        expected = Ridge(alpha=strength * len(x), solver="cholesky").fit(x, y)
        assert weight.numpy() == pytest.approx(expected.coef_, rel=1e-9, abs=1e-12)
        assert bias.numpy() == pytest.approx(expected.intercept_, rel=1e-9)


def test_ridge_with_more_channels_than_images() -> None:
    x = random_tensor(3, D)
    labels = torch.tensor([0, 1, 2])
    ((weight, bias),) = ridge(x, labels, 3, (1e-9,))
    # Three images are fitted exactly.
    assert (x.double() @ weight.T + bias).numpy() == pytest.approx(np.eye(3), abs=1e-6)


def test_logistic_is_scikit_learns() -> None:
    x = (FEATURES - FEATURES.mean(0)) / FEATURES.std(0, correction=0).clamp_min(1e-12)
    strengths = (1.0, 0.1, 1e-2)
    for strength, (weight, bias) in zip(strengths, logistic(x, LABELS, CLASSES, strengths), strict=True):
        expected = LogisticRegression(C=1 / (strength * len(x)), tol=1e-8, max_iter=1000).fit(x.numpy(), LABELS.numpy())
        found = torch.softmax(x @ weight.float().T + bias.float(), dim=1).numpy()
        assert found == pytest.approx(expected.predict_proba(x.numpy()), abs=1e-3)  # where L-BFGS stops in float32


def test_unstandardised_weights_are_for_features_as_they_are() -> None:
    weight, bias = random_tensor(CLASSES, D, seed=5), random_tensor(CLASSES, seed=6)
    mean, deviation = FEATURES.double().mean(0), random_tensor(D, seed=7).abs() + 0.1
    raw, offset = unstandardise(weight, bias, mean, deviation)
    expected = (FEATURES.double() - mean) / deviation @ weight.double().T + bias
    assert (FEATURES.double() @ raw.T + offset).numpy() == pytest.approx(expected.numpy(), rel=1e-12)


@pytest.mark.parametrize("solver", ["ridge", "logistic"])
def test_the_scale_of_a_channel_changes_nothing(solver: Solver) -> None:
    scaled = FEATURES * torch.tensor([1e3, 1.0, 1.0, 1e-3, 1.0, 1.0, 1.0]) + 5
    both = [
        fit_linear(solver, x, LABELS, CLASSES, held_out=0.2, seed=0, strengths=(1e-2,)).scores(x)
        for x in (FEATURES, scaled)
    ]
    assert both[0].numpy() == pytest.approx(both[1].numpy(), abs=2e-3)  # features and L-BFGS are float32


@pytest.mark.parametrize("solver", ["ridge", "logistic"])
def test_the_strength_is_chosen_on_held_out_images(solver: Solver) -> None:
    """Many channels of mere noise: what fits the images closely is worse on others."""
    labels = torch.arange(100) % CLASSES
    signal = 2 * random_tensor(CLASSES, 3, seed=3)[labels]
    features, unseen = (
        torch.cat([signal + random_tensor(100, 3, seed=seed), random_tensor(100, 60, seed=seed + 10)], dim=1)
        for seed in (1, 2)
    )
    fit: LinearFit = fit_linear(solver, features, labels, CLASSES, held_out=0.3, seed=0)
    best = max(fit.held_out_top1.values())
    assert fit.strength == max(strength for strength, top1 in fit.held_out_top1.items() if top1 == best)
    weakest = min(fit.held_out_top1)
    assert fit.held_out_top1[weakest] < best
    loose = fit_linear(solver, features, labels, CLASSES, held_out=0.3, seed=0, strengths=(weakest,))
    assert fit.accuracy(unseen, labels).top1 > loose.accuracy(unseen, labels).top1


def test_one_image_a_class_leaves_nothing_to_choose_on() -> None:
    fit = fit_linear("ridge", FEATURES[:CLASSES], LABELS[:CLASSES], CLASSES, held_out=0.2, seed=0)
    assert fit.held_out_top1 == {}
    assert fit.accuracy(FEATURES[:CLASSES], LABELS[:CLASSES]).top1 == 100.0


def test_held_out_images_are_a_share_of_each_class() -> None:
    labels = torch.tensor([0] * 10 + [1] * 5 + [2] * 2 + [3])
    kept, out = hold_out(labels, 0.2, seed=0)
    assert sorted([*kept.tolist(), *out.tolist()]) == list(range(18))
    assert labels[out].bincount(minlength=4).tolist() == [2, 1, 1, 0]
    assert hold_out(labels, 0.2, seed=0)[1].tolist() == out.tolist() != hold_out(labels, 0.2, seed=1)[1].tolist()
    # Never a whole class.
    assert labels[hold_out(labels, 0.99, seed=0)[0]].unique().tolist() == [0, 1, 2, 3]
