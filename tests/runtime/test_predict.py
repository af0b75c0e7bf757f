"""Image files to features: unreadable ones are left out and named."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image

from mae_deploy.errors import CheckFailed, ConfigError
from mae_deploy.images.read import Array, read_image
from mae_deploy.runtime import Backbone
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.engines.base import EngineOptions
from mae_deploy.runtime.engines.onnxruntime import OnnxRuntimeEngine
from mae_deploy.runtime.predict import Predictions, class_scores, top_k
from tests.runtime.tiny_bundle import C, D, K, N, P, write_bundle


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    """Seven files; the third is empty, the last is no image."""
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"photo-{index}.png" for index in range(7)]
    for index, path in enumerate(paths):
        Image.fromarray(rng.integers(0, 256, (17 + index, 23, 3), dtype=np.uint8)).save(path)
    paths[2].write_bytes(b"")
    paths[6].write_text("no image")
    return paths


def collect(predictions: Predictions, output: str = "cls") -> tuple[list[Path], Array, list[int]]:
    paths: list[Path] = []
    arrays = []
    for names, features in predictions:
        assert len(names) == len(features[output])
        paths += names
        arrays.append(features[output])
    return paths, np.concatenate(arrays), [len(array) for array in arrays]


@pytest.mark.parametrize(("batch_size", "sizes"), [(1, [1] * 5), (2, [2, 2, 1]), (3, [3, 2]), (5, [5]), (None, [5])])
def test_readable_images_come_in_batches_and_in_order(
    full_bundle: Path, photos: list[Path], batch_size: int | None, sizes: list[int]
) -> None:
    backbone = Backbone.load(full_bundle)
    predictions = Predictions(backbone, photos, batch_size=batch_size)
    paths, found, lengths = collect(predictions)
    readable = [photos[index] for index in (0, 1, 3, 4, 5)]
    assert (paths, lengths) == (readable, sizes)
    np.testing.assert_allclose(found, np.concatenate([backbone(read_image(path)).cls for path in readable]), atol=1e-6)
    assert [bad.path for bad in predictions.unreadable] == [photos[2], photos[6]]
    assert predictions.unreadable[0].reason == "the file is empty"
    assert "cannot identify" in predictions.unreadable[1].reason


class TwoInFlight(OnnxRuntimeEngine):
    """An engine that computes beside the caller, as far as the order of things shows."""

    in_flight = 2
    events: ClassVar[list[str]] = []

    def submit(self, inputs: Any, outputs: Any = None) -> Any:
        self.events.append("start")
        run = super().submit(inputs, outputs)

        def result() -> Any:
            self.events.append("wait")
            return run.result()

        return SimpleNamespace(result=result)


def test_the_next_batch_is_started_before_the_one_before_is_waited_for(full_bundle: Path, photos: list[Path]) -> None:
    bundle = Bundle.load(full_bundle)
    plain = collect(Predictions(Backbone.load(full_bundle), photos, batch_size=2))
    TwoInFlight.events.clear()
    predictions = Predictions(
        Backbone(bundle, TwoInFlight(bundle.graph(), EngineOptions(threads=1))), photos, batch_size=2
    )
    seen = [(len(names), predictions.done, len(predictions.unreadable)) for names, _ in predictions]
    assert TwoInFlight.events == ["start", "start", "wait", "start", "wait", "wait"]
    assert seen == [(2, 2, 0), (2, 5, 1), (1, 7, 2)], "what is told of is what was handed out"
    paths, found, sizes = collect(predictions)
    assert (paths, sizes) == (plain[0], plain[2])
    np.testing.assert_array_equal(found, plain[1])


def test_a_call_with_many_images_prepares_a_part_while_the_one_before_is_computed(full_bundle: Path) -> None:
    bundle = Bundle.load(full_bundle)
    images = np.random.default_rng(0).integers(0, 256, (2 * bundle.largest_batch + 1, 9, 7, 3), np.uint8)
    TwoInFlight.events.clear()
    found = Backbone(bundle, TwoInFlight(bundle.graph(), EngineOptions(threads=1)))(images).cls
    assert TwoInFlight.events == ["start", "start", "wait", "start", "wait", "wait"]
    np.testing.assert_allclose(found, Backbone.load(full_bundle)(images).cls, atol=1e-6)


def test_a_fixed_batch_is_the_default_batch_size(tmp_path: Path, photos: list[Path]) -> None:
    predictions = Predictions(Backbone.load(write_bundle(tmp_path / "b", token_mode="full", batch=3)), photos)
    assert collect(predictions)[2] == [3, 2]


def test_a_second_pass_starts_again(full_bundle: Path, photos: list[Path]) -> None:
    predictions = Predictions(Backbone.load(full_bundle), photos)
    assert collect(predictions)[0] == collect(predictions)[0]
    assert len(predictions.unreadable) == 2


def test_going_on_where_an_earlier_call_has_come_to(visible_bundle: Path, photos: list[Path]) -> None:
    backbone = Backbone.load(visible_bundle)
    whole = Predictions(backbone, photos, num_keep=K, batch_size=2)
    batches = [(paths, features.tokens, whole.done) for paths, features in whole]
    assert [done for _, _, done in batches] == [2, 5, 7]  # the third cannot be read, nor can the last
    rest = Predictions(backbone, photos, num_keep=K, batch_size=2, start=2)
    for (paths, tokens, done), (again, features) in zip(batches[1:], rest, strict=True):
        assert (again, rest.done) == (paths, done)
        np.testing.assert_allclose(features.tokens, tokens, atol=1e-6)  # the same session on a batch of the same size
    assert [bad.path for bad in rest.unreadable] == [photos[2], photos[6]]


def test_a_floating_point_image_is_reported_not_fatal(full_bundle: Path, photos: list[Path]) -> None:
    Image.new("F", (9, 9)).save(photos[0].with_suffix(".tiff"))
    predictions = Predictions(
        Backbone.load(full_bundle), [photos[0].with_suffix(".tiff"), photos[1], photos[0].with_name("gone.png")]
    )
    assert collect(predictions)[0] == [photos[1]]
    assert ["floating-point" in bad.reason for bad in predictions.unreadable] == [True, False]


def test_no_readable_image_at_all(full_bundle: Path, photos: list[Path]) -> None:
    with pytest.raises(
        CheckFailed, match=r"none of 2 images could be read; the first: .*photo-2\.png: the file is empty"
    ):
        list(Predictions(Backbone.load(full_bundle), [photos[2], photos[6]]))


def test_given_patches_are_kept(visible_bundle: Path, photos: list[Path]) -> None:
    backbone = Backbone.load(visible_bundle)
    _, found, _ = collect(Predictions(backbone, photos[:2], keep=[5, 0]), "tokens")
    np.testing.assert_allclose(found[1], backbone(read_image(photos[1]), [5, 0]).tokens[0], atol=1e-6)


def test_random_patches_depend_on_seed_and_place_only(visible_bundle: Path, photos: list[Path]) -> None:
    backbone = Backbone.load(visible_bundle)
    runs = [collect(Predictions(backbone, photos, num_keep=K, batch_size=size), "tokens")[1] for size in (1, 3)]
    assert runs[0].shape == (5, K, D)
    np.testing.assert_allclose(runs[0], runs[1], atol=1e-6)
    mended = photos[2]
    Image.new("RGB", (9, 9)).save(mended)
    np.testing.assert_allclose(
        np.delete(collect(Predictions(backbone, photos, num_keep=K), "tokens")[1], 2, axis=0), runs[0], atol=1e-6
    )
    other = collect(Predictions(backbone, photos, num_keep=K, seed=1), "tokens")[1]
    assert not np.allclose(np.delete(other, 2, axis=0), runs[0], atol=1e-3)


def test_random_patches_differ_by_image(visible_bundle: Path, photos: list[Path]) -> None:
    backbone = Backbone.load(visible_bundle)
    _, tokens, _ = collect(Predictions(backbone, [photos[0]] * 2, num_keep=K), "tokens")
    assert not np.allclose(tokens[0], tokens[1], atol=1e-3)


def test_all_patches_in_another_order_give_the_same_mean(visible_bundle: Path, photos: list[Path]) -> None:
    backbone = Backbone.load(visible_bundle)
    every = collect(Predictions(backbone, photos[:1]), "pooled")[1]
    np.testing.assert_allclose(collect(Predictions(backbone, photos[:1], num_keep=N), "pooled")[1], every, atol=1e-6)


@pytest.mark.parametrize(
    ("num_keep", "keep", "message"),
    [(0, None, "num_keep 0"), (N + 1, None, f"num_keep {N + 1}"), (2, [0, 1], "exclude one another")],
)
def test_numbers_of_patches_that_cannot_be_taken(
    visible_bundle: Path, photos: list[Path], num_keep: int, keep: list[int] | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Predictions(Backbone.load(visible_bundle), photos, keep=keep, num_keep=num_keep)


def test_a_fixed_number_of_patches_binds(tmp_path: Path, photos: list[Path]) -> None:
    backbone = Backbone.load(write_bundle(tmp_path / "b", keep=K))
    assert collect(Predictions(backbone, photos, num_keep=K), "tokens")[1].shape == (5, K, D)
    with pytest.raises(ConfigError, match="num_keep 3 cannot be used") as caught:
        Predictions(backbone, photos, num_keep=3)
    assert caught.value.hint == f"this graph takes {K} patches"


def test_a_number_of_patches_outside_of_the_profile(tmp_path: Path, photos: list[Path]) -> None:
    backbone = Backbone.load(write_bundle(tmp_path / "b", profile_keep=(2, 4, 9)))
    with pytest.raises(ConfigError, match="num_keep 1 cannot be used") as caught:
        Predictions(backbone, photos, num_keep=1)
    assert caught.value.hint == "this graph takes 2 to 9 patches"


@pytest.mark.parametrize("fixed", [None, 8])
def test_a_ragged_graph_sees_as_many_patches_of_every_image(
    tmp_path: Path, photos: list[Path], fixed: int | None
) -> None:
    backbone = Backbone.load(write_bundle(tmp_path / "b", token_mode="ragged", keep=fixed))
    _, found, _ = collect(Predictions(backbone, photos, num_keep=3), "tokens")
    assert found.shape == (5, fixed or 3, D)
    assert (found != 0).any(axis=2).tolist() == [[True] * 3 + [False] * (found.shape[1] - 3)] * 5
    _, kept, _ = collect(Predictions(backbone, photos, keep=[20, 1]), "cls")
    np.testing.assert_allclose(kept[0], backbone(read_image(photos[0]), [20, 1]).cls[0], atol=1e-6)
    with pytest.raises(ConfigError, match=f"num_keep {N + 1}"):
        Predictions(backbone, photos, num_keep=N + 1)


def test_a_reconstruction_from_random_patches(tmp_path: Path, photos: list[Path]) -> None:
    backbone = Backbone.load(write_bundle(tmp_path / "b", token_mode="reconstruct", outputs=("pixels",)))
    assert collect(Predictions(backbone, photos, num_keep=K), "pixels")[1].shape == (5, N, P * P * C)


def test_pixels_are_cropped_once_for_a_graph_that_normalises(
    tmp_path: Path, photos: list[Path], full_bundle: Path
) -> None:
    """A second crop would cut the border off again."""
    settings: dict[str, Any] = {"token_mode": "full", "preprocess": {"crop_pct": 0.6}}
    inside, outside = (
        Backbone.load(write_bundle(tmp_path / images, images=images, **settings)) for images in ("uint8", "float32")
    )
    expected = collect(Predictions(outside, photos))[1]
    np.testing.assert_allclose(collect(Predictions(inside, photos))[1], expected, atol=1e-5)
    np.testing.assert_allclose(expected[0], inside(read_image(photos[0])).cls[0], atol=1e-5)


def test_a_full_graph_takes_no_number_of_patches(full_bundle: Path, photos: list[Path]) -> None:
    with pytest.raises(ConfigError, match="takes every patch"):
        Predictions(Backbone.load(full_bundle), photos, num_keep=K)


def test_outputs_are_chosen(full_bundle: Path, photos: list[Path]) -> None:
    assert [list(features) for _, features in Predictions(Backbone.load(full_bundle), photos, outputs=["pooled"])] == [
        ["pooled"]
    ]


@pytest.mark.parametrize(("paths", "batch_size"), [(0, 1), (1, 0), (1, -3)])
def test_nothing_to_do(full_bundle: Path, photos: list[Path], paths: int, batch_size: int) -> None:
    with pytest.raises(ConfigError, match="nothing to predict"):
        Predictions(Backbone.load(full_bundle), photos[:paths], batch_size=batch_size)


# --- classes ---------------------------------------------------------------------------------------------------------


def test_top_k_is_sorted_softmax() -> None:
    logits = np.log(np.array([[0.1, 0.7, 0.2], [0.5, 0.2, 0.3]], np.float32)) + 1000
    first, second = top_k(logits, ["ant", "bee", "cat"], 2)
    assert [name for name, _ in first] == ["bee", "cat"]
    assert [name for name, _ in second] == ["ant", "cat"]
    assert [share for _, share in first] == pytest.approx(
        [0.7, 0.2], abs=1e-3
    )  # the offset of 1000 costs float32 its digits


def test_top_k_without_names_or_with_few_classes() -> None:
    assert [name for name, _ in top_k(np.array([[0.0, 2.0, 1.0]]), None, 7)[0]] == ["1", "2", "0"]


def test_top_k_sums_to_one() -> None:
    assert sum(
        share for _, share in top_k(np.random.default_rng(0).normal(size=(1, 11)), None, 11)[0]
    ) == pytest.approx(1)


def test_scores_of_probabilities_give_them_back() -> None:
    probs = np.array([[0.1, 0.7, 0.2], [0.0, 0.4, 0.6]], np.float32)
    scores = class_scores({"probs": probs, "cls": probs})
    assert scores is not None
    for row, classes in zip(probs, top_k(scores, None, 3), strict=True):
        assert [share for _, share in classes] == pytest.approx(sorted(row, reverse=True))
    assert class_scores({"logits": probs, "probs": 1 - probs}) is probs
    assert class_scores({"cls": probs}) is None


def test_top_k_errors() -> None:
    logits = np.zeros((2, 3))
    with pytest.raises(ConfigError, match="k of at least 1"):
        top_k(logits, None, 0)
    with pytest.raises(ConfigError, match="2 class names for 3 logits"):
        top_k(logits, ["a", "b"], 1)
    logits[1, 1] = np.nan
    with pytest.raises(CheckFailed, match="NaN"):
        top_k(logits, None, 1)
