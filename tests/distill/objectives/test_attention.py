"""Attention maps by hand, and heads that differ."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from mae_deploy.distill.objectives.attention import AttentionMaps
from mae_deploy.models.taps import Tap
from tests.distill.objectives.tiny_taps import PAIRS, taps_of, view
from tests.models.tiny_models import random_tensor

TAP = Tap("qkv", 1)


def test_attention_maps_by_hand() -> None:
    """Two tokens, one head of 4: scores of ln 3 and 0 after the division by 2 give 3/4 and 1/4, against an even 1/2."""
    qkv = torch.zeros(1, 3, 1, 2, 4)
    qkv[0, 0, 0, :, 0] = 2 * math.log(3)
    qkv[0, 1, 0, 0, 0] = 1
    objective = AttentionMaps(((1, 1),), 1, 1)
    assert float(objective({TAP: qkv}, {TAP: torch.zeros_like(qkv)}, view())) == pytest.approx(0.25**2, rel=1e-6)
    assert list(objective.parameters()) == []


def test_the_same_attention_costs_nothing_and_values_do_not_count() -> None:
    qkv, other = random_tensor(2, 3, 5, 4, 3), random_tensor(2, 3, 5, 4, 3, seed=2)
    objective = AttentionMaps(((1, 1),), 5, 5)
    same = torch.cat([qkv[:, :2], other[:, 2:]], dim=1)
    assert objective({TAP: same}, {TAP: qkv}, view()).item() == 0
    assert objective({TAP: other}, {TAP: qkv}, view()).item() > 0.01


def test_other_heads_are_mixed_by_a_convolution_for_each_pair() -> None:
    objective = AttentionMaps(PAIRS, 3, 5)
    student, teacher = taps_of(objective)
    losses = []
    for adapter, own, its in zip(objective.adapters, objective.student_taps, objective.teacher_taps, strict=True):
        assert isinstance(adapter, torch.nn.Conv2d)
        maps = [
            torch.softmax(torch.einsum("bhtd,bhsd->bhts", qkv[:, 0], qkv[:, 1]) / 2, dim=-1)
            for qkv in (student[own], teacher[its])
        ]
        mixed = torch.einsum("oh,bhts->bots", adapter.weight[:, :, 0, 0], maps[0])
        losses.append(F.mse_loss(mixed, maps[1]))
    torch.testing.assert_close(
        objective(student, teacher, view()), torch.stack(losses).mean(), rtol=1e-5, atol=0
    )  # float32 sums
