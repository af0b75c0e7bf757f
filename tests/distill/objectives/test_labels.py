"""Cross-entropy of the labelled images."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mae_deploy.distill.objectives.labels import Labels
from mae_deploy.models.taps import Tap
from tests.distill.objectives.tiny_taps import view
from tests.models.tiny_models import random_tensor


def label_loss(logits: Tensor, labels: list[int]) -> Tensor:
    loss = Labels()({Tap("logits"): logits}, {}, view(labels=labels))
    assert isinstance(loss, Tensor)
    return loss


def test_by_hand() -> None:
    """Softmax 1/4 and 3/4."""
    logits = torch.tensor([[0.0, math.log(3)]]).repeat(3, 1)
    assert label_loss(logits, [0, 1, 1]).item() == pytest.approx((math.log(4) + 2 * math.log(4 / 3)) / 3, rel=1e-6)
    # Unlabelled images count neither above nor below the line.
    assert label_loss(logits, [0, -1, -1]).item() == pytest.approx(math.log(4), rel=1e-6)


def test_without_labels_it_is_zero_with_a_gradient_that_is_a_number() -> None:
    logits = random_tensor(3, 2).requires_grad_()
    loss = label_loss(logits, [-1, -1, -1])
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert (logits.grad == 0).all()
