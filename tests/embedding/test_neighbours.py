"""Exact search is what all products say, and an index is measured against it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mae_deploy.embedding.cleaning import duplicates, outliers
from mae_deploy.embedding.neighbours import INDEX_FOLDER, Approximate, Exact, recall
from mae_deploy.images.read import Array

N, D = 331, 7


@pytest.fixture
def rows() -> Array:
    """Rows of length 1; of every 11th, the one after it is nearly the same, and the last is alone."""
    rows = np.random.default_rng(3).normal(size=(N, D))
    rows[:, 0] = np.abs(rows[:, 0])
    rows[1::11] = rows[0:-1:11][: len(rows[1::11])] + 0.01
    rows[-1] = 0
    rows[-1, 0] = -1
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows.astype(np.float32)


def test_the_nearest_of_all_products(rows: Array) -> None:
    queries = rows[5:18]
    places, cosines = Exact(rows).nearest(queries, 5)
    products = queries @ rows.T
    assert (places == np.argsort(-products, axis=1, kind="stable")[:, :5]).all()
    np.testing.assert_allclose(cosines, -np.sort(-products, axis=1)[:, :5], rtol=1e-6)  # the same products
    few, _ = Exact(rows[:3]).nearest(queries, 5)
    assert few.shape == (13, 3)


def test_more_rows_than_a_block_holds(rows: Array, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Exact(rows).nearest(rows, 5)[0]
    monkeypatch.setattr("mae_deploy.embedding.neighbours._ROWS", 17)
    monkeypatch.setattr("mae_deploy.embedding.neighbours._QUERIES", 13)
    done: list[int] = []
    assert (Exact(rows).nearest(rows, 5, done.append)[0] == whole).all()
    assert sum(done) == N


def test_others_are_never_itself_among_copies_either() -> None:
    rows = np.tile(np.array([1, 0, 0], np.float32), (9, 1))
    places, cosines = Exact(rows).others(2)
    assert places.shape == (9, 2)
    assert (cosines == 1).all()
    assert not (places == np.arange(9)[:, None]).any()


def test_an_index_finds_nearly_all_and_is_kept(rows: Array, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("usearch", reason="usearch is in the extra [search]")
    near = Approximate(rows, tmp_path, "pooled")
    assert recall(near, 5, queries=50, seed=0) > 0.95  # 331 rows are few; usearch's own default effort
    places, cosines = near.nearest(rows[:3], 2)
    assert places[:, 0].tolist() == [0, 1, 2]
    np.testing.assert_allclose(cosines[:, 0], 1, atol=1e-5)  # of rows of length 1, in float32
    (kept,) = (tmp_path / INDEX_FOLDER).iterdir()
    assert kept.name.startswith(f"pooled-{N}-")
    Approximate(rows[::-1], tmp_path, "pooled")  # other features: not those of before
    (other,) = (tmp_path / INDEX_FOLDER).iterdir()
    assert other.name != kept.name
    Approximate(rows, tmp_path, "pooled")
    done: list[int] = []
    again = Approximate(rows, tmp_path, "pooled", done.append)
    assert done == []
    assert (again.nearest(rows, 3)[0] == near.nearest(rows, 3)[0]).all()


def test_recall_of_an_index_that_finds_nothing(rows: Array) -> None:
    class Blind(Exact):
        def nearest(self, queries: Array, k: int, tick: object = None) -> tuple[Array, Array]:
            return np.full((len(queries), k), -1), np.zeros((len(queries), k), np.float32)

    assert recall(Blind(rows), 5, queries=20, seed=0) == 0
    assert recall(Exact(rows), 5, queries=20, seed=0) == 1


@pytest.mark.parametrize("kind", ["exact", "approximate"])
def test_the_later_of_two_that_are_alike_goes(rows: Array, tmp_path: Path, kind: str) -> None:
    if kind == "approximate":
        pytest.importorskip("usearch", reason="usearch is in the extra [search]")
    near = Exact(rows) if kind == "exact" else Approximate(rows, tmp_path, "pooled")
    found = duplicates(near, 0.999)
    products = rows @ rows.T
    stays: list[int] = []
    expected = []
    for place in range(N):
        like = [(float(products[place, other]), other) for other in stays if products[place, other] >= 0.999]
        if like:
            expected.append((place, max(like)[1]))
        else:
            stays.append(place)
    assert len(expected) >= N // 11
    assert [(one.place, one.like) for one in found] == expected
    assert duplicates(near, 1.1) == []


def test_who_is_alone_is_the_first_outlier(rows: Array) -> None:
    found = outliers(Exact(rows), 5, 3)
    assert found[0][0] == N - 1
    assert [distance for _, distance in found] == sorted((distance for _, distance in found), reverse=True)
    nearest = np.sort((rows @ rows.T)[-1])[-6:-1]
    assert found[0][1] == pytest.approx(1 - float(nearest.mean()), abs=1e-5)  # float32
