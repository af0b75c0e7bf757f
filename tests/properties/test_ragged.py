"""Images that each keep their own number of patches get what each gets alone."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mae_deploy.runtime import Backbone
from mae_deploy.runtime.manifest import follows_keep

FIXTURES = Path(__file__).parents[1] / "fixtures" / "v1" / "bundles"


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backbone]:
    folder = shutil.copytree(FIXTURES / "ragged", tmp_path_factory.mktemp("bundles") / "ragged")
    with Backbone.load(folder, "onnxruntime", threads=1) as loaded:
        yield loaded


@settings(max_examples=12)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_padding_changes_nothing(backbone: Backbone, data: st.DataObject, seed: int) -> None:
    """1e-5: longer rows are summed in another order."""
    least, most = backbone.bundle.keep_range
    N, B = backbone.bundle.num_patches, data.draw(st.integers(1, 3))
    rows = [data.draw(st.permutations(range(N)))[: data.draw(st.integers(least, most))] for _ in range(B)]
    rng = np.random.default_rng(seed)
    images = rng.standard_normal((B, 3, *backbone.bundle.model["image_size"])).astype(np.float32)
    together = backbone(images, rows)
    width = max(map(len, rows))
    filled = [data.draw(st.integers(-9, 99)) for _ in rows]
    padded = np.array([[*row, *[fill] * (width - len(row))] for row, fill in zip(rows, filled, strict=True)])
    told = backbone(images, padded, num_keep=[len(row) for row in rows])
    for index, row in enumerate(rows):
        alone = backbone(images[index : index + 1], [row])
        for name, array in alone.items():
            length = len(row) if follows_keep(name) else None
            for found in (together, told):
                np.testing.assert_allclose(found[name][index][:length], array[0][:length], rtol=0, atol=1e-5)
