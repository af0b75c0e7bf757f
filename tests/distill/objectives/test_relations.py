"""Relations against NumPy, with as many heads and with others."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from mae_deploy.distill.objectives.relations import Relation, Relations, relation, relation_heads
from mae_deploy.models.taps import Tap
from tests.distill.objectives.tiny_taps import PAIRS, STUDENT, TEACHER, tap_tensor, taps_of, view
from tests.models.tiny_models import random_tensor

TAP = Tap("qkv", 1)


def in_numpy(student: Tensor, teacher: Tensor, num_heads: int, kinds: tuple[Relation, ...]) -> float:
    """Row by row: the channels of all heads side by side, cut into relation heads."""
    total = 0.0
    for first, second in (("qkv".index(kind[0]), "qkv".index(kind[1])) for kind in kinds):
        divergences = []
        for b in range(len(student)):
            own, its = (
                np.concatenate([*qkv[b].double().numpy().transpose(1, 0, 2, 3)], axis=-1) for qkv in (student, teacher)
            )
            for head in range(num_heads):
                rows = []
                for vectors in (own, its):
                    width = vectors.shape[-1] // num_heads
                    part = vectors[..., head * width : (head + 1) * width]
                    scores = np.exp(part[first] @ part[second].T / math.sqrt(width))
                    rows.append(scores / scores.sum(axis=-1, keepdims=True))
                divergences += [float((t * np.log(t / s)).sum()) for s, t in zip(*rows, strict=True)]
        total += float(np.mean(divergences))
    return total


def test_relations_of_heads_that_both_have() -> None:
    """The student is narrower, with the teacher's number of heads: head by head, nothing is cut anew."""
    own, its = random_tensor(2, 3, 5, 4, 2), random_tensor(2, 3, 5, 4, 3, seed=2)
    objective = Relations(((1, 1),), 10, 15, 5)
    assert objective.num_heads == 5
    assert float(objective({TAP: own}, {TAP: its}, view())) == pytest.approx(
        in_numpy(own, its, 5, ("qk", "vv")), rel=1e-5
    )  # float32
    assert torch.equal(relation(own, "qk", 5), own[:, 0] @ own[:, 1].transpose(-2, -1) / math.sqrt(2))


def test_relations_of_a_student_with_other_heads() -> None:
    """Three heads against five: four relation heads fit both widths, of 3 and of 5 channels."""
    kinds: tuple[Relation, ...] = ("qk", "vv", "qq", "kk")
    own, its = tap_tensor(TAP, STUDENT, 1), tap_tensor(TAP, TEACHER, 2)
    objective = Relations(((1, 1),), 12, 20, 5, kinds=kinds)
    assert objective.num_heads == 4
    assert float(objective({TAP: own}, {TAP: its}, view())) == pytest.approx(
        in_numpy(own, its, 4, kinds), rel=1e-5
    )  # float32


@pytest.mark.parametrize(
    ("widths_and_heads", "expected"),
    [((192, 1280, 16), 16), ((768, 1024, 16), 16), ((128, 192, 3), 2), ((12, 20, 5), 4), ((7, 5, 3), 1)],
)
def test_relation_heads_fit_both_widths(widths_and_heads: tuple[int, int, int], expected: int) -> None:
    assert relation_heads(*widths_and_heads) == expected


def test_pairs_are_averaged() -> None:
    both = Relations(PAIRS, 12, 20, 5)
    student, teacher = taps_of(both)
    each = [Relations((pair,), 12, 20, 5)(student, teacher, view()) for pair in PAIRS]
    assert torch.equal(both(student, teacher, view()), torch.stack(each).mean())
    assert each[0] != each[1]


def test_the_same_relations_cost_nothing_whatever_the_basis_and_the_order() -> None:
    """Queries and keys turned alike have the same products; tokens in another order have the same relations in another
    order.
    """
    qkv = random_tensor(2, 3, 5, 4, 3)
    turned, _ = torch.linalg.qr(random_tensor(3, 3))
    objective = Relations(((1, 1),), 15, 15, 5)
    assert objective({TAP: qkv}, {TAP: qkv}, view()).item() == 0
    assert abs(objective({TAP: qkv @ turned}, {TAP: qkv}, view()).item()) < 1e-6  # float32
    order = torch.tensor([0, 3, 1, 2])
    other = random_tensor(2, 3, 5, 4, 3, seed=2)
    found = objective({TAP: other[:, :, :, order]}, {TAP: qkv[:, :, :, order]}, view())
    torch.testing.assert_close(found, objective({TAP: other}, {TAP: qkv}, view()), rtol=1e-5, atol=0)
    assert found.item() > 0.1


def test_it_follows_the_teacher_and_not_the_reverse() -> None:
    """A student that looks at one token only misses what an even teacher looks at; the other way round is cheaper."""
    even = torch.zeros(1, 3, 1, 2, 1)
    sure = torch.tensor([[10.0, 0.0]]).reshape(1, 1, 1, 2, 1).repeat(1, 3, 1, 1, 1)
    objective = Relations(((1, 1),), 1, 1, 1, kinds=("qq",))
    # Of two rows the first is softmax(100, 0), the second even: half of 50 - ln 2, and half of ln 2.
    assert float(objective({TAP: sure}, {TAP: even}, view())) == pytest.approx((50 - math.log(2)) / 2, rel=1e-5)
    assert float(objective({TAP: even}, {TAP: sure}, view())) == pytest.approx(math.log(2) / 2, rel=1e-5)
