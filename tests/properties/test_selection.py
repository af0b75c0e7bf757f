"""What holds of every rule for which patches of a frame to compute, and of any two together."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mae_deploy.runtime.selection.base import Combined, Scene, Selection, largest
from mae_deploy.runtime.selection.motion import Motion
from mae_deploy.runtime.selection.rules import Budget, Every, Grid, Oldest, Random, Saliency

P = 4
SHARES = st.floats(0.01, 1)
SIMPLE = st.one_of(
    st.builds(Motion),
    st.builds(Saliency, keep=SHARES),
    st.builds(Grid, step=st.integers(1, 4)),
    st.builds(Random, keep=SHARES, seed=st.integers(0, 9)),
    st.builds(Oldest, keep=SHARES),
    st.builds(Every, st.integers(1, 4)),
)
RULES = st.recursive(
    SIMPLE,
    lambda inner: st.one_of(
        st.builds(lambda first, second: first | second, inner, inner),
        st.builds(lambda first, second: first & second, inner, inner),
        st.builds(Budget, of=inner, at_most=st.one_of(st.integers(1, 30), st.floats(0.01, 0.99))),
    ),
    max_leaves=4,
)


def scenes(grid: tuple[int, int], seed: int, frames: int) -> list[Scene]:
    """Frames of noise, of which every patch was computed some frames ago."""
    rng, (rows, columns) = np.random.default_rng(seed), grid
    N, size = rows * columns, (rows * P, columns * P, 3)
    found = [Scene(pixels=rng.integers(0, 256, size, np.uint8), patch_size=P)]
    for index in range(1, frames):
        computed = np.where(rng.random(size[:2])[..., None] < 0.5, found[-1].pixels, 0).astype(np.uint8)
        age, tokens = rng.integers(1, 9, N), rng.standard_normal((N, 5))
        pixels = rng.integers(0, 256, size, np.uint8)
        found.append(Scene(pixels=pixels, patch_size=P, index=index, computed=computed, age=age, tokens=tokens))
    return found


GRIDS = st.tuples(st.integers(1, 6), st.integers(1, 6))


@given(rule=RULES, grid=GRIDS, seed=st.integers(0, 2**32 - 1))
def test_scores_are_finite_and_never_below_zero(rule: Selection, grid: tuple[int, int], seed: int) -> None:
    """Twice the same for the same frames, since a rule is written down once for many cameras."""
    seen = scenes(grid, seed, 4)
    first, second = rule.start(), rule.start()
    for scene in seen:
        scores = first(scene)
        assert scores.shape == (scene.num_patches,)
        assert np.isfinite(scores).all()
        assert (scores >= 0).all()
        assert np.array_equal(scores, second(scene))


@given(first=RULES, second=RULES, grid=GRIDS, seed=st.integers(0, 2**32 - 1))
def test_either_and_both(first: Selection, second: Selection, grid: tuple[int, int], seed: int) -> None:
    one, other, either, both = (rule.start() for rule in (first, second, first | second, first & second))
    assert isinstance(first | second, Combined)
    for scene in scenes(grid, seed, 3):
        wanted, asked = one(scene) > 0, other(scene) > 0
        assert np.array_equal(either(scene) > 0, wanted | asked)
        assert np.array_equal(both(scene) > 0, wanted & asked)


@given(scores=st.lists(st.floats(0, 9, width=16), min_size=1, max_size=40), most=st.integers(0, 45))
def test_the_largest_are_kept(scores: list[float], most: int) -> None:
    values = np.array(scores)
    kept = largest(values, most)
    assert np.count_nonzero(kept) == min(most, np.count_nonzero(values))
    assert np.array_equal(kept[kept > 0], values[kept > 0])
    assert not (kept > 0).any() or values[kept == 0].max(initial=0) <= kept[kept > 0].min()


@given(rule=SIMPLE, at_most=st.integers(1, 36), grid=GRIDS, seed=st.integers(0, 2**32 - 1))
def test_a_budget_is_kept_and_takes_what_matters_most(
    rule: Selection, at_most: int, grid: tuple[int, int], seed: int
) -> None:
    limited, free = Budget(of=rule, at_most=at_most).start(), rule.start()
    for scene in scenes(grid, seed, 3):
        scores, wanted = limited(scene), free(scene)
        assert np.count_nonzero(scores) <= at_most
        assert np.array_equal(scores, largest(wanted, at_most))
