"""Seeds depend on everything that they are for and on nothing else."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from mae_deploy.errors import ConfigError
from mae_deploy.seeding import derive_seed, random_patches, seed_everything


def test_seeds_of_older_runs_stay() -> None:
    # Written down: another derivation would resume every older run to other losses.
    assert derive_seed(0, "weights") == 3699729803252847382
    assert derive_seed(0, "order", 3) == 631126061119222281


def test_every_argument_counts() -> None:
    arguments: list[tuple[int, str, tuple[int, ...]]] = [
        (0, "order", ()),
        (0, "order", (1,)),
        (0, "order", (2,)),
        (0, "order", (1, 2)),
        (0, "order", (2, 1)),
        (1, "order", ()),
        (0, "augment", ()),
        (2**40, "order", ()),
    ]
    seeds = [derive_seed(seed, purpose, *counters) for seed, purpose, counters in arguments]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seeds == [derive_seed(seed, purpose, *counters) for seed, purpose, counters in arguments]


def test_a_negative_seed_is_refused() -> None:
    for draw in (lambda: derive_seed(-1, "weights"), lambda: random_patches(9, 3, range(2), -1)):
        with pytest.raises(ConfigError, match="--seed -1 must be at least 0"):
            draw()


@pytest.mark.parametrize("seed", [0, 7, 2**63 - 1])
def test_every_generator_is_seeded(seed: int) -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(1))

    seed_everything(seed)
    first, second = draw(), draw()
    assert all(a != b for a, b in zip(first, second, strict=True))
    seed_everything(seed)
    assert draw() == first
    seed_everything(seed - 1 if seed else 1)
    assert all(a != b for a, b in zip(draw(), first, strict=True))


def test_torch_gets_the_seed_that_its_own_function_gives() -> None:
    seed_everything(11)
    ours = torch.rand(3)
    torch.manual_seed(11)
    assert torch.equal(torch.rand(3), ours)
