"""Distances by hand, and projectors."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from mae_deploy.distill.config import Distance
from mae_deploy.distill.objectives.distance import NormaliseTokens, distance, projector
from mae_deploy.errors import ConfigError
from tests.models.tiny_models import random_tensor


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # Smooth L1 with beta 2: d²/4 below 2, |d| - 1 from there on.
        ("smooth_l1", (0.25 + 0.25 + 2 + 3) / 4),
        ("l1", (1 + 1 + 3 + 4) / 4),
        ("mse", (1 + 1 + 9 + 16) / 4),
    ],
)
def test_distances_by_hand(kind: Distance, expected: float) -> None:
    zero = torch.zeros(1, 2, 2)
    assert float(distance(kind, torch.tensor([[[1.0, -1.0], [3.0, -4.0]]]), zero)) == expected
    assert float(distance(kind, zero, zero)) == 0


def test_cosine_by_hand() -> None:
    """Angles of 0, 90, 180 and 60 degrees, at any length."""
    target = torch.tensor([[2.0, 0.0]]).repeat(4, 1)
    predicted = torch.tensor([[5.0, 0.0], [0.0, 3.0], [-0.5, 0.0], [1.0, math.sqrt(3)]])
    assert float(distance("cosine", predicted, target)) == pytest.approx((0 + 1 + 2 + 0.5) / 4, rel=1e-6)  # float32


@pytest.mark.parametrize("kind", ["smooth_l1", "l1", "mse"])
def test_a_distance_grows_with_the_offset_and_pulls_towards_the_target(kind: Distance) -> None:
    target = random_tensor(2, 3, 5)
    distances = [float(distance(kind, target + offset, target)) for offset in (0.0, 0.5, 1.0, 5.0)]
    assert distances == sorted(distances)
    assert distances[0] == 0
    predicted = (target + 0.5).requires_grad_()
    distance(kind, predicted, target).backward()
    assert predicted.grad is not None
    assert (predicted.grad > 0).all()


def test_projectors_bring_the_student_to_the_teachers_width() -> None:
    vectors = random_tensor(2, 3, 5)
    assert projector("linear", 5, 7)(vectors).shape == (2, 3, 7)
    mlp = projector("mlp", 5, 7)
    assert mlp(vectors).shape == (2, 3, 7)
    assert not torch.allclose(
        mlp(vectors) + mlp(-vectors), 2 * mlp(torch.zeros(5)), atol=1e-3
    )  # a linear map would agree


def test_without_a_projector_vectors_are_normalised_and_widths_equal() -> None:
    vectors = random_tensor(2, 3, 5)
    found = projector("none", 5, 5)(vectors.bfloat16())
    assert found.dtype == torch.float32
    assert torch.equal(found, F.layer_norm(vectors.bfloat16().float(), (5,)))
    assert list(NormaliseTokens().parameters()) == []
    with pytest.raises(ConfigError, match="5 would have to be the teacher's 7"):
        projector("none", 5, 7)
