"""Accuracies counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from mae_deploy.errors import CheckFailed
from mae_deploy.evaluation.accuracy import Accuracy

NAMES = tuple("abcdefg")


def scores(*first: int) -> np.ndarray:
    """Seven classes, those named first in that order and the others behind them in theirs."""
    order = [*first, *(index for index in range(7) if index not in first)]
    row = np.zeros(7, np.float32)
    row[order] = np.arange(7, 0, -1)
    return row


def test_by_hand() -> None:
    counted = Accuracy(7)
    counted.add(np.stack([scores(3), scores(0, 3)]), np.array([3, 3]))
    counted.add(
        np.stack([scores(0, 1, 2, 4, 5), scores(6, 5, 4, 3, 2, 1)]), np.array([3, 2])
    )  # ranks 5 and 4, counted from 0
    assert (counted.count, counted.top1, counted.top5) == (4, 25.0, 75.0)
    assert counted.wrong == [1, 2, 3]
    assert counted.confusion[3].tolist() == [2, 0, 0, 1, 0, 0, 0]
    assert counted.confusion[2].tolist() == [0, 0, 0, 0, 0, 0, 1]
    found = counted.per_class(NAMES)
    assert found["d"] == {"images": 3, "top1": pytest.approx(100 / 3)}
    assert found["c"] == {"images": 1, "top1": 0.0}
    assert found["a"] == {"images": 0, "top1": None}


def test_equal_scores_rank_in_the_order_of_the_classes() -> None:
    counted = Accuracy(7)
    counted.add(np.ones((2, 7), np.float32), np.array([4, 5]))  # places 4 and 5: among the first five, and not
    assert (counted.top1, counted.top5) == (0.0, 50.0)


def test_a_class_without_a_vote_is_not_among_the_first_five() -> None:
    votes = np.array([[0.0, 0, 0, 0, 0, 0, 1.0]])
    for unranked, top5 in ((None, 100.0), (0.0, 0.0)):
        counted = Accuracy(7, unranked=unranked)
        counted.add(votes, np.array([1]))
        assert counted.top5 == top5


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_is_not_counted_as_right(value: float) -> None:
    with pytest.raises(CheckFailed, match="NaN or infinite"):
        Accuracy(7).add(np.array([[value, 0, 0, 0, 0, 0, 0]]), np.array([0]))
