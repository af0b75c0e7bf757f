"""Graphs of models with groups of bands compute what PyTorch computes, in every token mode that there is for them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mae_deploy.config import to_dict
from mae_deploy.errors import ConfigError
from mae_deploy.export.graph.encoder import build_graph
from mae_deploy.export.graph.spec import GraphSpec, Images, TokenMode
from mae_deploy.export.preprocessing import with_one_std
from mae_deploy.export.reference import Reference
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.images.read import Array
from mae_deploy.weights.load import LoadedWeights, at_image_size, model_of
from tests.export.tiny_exports import SavedGraph, graph_of
from tests.models.tiny_models import ENCODER, fill, metadata_of, tiny_classifier, tiny_encoder, tiny_mae

BANDS = replace(ENCODER, in_chans=5, band_groups=((0, 3), (4,), (1, 2)))
SPEC = Preprocess(image_size=(6, 10), channels=5, mean=(0.1, 0.3, 0.5, 0.4, 0.2), std=(0.2, 0.5, 0.3, 0.4, 0.7))
TOLERANCE = 2e-5
"""FP32 sums of at most 45 terms in another order; with uint8 images, pixels up to 255 times folded weights."""


def inputs(mode: TokenMode, count: int = 3) -> dict[str, Array]:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 6, 10, 5), dtype=np.uint8)
    found: dict[str, Array] = {"images": pixels}
    if mode != "full":
        found["ids_keep"] = np.stack([np.random.default_rng(seed).permutation(45)[:17] for seed in range(count)])
    if mode == "ragged":
        found["num_keep"] = np.array([17, 1, 8])
    return found


@pytest.mark.parametrize("images", ["float32", "uint8"])
@pytest.mark.parametrize("mode", ["full", "visible", "ragged"])
def test_the_encoder(tmp_path: Path, mode: TokenMode, images: Images) -> None:
    model, given, names = tiny_encoder(BANDS), inputs(mode), ("cls", "tokens", "pooled", "feature_map", "block_0")
    normalised = {**given, "images": SPEC.normalise(given["images"])}
    expected = Reference(model=model, preprocess=SPEC).outputs(normalised, names)
    assert expected["tokens"].shape == (3, 45 if mode == "full" else 17, 20)
    metadata = replace(metadata_of(model), preprocess=to_dict(SPEC))
    graph = SavedGraph(
        build_graph(metadata, model.state_dict(), GraphSpec(token_mode=mode, outputs=names, images=images)), tmp_path
    )
    found = graph(**(given if images == "uint8" else normalised))
    for name in names:
        np.testing.assert_allclose(found[name], expected[name], atol=TOLERANCE, err_msg=name)


@pytest.mark.parametrize("pool", ["avg", "cls"])
def test_the_classifier(tmp_path: Path, pool: str) -> None:
    model = tiny_classifier("avg" if pool == "avg" else "cls", BANDS)
    given = {"images": SPEC.normalise(inputs("full")["images"])}
    expected = Reference(model=model, preprocess=SPEC).outputs(given, ("logits",))
    np.testing.assert_allclose(
        graph_of(model, tmp_path, "full", batch=3)(**given)["logits"], expected["logits"], atol=TOLERANCE
    )


def test_fixed_sizes(tmp_path: Path) -> None:
    model, given = tiny_encoder(BANDS), inputs("visible", 2)
    given["images"] = SPEC.normalise(given["images"])
    names = ("tokens", "feature_map")
    expected = Reference(model=model, preprocess=SPEC).outputs(given, names)
    found = graph_of(model, tmp_path, "visible", keep=17, batch=2, outputs=names)(**given)
    for name in names:
        np.testing.assert_allclose(found[name], expected[name], atol=TOLERANCE)
    with pytest.raises(ConfigError, match="K must be within 1 and 45"):
        graph_of(model, tmp_path, "visible", keep=46)


def test_no_decoder_is_exported(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--tokens reconstruct: a model with --band-groups"):
        graph_of(tiny_mae(BANDS), tmp_path, "reconstruct")


def test_one_standard_deviation_for_all_bands_changes_nothing() -> None:
    model = tiny_encoder(BANDS)
    metadata = replace(metadata_of(model), preprocess=to_dict(SPEC))
    folded = with_one_std(LoadedWeights(metadata, model.state_dict(), {}))
    spec = replace(SPEC, std=tuple(folded.metadata.preprocess["std"]))
    assert len(set(spec.std)) == 1
    pixels = inputs("full")["images"]
    names = ("tokens",)
    expected = Reference(model=model, preprocess=SPEC).outputs({"images": SPEC.normalise(pixels)}, names)
    found = Reference(model=model_of(folded), preprocess=spec).outputs({"images": spec.normalise(pixels)}, names)
    np.testing.assert_allclose(found["tokens"], expected["tokens"], atol=TOLERANCE)


def test_another_size() -> None:
    model = fill(tiny_encoder(BANDS))
    larger = at_image_size(LoadedWeights(metadata_of(model), model.state_dict(), {}), (10, 14))
    assert larger.encoder_config.num_tokens == 3 * 35
    assert model_of(larger).positions().shape == (1, 1 + 3 * 35, 20)
