"""Audits find what was planted into a cache, within their interval, whatever is selected and however many cameras share
a graph; and nothing in caches that are as they should be.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from mae_deploy.cli import main
from mae_deploy.images.read import Array
from mae_deploy.runtime.backbone import Backbone
from mae_deploy.runtime.selection import Budget, Grid, Motion, Oldest, Random, Selection
from tests.export.tiny_exports import write_checkpoint
from tests.models.tiny_models import ENCODER, tiny_encoder

N, P = ENCODER.num_patches, ENCODER.patch
AUDIT, REFRESH = 1.0, 0.1
SELECTIONS: dict[str, Selection] = {
    "motion": Motion(),
    "grid": Grid(step=3),
    "random": Motion() | Random(keep=0.1),
    "budget": Budget(of=Motion() & Oldest(keep=0.5), at_most=3),
}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backbone]:
    root = tmp_path_factory.mktemp("audit")
    checkpoint = write_checkpoint(root / "checkpoint", tiny_encoder())
    assert main(["export", str(checkpoint), "--out", str(root / "cached"), "--tokens", "cached"]) == 0
    with Backbone.load(root / "cached") as loaded:
        yield loaded


class Scene:
    """A camera before which one patch after the other flickers."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        height, width = ENCODER.image_size
        coarse = self.rng.integers(60, 190, (height // P, width // P, 3), np.uint8)
        self.still: Array = coarse.repeat(P, axis=0).repeat(P, axis=1)

    def frame(self) -> Array:
        """The next one."""
        found: Array = self.still.copy()
        row, column = (P * int(self.rng.integers(side // P)) for side in found.shape[:2])
        found[row : row + P, column : column + P] += np.uint8(40)
        return found


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("cameras", [1, 3])
@pytest.mark.parametrize("select", SELECTIONS)
def test_a_planted_drift_is_found_within_the_interval(backbone: Backbone, select: str, cameras: int, seed: int) -> None:
    options: dict[str, Any] = {"select": SELECTIONS[select], "bypass": 1.0, "cut": 1.0, "refresh": REFRESH}
    options["target_snr"] = 99.0  # a camera that needs more would take its neighbours in the batch with it
    pool, sound = (backbone.stream_pool(cameras, audit=AUDIT, **options) for _ in range(2))
    scenes = [Scene(10 * seed + camera) for camera in range(cameras)]
    rng = np.random.default_rng(seed)
    for _ in range(int(rng.integers(5, 15))):
        frames = [scene.frame() for scene in scenes]
        pool(frames)
        sound(frames)
    victim = int(rng.integers(cameras))
    cache = pool.cache(victim)
    for array in (*cache.rows.values(), cache.tokens):
        array += rng.normal(scale=6 * array.std(), size=array.shape).astype(array.dtype)

    spent = 0.0
    while True:
        frames = [scene.frame() for scene in scenes]
        found, expected = pool(frames), sound(frames)
        seen, spent = found[victim], spent + AUDIT * found[victim].cost
        for camera in set(range(cameras)) - {victim}:
            assert found[camera].snr == expected[camera].snr
            np.testing.assert_array_equal(found[camera].tokens, expected[camera].tokens)
        if seen.snr is not None or len(seen.keep) == N:
            break
        # Before the drift less than one whole frame had been saved up for the next audit.
        assert spent < 1, "no audit within its share of the computation"
    # A whole frame leaves no drift to be found.
    assert seen.snr is None or seen.snr < pool.config.min_snr
    for name, value in backbone.run_cropped(backbone.preprocess.crop(frames[victim])[None]).items():
        np.testing.assert_allclose(seen[name], value, atol=2e-5)  # FP32, another order of sums
