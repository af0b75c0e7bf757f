"""The backbone as another program embeds it: images and patches of every kind in, named features out."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mae_deploy.errors import ConfigError, MaeDeployError
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.images.read import Array
from mae_deploy.runtime import Backbone, Features, UnreadableImage
from tests.runtime.tiny_bundle import CLASSES, OUTPUTS, C, D, H, K, N, P, W, golden_inputs, reference, write_bundle

ATOL = 1e-5
"""FP32 sums of at most 21 terms in another order."""


def photo(height: int = 19, width: int = 23, channels: int = 3, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def assert_same(found: Features, expected: dict[str, Array]) -> None:
    assert list(found) == list(expected)
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, atol=ATOL, err_msg=name)


@pytest.fixture
def full(full_bundle: Path) -> Backbone:
    return Backbone.load(full_bundle)


@pytest.fixture
def visible(visible_bundle: Path) -> Backbone:
    return Backbone.load(visible_bundle, threads=1)


# --- many images at once ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["list", "uint8", "float32"])
def test_any_number_of_images_is_run_in_parts_that_were_checked(
    full_bundle: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = Backbone.load(full_bundle)
    images: Any = [photo(H, W, seed=index) for index in range(70)]
    single = [backbone(image) for image in images]
    if kind != "list":
        images = np.stack(images)
    if kind == "float32":
        images = backbone.preprocess.normalise(images)
    sizes: list[int] = []
    run = backbone.engine.run

    def spy(inputs: dict[str, Array], outputs: Any = None) -> dict[str, Array]:
        sizes.append(len(inputs["images"]))
        return run(inputs, outputs)

    monkeypatch.setattr(backbone.engine, "run", spy)
    found = backbone(images)
    assert sizes == [32, 32, 6]  # the tiny bundle was checked for batches of 1 to 32
    assert_same(found, {name: np.concatenate([one[name] for one in single]) for name in OUTPUTS})


def test_each_part_gets_its_own_patches(visible: Backbone, ragged: Backbone) -> None:
    images = [photo(seed=index) for index in range(37)]
    rng = np.random.default_rng(0)
    keep = np.stack([rng.permutation(N)[:K] for _ in images])
    expected = np.concatenate([visible(image, row).tokens for image, row in zip(images, keep, strict=True)])
    np.testing.assert_allclose(visible(images, keep).tokens, expected, atol=ATOL)
    lengths = rng.integers(1, K, len(images))
    rows = [row[:length] for row, length in zip(keep, lengths, strict=True)]
    tokens = ragged(images, rows).tokens
    for found, image, row in zip(tokens, images, rows, strict=True):
        np.testing.assert_allclose(found[: len(row)], ragged(image, row).tokens[0], atol=ATOL)
        assert not found[len(row) :].any()


def test_an_image_that_cannot_be_taken_has_its_own_number(full: Backbone) -> None:
    with pytest.raises(ConfigError, match="image 40: "):
        full([*[photo()] * 40, np.zeros((3, 3), np.int64)])


# --- images ----------------------------------------------------------------------------------------------------------


def test_one_image_comes_back_with_a_batch_axis(full: Backbone) -> None:
    found = full(photo())
    assert {name: array.shape for name, array in found.items()} == {
        "cls": (1, D),
        "tokens": (1, N, D),
        "pooled": (1, D),
        "logits": (1, CLASSES),
    }
    assert_same(found, reference(full.preprocess([photo()])))


def test_properties(full: Backbone, full_bundle: Path) -> None:
    assert (full.num_patches, full.output_names, full.bundle.path) == (N, tuple(OUTPUTS), full_bundle)
    assert full.preprocess == full.bundle.preprocess


def test_pixels_reach_the_graph_normalised_and_unresized_where_they_fit(full: Backbone) -> None:
    """The resize is the identity here, so this does not lean on the code under test."""
    pixels = photo(H, W)
    images = (pixels / 255 - [0.4, 0.5, 0.6]) / [0.2, 0.3, 0.4]
    assert_same(full(pixels), reference(images.transpose(2, 0, 1)[None].astype(np.float32)))


def test_grey_and_rgba_arrays(full: Backbone) -> None:
    grey = photo(channels=1)
    rgb = np.repeat(grey, 3, axis=2)
    expected = dict(full(rgb))
    assert_same(full(grey[:, :, 0]), expected)
    assert_same(full(grey), expected)
    assert_same(full(np.concatenate([rgb, np.full_like(grey, 255)], axis=2)), expected)


def test_frames_of_opencv(full: Backbone) -> None:
    """Blue first; as arrays of any shape, and normalised batches."""
    expected = full([photo(), photo(seed=1)])
    frames = [photo()[:, :, ::-1], photo(seed=1)[:, :, ::-1]]
    assert_same(full(frames, channel_order="bgr"), expected)
    assert_same(full(np.stack(frames), channel_order="bgr"), expected)
    assert_same(full(full.preprocess([photo(), photo(seed=1)])[:, ::-1], channel_order="bgr"), expected)
    assert_same(full([Image.fromarray(photo()), frames[1]], channel_order="bgr"), expected)
    four = photo(channels=4)
    assert_same(full(four[:, :, [2, 1, 0, 3]], channel_order="bgr"), full(four))
    assert_same(full(photo(channels=1), channel_order="bgr"), full(photo(channels=1)))
    assert np.abs(full(frames).cls - expected.cls).max() > 100 * ATOL
    with pytest.raises(ConfigError, match="channel_order 'rbg' is not one of rgb, bgr"):
        full(photo(), channel_order="rbg")  # type: ignore[arg-type]
    with pytest.raises(ConfigError) as error:
        full(photo().astype(np.int64))
    assert "channel_order='bgr'" in (error.value.hint or "")


def test_another_crop_mode_at_load(full_bundle: Path) -> None:
    squash = Backbone.load(full_bundle, crop_mode="squash")
    spec = Preprocess(
        image_size=(H, W), mean=squash.preprocess.mean, std=squash.preprocess.std, interpolation="bilinear"
    )
    expected = spec.altered(crop_mode="squash")
    assert squash.preprocess == expected
    assert squash.bundle.preprocess.crop_mode == "center"
    assert_same(squash(photo()), reference(expected([photo()])))
    assert pickle.loads(pickle.dumps(squash)).preprocess == expected


def test_the_patches_of_a_region(visible: Backbone) -> None:
    """An image of the input's size, 3 x 7 patches of 2 pixels."""
    shape = (H, W, 3)
    found = visible.patches(shape, (0, 0, P + 1, P))
    assert found is not None
    assert found.tolist() == [0, 1]
    assert_same(visible(photo(H, W), keep=found), reference(visible.preprocess([photo(H, W)]), np.array([[0, 1]])))
    mask = np.zeros((H, W), bool)
    mask[-1, -1] = True
    last = visible.patches(shape, mask)
    assert last is not None
    assert last.tolist() == [N - 1]
    assert visible.patches(shape, np.zeros((H, W), bool)) is None
    assert visible.patches((H, 3 * W), (0, 0, W, H)) is None, "the crop hides it"


def test_a_batch_equals_its_images(full: Backbone) -> None:
    images = np.stack([photo(seed=seed) for seed in range(3)])
    expected = {name: np.concatenate([full(image)[name] for image in images]) for name in OUTPUTS}
    assert_same(full(images), expected)
    assert_same(full(list(images)), expected)
    assert_same(full(tuple(Image.fromarray(image) for image in images)), expected)
    assert_same(full(full.preprocess(list(images))), expected)


def test_a_list_may_mix_sizes_and_kinds(full: Backbone) -> None:
    small, large = photo(5, 11), photo(41, 17, seed=1)
    expected = {name: np.concatenate([full(small)[name], full(large)[name]]) for name in OUTPUTS}
    assert_same(full([Image.fromarray(small), large]), expected)


def test_pillow_images_are_turned_upright(full: Backbone, tmp_path: Path) -> None:
    pixels = photo()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(np.rot90(pixels)).save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as turned:
        assert_same(full(turned), dict(full(pixels)))


def test_an_image_is_read_from_its_path_or_its_bytes(full: Backbone, tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    image = Image.fromarray(photo())
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(path, exif=exif)
    expected = full(Image.open(path))
    for source in (path, str(path), path.read_bytes()):
        assert_same(full(full.read(source)), dict(expected))
    with pytest.raises(UnreadableImage, match=r"^7 bytes: cannot identify image file"):
        full.read(b"no jpeg")


def test_arrays_are_read_from_their_bytes(tmp_path: Path) -> None:
    backbone = Backbone.load(write_bundle(tmp_path / "bundle", token_mode="full", preprocess={"pixel_max": 1000.0}))
    pixels = 3 * photo().astype(np.uint16)
    np.save(tmp_path / "scene.npy", pixels)
    np.testing.assert_array_equal(backbone.read((tmp_path / "scene.npy").read_bytes()), pixels)


def test_a_transposed_float_batch_is_refused(full: Backbone) -> None:
    with pytest.raises(ConfigError, match=rf"shape \(2, {H}, {W}, {C}\), not \(B, {C}, {H}, {W}\)"):
        full(np.zeros((2, H, W, C), np.float32))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((C, H, W), np.float32), "float32 images have the shape"),
        (np.zeros((0, C, H, W), np.float32), "float32 images have the shape"),
        (np.zeros((1, C, H, W + 2), np.float32), "float32 images have the shape"),
        (np.zeros((1, C, H, W), np.float64), "images are float64"),
        (np.zeros((H, W, C), np.int64), "images are int64"),
        (np.zeros(7, np.uint8), r"images are uint8 \(7,\)"),
        (np.zeros((1, 1, H, W, C), np.uint8), "images are uint8"),
        (np.zeros((H, W, 5), np.uint8), r"image 0: .*\(6, 14, 5\)"),
        (np.zeros((0, 4, 3), np.uint8), r"image 0: no pixels in shape \(0, 4, 3\)"),
        (np.zeros((0, H, W, C), np.uint8), "there are no images"),
        ([], "there are no images"),
        ([photo(), np.zeros((H, W, C), np.float32)], "image 1: .*float32"),
        ([photo(), "photo.jpg"], "image 1 is of type str"),
        ("photo.jpg", "images are of type str"),
        (None, "images are of type NoneType"),
        (Image.new("F", (3, 4)), "image 0 cannot be decoded: floating-point"),
    ],
)
def test_images_that_cannot_be_taken(full: Backbone, images: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        full(images)


def test_a_pillow_image_that_breaks_while_it_is_decoded(full: Backbone, tmp_path: Path) -> None:
    Image.fromarray(photo(101, 103)).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:-2000])
    with (
        Image.open(tmp_path / "cut.jpg") as cut,
        pytest.raises(ConfigError, match=r"image 1 cannot be decoded: .*truncated"),
    ):
        full([photo(), cut])


# --- patches ---------------------------------------------------------------------------------------------------------


def test_without_keep_every_patch_is_used(visible: Backbone) -> None:
    images = golden_inputs(visible=False)["images"]
    assert_same(visible(images), reference(images))


@pytest.mark.parametrize("kind", ["array", "list", "list of arrays", "uint8"])
def test_a_row_of_patches_for_each_image(visible: Backbone, kind: str) -> None:
    inputs = golden_inputs(visible=True)
    ids = inputs["ids_keep"]
    keep: Any = {"array": ids, "list": ids.tolist(), "list of arrays": list(ids), "uint8": ids.astype(np.uint8)}[kind]
    assert_same(visible(inputs["images"], keep), reference(**inputs))


def test_the_same_patches_for_every_image(visible: Backbone) -> None:
    images = golden_inputs(visible=False)["images"]
    keep = [20, 0, 7]
    assert_same(visible(images, keep), reference(images, np.array([keep] * len(images))))


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ([0, N], f"the patch {N}"),
        ([-1, 2], "the patch -1"),
        ([3, 1, 3], "the patch 3 twice"),
        ([[0, 1], [2, 2]], "the patch 2 twice"),
        ([[0, 1], [2]], "rows of unequal length"),
        ([0.0, 1.0], "whole numbers, not float64"),
        ([True, False], r"the mask has the shape \(2,\)"),
        (["a"], "whole numbers, not <U1"),
        ([None], "whole numbers, not object"),
        ([], r"shape \(0,\) for 2 images"),
        ([[], []], r"shape \(2, 0\) for 2 images"),
        (3, r"shape \(\) for 2 images"),
        ([[0, 1]], r"shape \(1, 2\) for 2 images"),
        ([[0], [1], [2]], r"shape \(3, 1\) for 2 images"),
        ([[[0]], [[1]]], r"shape \(2, 1, 1\) for 2 images"),
    ],
)
def test_patches_that_cannot_be_taken(visible: Backbone, keep: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        visible(np.zeros((2, C, H, W), np.float32), keep)


def mask_of(*patches: int) -> Array:
    mask = np.zeros(N, bool)
    mask[list(patches)] = True
    return mask


GRID = (H // P, W // P)


@pytest.mark.parametrize(
    "keep",
    [
        mask_of(2, 5, 11),
        mask_of(2, 5, 11).tolist(),
        mask_of(2, 5, 11).reshape(GRID),
        np.stack([mask_of(2, 5, 11)] * 2),
        np.stack([mask_of(2, 5, 11).reshape(GRID)] * 2),
        [mask_of(2, 5, 11)] * 2,
        "2,5, 11",
    ],
    ids=["mask", "list", "grid", "masks", "grids", "list of masks", "text"],
)
def test_masks_and_text_are_the_patches_that_they_stand_for(visible: Backbone, keep: Any) -> None:
    images = [photo(), photo(seed=1)]
    assert_same(visible(images, keep), dict(visible(images, [2, 5, 11])))


def test_a_range_is_its_numbers(visible: Backbone) -> None:
    expected = dict(visible(photo(), [0, 1, 2, 3, 9]))
    for keep in ("0-3,9", [*range(4), 9]):
        assert_same(visible(photo(), keep), expected)
    assert_same(visible(photo(), range(4)), dict(visible(photo(), "0-3")))


def test_a_mask_for_each_image(visible: Backbone, ragged: Backbone) -> None:
    images = [photo(), photo(seed=1)]
    uneven = [mask_of(2, 5, 11), mask_of(0, 4)]
    assert_same(ragged(images, np.stack(uneven)), dict(ragged(images, [[2, 5, 11], [0, 4]])))
    even = np.stack([mask_of(2, 5), mask_of(0, 4)])
    assert_same(visible(images, even), dict(visible(images, [[2, 5], [0, 4]])))
    with pytest.raises(ConfigError, match="keep has rows of unequal length"):
        visible(images, np.stack(uneven))


@pytest.mark.parametrize(
    ("keep", "num_keep", "message"),
    [
        (np.ones(N + 1, bool), None, rf"the mask has the shape \({N + 1},\)"),
        (np.ones(GRID[::-1], bool), None, "the mask has the shape"),
        (np.zeros(N, bool), None, "mask 0 keeps no patch"),
        (np.ones((2, N), bool), None, r"keep has the shape \(2, 21\) for 1 images"),
        ("3-1", None, "keep '3-1' is not a list of patches"),
        ("1-x", None, "keep '1-x' is not a list of patches"),
        ("", None, "keep has "),
    ],
)
def test_masks_and_ranges_that_cannot_be_taken(visible: Backbone, keep: Any, num_keep: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        visible(photo(), keep, num_keep=num_keep)


def test_a_mask_says_itself_how_many(ragged: Backbone) -> None:
    with pytest.raises(ConfigError, match="num_keep does not go with a mask"):
        ragged(photo(), mask_of(1, 2), num_keep=[1])


def test_the_same_patch_in_two_images_is_no_double(visible: Backbone) -> None:
    assert visible(np.zeros((2, C, H, W), np.float32), [[0, 1], [1, 0]]).tokens.shape == (2, 2, D)


def test_a_full_graph_takes_no_patches(full: Backbone) -> None:
    with pytest.raises(ConfigError, match="takes every patch") as caught:
        full(photo(), [0, 1])
    assert "--tokens visible" in (caught.value.hint or "")


def test_a_fixed_number_of_patches(tmp_path: Path) -> None:
    with Backbone.load(write_bundle(tmp_path / "b", keep=K)) as backbone:
        assert backbone(photo(), range(K) and list(range(K))).tokens.shape == (1, K, D)
        with pytest.raises(ConfigError, match=f"keep has 3 patches an image, the graph is fixed to {K}"):
            backbone(photo(), [0, 1, 2])
        with pytest.raises(ConfigError, match=f"takes {K} of {N} patches") as caught:
            backbone(photo())
        assert "pass keep" in (caught.value.hint or "")


def test_a_number_fixed_to_all_patches_needs_no_keep(tmp_path: Path) -> None:
    with Backbone.load(write_bundle(tmp_path / "b", keep=N)) as backbone:
        assert_same(backbone(photo()), reference(backbone.preprocess([photo()])))


@pytest.mark.parametrize("keep", [[0], range(10), None])
def test_a_number_of_patches_outside_of_the_profile(tmp_path: Path, keep: Any) -> None:
    with Backbone.load(write_bundle(tmp_path / "b", profile_keep=(2, 4, 9))) as backbone:
        assert backbone(photo(), range(9)).tokens.shape == (1, 9, D)
        with pytest.raises(
            ConfigError, match="checked for 2 to 9" if keep is not None else f"takes 2 to 9 of {N} patches"
        ):
            backbone(photo(), keep)


def test_reconstruction_takes_patches_or_all(tmp_path: Path) -> None:
    images, ids = golden_inputs(visible=True).values()
    with Backbone.load(write_bundle(tmp_path / "b", token_mode="reconstruct", outputs=("pixels",))) as backbone:
        assert_same(backbone(images, ids), reference(images, ids, outputs=("pixels",)))
        assert_same(backbone(images), reference(images, outputs=("pixels",)))
        assert backbone(photo(), [3, 1]).pixels.shape == (1, N, P * P * C)


# --- rows of unequal length ------------------------------------------------------------------------------------------

ROWS = [[20, 3, 7], [0], [5, 4, 3, 2, 1, 0], [8, 9], list(range(N))]


def ragged_reference(images: Array, rows: list[list[int]], length: int | None = None) -> dict[str, Array]:
    lengths = np.array([len(row) for row in rows])
    ids = np.full((len(rows), length or max(lengths)), -1)
    for padded, row in zip(ids, rows, strict=True):
        padded[: len(row)] = row
    return reference(images, ids, lengths)


@pytest.fixture
def ragged(tmp_path: Path) -> Backbone:
    return Backbone.load(write_bundle(tmp_path / "ragged", token_mode="ragged"))


@pytest.mark.parametrize("kind", ["lists", "arrays", "tuple of mixed"])
def test_every_image_has_its_own_number_of_patches(ragged: Backbone, kind: str) -> None:
    images = golden_inputs(visible=False)["images"]
    keep: Any = {
        "lists": ROWS,
        "arrays": [np.array(row, np.uint8) for row in ROWS],
        "tuple of mixed": (np.array(ROWS[0]), *ROWS[1:]),
    }[kind]
    assert_same(ragged(images, keep), ragged_reference(images, ROWS))


def test_a_ragged_image_is_what_it_is_alone(ragged: Backbone) -> None:
    images = golden_inputs(visible=False)["images"]
    together = ragged(images, ROWS)
    for index, row in enumerate(ROWS):
        alone = ragged(images[index : index + 1], row)
        np.testing.assert_allclose(together.tokens[index, : len(row)], alone.tokens[0], atol=ATOL)
        assert not together.tokens[index, len(row) :].any()
        np.testing.assert_allclose(together.cls[index], alone.cls[0], atol=ATOL)


@pytest.mark.parametrize("keep", [[20, 0, 7], np.array([[20, 0, 7]] * 5), None])
def test_a_ragged_graph_takes_even_rows_one_row_and_none(ragged: Backbone, keep: Any) -> None:
    images = golden_inputs(visible=False)["images"]
    assert_same(ragged(images, keep), ragged_reference(images, [list(range(N)) if keep is None else [20, 0, 7]] * 5))


def test_padded_rows_of_the_caller_may_hold_anything(ragged: Backbone) -> None:
    images = golden_inputs(visible=False)["images"][:3]
    keep = np.array([[20, 3, 7, -5], [0, 2**63 - 1, 0, -(2**63)], [5, 4, 5, 5]])
    rows = [[20, 3, 7], [0], [5, 4]]
    assert_same(ragged(images, keep, num_keep=[3, 1, 2]), ragged_reference(images, rows, length=4))
    assert_same(
        ragged(images, keep.astype(np.uint64), num_keep=np.array([3, 1, 2], np.int8)),
        ragged_reference(images, rows, length=4),
    )


@pytest.mark.parametrize("batch", [None, 2])
def test_a_fixed_padded_length(tmp_path: Path, batch: int | None) -> None:
    images, rows = golden_inputs(visible=False)["images"], [row[:6] for row in ROWS]
    with Backbone.load(write_bundle(tmp_path / "b", token_mode="ragged", keep=8, batch=batch)) as backbone:
        assert_same(backbone(images, rows), ragged_reference(images, rows, length=8))
        assert_same(backbone(images, [3, 1]), ragged_reference(images, [[3, 1]] * 5, length=8))
        with pytest.raises(ConfigError, match="keep has 21 patches an image, the graph is fixed to 8") as caught:
            backbone(images, ROWS)
        assert caught.value.hint == "export with --tokens ragged for any number"
        with pytest.raises(ConfigError, match="keep has 7 patches an image, the graph is fixed to 8"):
            backbone(images, np.zeros((5, 7), int), num_keep=[1] * 5)
        with pytest.raises(ConfigError, match=f"takes 1 to 8 of {N} patches"):
            backbone(images)


@pytest.mark.parametrize(
    ("keep", "num_keep", "message"),
    [
        ([[0, 1], [1]], None, "1 patches an image, the graph was checked for 2 to 9"),
        ([[0, 1], list(range(10))], None, "10 patches an image, the graph was checked for 2 to 9"),
        ([[0, 1], []], None, "keep has 2 rows for 2 images"),
        ([[0, 1], [2, 3, 4], [5, 6]], None, "keep has 3 rows for 2 images"),
        ([[0, 1], [2, 3, N]], None, f"the patch {N}"),
        ([[0, 1, 1], [2, 3]], None, "the patch 1 twice"),
        ([[0, 1], [2.5, 3, 4]], None, "whole numbers, not float64"),
        ([[0, 1], [[2], [3], [4]]], None, "keep has 2 rows for 2 images"),
        ([[0, 1], 2], None, "not a list of whole numbers"),
        ([[0, 1, -1], [2, 3, -1]], [3, 2], "the patch -1"),
        ([[0, 1, 0], [2, 3, -1]], [3, 2], "the patch 0 twice"),
        ([[0, 1, 9], [2, 3, 9]], [4, 2], "num_keep has 4 for rows of 3"),
        ([[0, 1, 9], [2, 3, 9]], [0, 2], "num_keep has 0 for rows of 3"),
        ([[0, 1, 9], [2, 3, 9]], [1, 2], "1 patches an image, the graph was checked for 2 to 9"),
        ([[0, 1, 9], [2, 3, 9]], [2], r"num_keep \(1,\) for 2 images"),
        ([[0, 1, 9], [2, 3, 9]], 2, r"num_keep \(\) for 2 images"),
        ([[0, 1, 9], [2, 3, 9]], [2.0, 2.0], "num_keep must be whole numbers, not float64"),
        ([[0, 1, 9], [2, 3]], [2, 2], "keep is not a list of whole numbers"),
        ([0, 1, 9], [2, 2], r"keep has the shape \(3,\)"),
        ([[0] * 10] * 2, [2, 2], "10 patches an image, the graph was checked for 2 to 9"),
        (None, [2, 2], "num_keep without keep"),
    ],
)
def test_ragged_patches_that_cannot_be_taken(tmp_path: Path, keep: Any, num_keep: Any, message: str) -> None:
    backbone = Backbone.load(write_bundle(tmp_path / "b", token_mode="ragged", profile_keep=(2, 4, 9)))
    with pytest.raises(ConfigError, match=message):
        backbone(np.zeros((2, C, H, W), np.float32), keep, num_keep=num_keep)


def test_other_graphs_name_the_ragged_mode(visible: Backbone, full: Backbone) -> None:
    images = np.zeros((2, C, H, W), np.float32)
    for backbone, keep, num_keep in (
        (visible, [[0, 1], [2]], None),
        (visible, [[0, 1], [2, 3]], [1, 2]),
        (full, None, [1, 2]),
    ):
        with pytest.raises(ConfigError) as caught:
            backbone(images, keep, num_keep=num_keep)
        assert "--tokens ragged" in (caught.value.hint or "")


# --- images in the form of the graph ---------------------------------------------------------------------------------


@pytest.mark.parametrize("images", ["float16", "uint8"])
def test_graphs_that_take_other_images(tmp_path: Path, images: str, full: Backbone) -> None:
    batch = [photo(seed=seed) for seed in range(3)]
    with Backbone.load(write_bundle(tmp_path / "b", token_mode="full", images=images, batch=2)) as backbone:
        found = backbone(batch)
        # Normalised values of up to 3 have 1e-3 in float16.
        assert all(
            np.abs(found[name] - array).max() < (1e-5 if images == "uint8" else 2e-2)
            for name, array in full(batch).items()
        )
        pixels = np.stack([full.preprocess.crop(Image.fromarray(image)) for image in batch])
        assert_same(backbone.run_cropped(pixels), dict(found))


def test_a_graph_of_uint8_gets_the_pixels_untouched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        pytest.fail("pixels were normalised")

    with Backbone.load(write_bundle(tmp_path / "b", token_mode="full", images="uint8")) as backbone:
        seen: list[Array] = []
        run = backbone.engine.run

        def spy(inputs: dict[str, Array], outputs: tuple[str, ...]) -> dict[str, Array]:
            seen.append(inputs["images"])
            return run(inputs, outputs)

        monkeypatch.setattr(backbone.engine, "run", spy)
        monkeypatch.setattr(Preprocess, "normalise", never)
        backbone(photo(H, W))
        np.testing.assert_array_equal(seen[0], photo(H, W)[None], strict=True)
        for dtype in (np.float32, np.float16):
            with pytest.raises(ConfigError, match="this bundle's graph normalises them itself") as caught:
                backbone(np.zeros((1, C, H, W), dtype))
            assert "uint8" in (caught.value.hint or "")


def test_normalised_images_of_either_precision(tmp_path: Path, full: Backbone) -> None:
    images = golden_inputs(visible=False)["images"]
    halves = images.astype(np.float16)
    assert_same(full(halves), reference(halves))
    with Backbone.load(write_bundle(tmp_path / "b", token_mode="full", images="float16")) as backbone:
        assert_same(backbone(images), reference(halves))
        assert_same(backbone(halves), reference(halves))
        with pytest.raises(ConfigError, match="float16 images have the shape"):
            backbone(halves[0])


@pytest.mark.parametrize("batch", [None, 2])
def test_half_precision_outputs_stay_so(tmp_path: Path, batch: int | None) -> None:
    with Backbone.load(write_bundle(tmp_path / "b", token_mode="ragged", features="float16", batch=batch)) as backbone:
        assert {array.dtype for array in backbone([photo()] * 3, [[0], [1, 2], [3]]).values()} == {np.dtype(np.float16)}


# --- batch, outputs, life --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("total", [1, 2, 3, 5])
@pytest.mark.parametrize("keep", [None, "rows"])
def test_a_fixed_batch_takes_any_number_of_images(tmp_path: Path, total: int, keep: str | None) -> None:
    inputs = {name: array[:total] for name, array in golden_inputs(visible=True).items()}
    with Backbone.load(write_bundle(tmp_path / "b", batch=2)) as backbone:
        found = backbone(inputs["images"], inputs["ids_keep"] if keep else None)
    assert_same(found, reference(inputs["images"], inputs["ids_keep"] if keep else None))


def test_outputs_by_name(full: Backbone) -> None:
    assert list(full(photo(), outputs=["pooled"])) == ["pooled"]
    with pytest.raises(ConfigError, match="no output 'depth'") as caught:
        full(photo(), outputs=["depth"])
    assert "cls, tokens, pooled, logits" in (caught.value.hint or "")


def test_features_are_attributes(full: Backbone) -> None:
    features = full(photo())
    assert features.cls is features["cls"]
    assert "pooled" in dir(features)
    with pytest.raises(AttributeError, match="no output 'feature_map'; there are: cls, tokens, pooled, logits"):
        _ = features.feature_map
    assert_same(pickle.loads(pickle.dumps(features)), dict(features))
    assert_same(copy.deepcopy(features), dict(features))


def test_closing(full_bundle: Path) -> None:
    with Backbone.load(str(full_bundle)) as backbone:
        backbone(photo())
    backbone.close()
    with pytest.raises(MaeDeployError, match="closed"):
        backbone(photo())


def test_load_passes_its_arguments_on(full_bundle: Path) -> None:
    with pytest.raises(ConfigError, match="unknown engine 'abacus'"):
        Backbone.load(full_bundle, "abacus")
    with pytest.raises(ConfigError, match="unknown device 'tpu'"):
        Backbone.load(full_bundle, device="tpu")
    with pytest.raises(ConfigError, match="threads"):
        Backbone.load(full_bundle, threads=0)
