"""Streams on an exported bundle: what a caller may give, and what the cache holds afterwards."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mae_deploy.cli import main
from mae_deploy.errors import CheckFailed, ConfigError
from mae_deploy.images.read import Array
from mae_deploy.runtime.backbone import Backbone
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.cache import take_patches
from mae_deploy.runtime.check_manifest import validate_manifest
from mae_deploy.runtime.manifest import GOLDEN_FILE, MANIFEST_FILE, file_entry
from mae_deploy.runtime.verify import verify_bundle
from tests.export.tiny_exports import CLASS_NAMES, write_checkpoint
from tests.models.tiny_models import ENCODER, tiny_classifier

N, P = ENCODER.num_patches, ENCODER.patch
FRAMES = np.random.default_rng(0).integers(0, 256, (4, *ENCODER.image_size, 3), np.uint8)


def export(checkpoint: Path, out: Path, *options: str) -> None:
    assert main(["export", str(checkpoint), "--out", str(out), *options]) == 0


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`cached`, `fixed` (K = 4, two streams) and `full`, of one classifier of the mean."""
    root = tmp_path_factory.mktemp("streams")
    checkpoint = write_checkpoint(root / "checkpoint", tiny_classifier("avg"), class_names=CLASS_NAMES)
    for name, options in {
        "cached": ["--tokens", "cached"],
        "fixed": ["--tokens", "cached:4", "--batch", "2", "--images", "uint8"],
        "full": ["--tokens", "full", "--layers", "1"],
    }.items():
        export(checkpoint, root / name, *options)
    return root


def pixels_of(frame: int, keep: Array) -> Array:
    return take_patches(FRAMES[frame : frame + 1], keep[None], P)


def test_take_patches_is_row_major() -> None:
    keep = np.array([[14, 0, 6]])
    patches = take_patches(FRAMES[:1], keep, P)
    for patch, index in zip(patches[0], keep[0], strict=True):
        row, column = divmod(int(index), ENCODER.image_size[1] // P)
        np.testing.assert_array_equal(patch, FRAMES[0, row * P : (row + 1) * P, column * P : (column + 1) * P])


def test_a_stream_remembers_and_gives_the_whole_frame(bundles: Path) -> None:
    everything = np.arange(N)
    with Backbone.load(bundles / "cached") as backbone, Backbone.load(bundles / "full") as whole:
        cache = backbone.new_cache()
        assert not cache.computed.any()
        first = backbone.update(cache, pixels_of(0, everything))
        expected = whole.run_cropped(FRAMES[:1])
        for name in ("logits", "pooled", "block_1"):
            np.testing.assert_allclose(first[name], expected[name], atol=2e-5)
        np.testing.assert_array_equal(cache.tokens, first["block_1"])
        assert cache.computed.all()
        # The patches that changed, as a frame that is changed there and nowhere else: its own context, nearly.
        keep = np.array([3, 11, 2])
        before = cache.tokens.copy()
        second = backbone.update(cache, pixels_of(1, keep), keep)
        assert second["block_1"].shape == (1, 3, ENCODER.width)
        np.testing.assert_array_equal(cache.tokens[0, keep], second["block_1"][0])
        others = np.setdiff1d(everything, keep)
        np.testing.assert_array_equal(cache.tokens[0, others], before[0, others])
        # `pooled` is of the whole frame: fc_norm of the mean, which `full` computes of tokens of its own.
        assert not np.allclose(second["pooled"], first["pooled"], atol=1e-3)
        cache.tokens[0, others] += np.linspace(-1, 1, ENCODER.width, dtype=np.float32)
        shifted = backbone.update(cache, pixels_of(1, keep), keep)
        np.testing.assert_array_equal(shifted["block_1"], second["block_1"])
        assert not np.allclose(shifted["pooled"], second["pooled"], atol=1e-3)


def test_pooled_is_the_mean_of_the_tokens_of_all_patches_that_were_computed(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tiny_classifier("cls"))
    export(checkpoint, tmp_path / "bundle", "--tokens", "cached")
    with Backbone.load(tmp_path / "bundle") as backbone:
        cache = backbone.new_cache(2)
        for keep in (np.array([[0, 5, 9], [1, 2, 3]]), np.array([[9, 4, 5], [14, 13, 12]])):
            found = backbone.update(cache, take_patches(FRAMES[:2], keep, P), keep)
            for stream in range(2):
                mean = cache.tokens[stream, cache.computed[stream]].mean(axis=0)
                np.testing.assert_allclose(found["pooled"][stream], mean, atol=1e-5)
        assert cache.computed.sum(axis=1).tolist() == [4, 6]


def test_streams_of_a_cache_are_its_memory(bundles: Path) -> None:
    keep = np.arange(N)[::-1].copy()
    with Backbone.load(bundles / "cached") as backbone:
        pool, alone = backbone.new_cache(3), backbone.new_cache()
        expected = backbone.update(alone, pixels_of(2, keep), keep)
        found = backbone.update(pool.streams(1, 2), pixels_of(2, keep), keep)
        np.testing.assert_array_equal(found["logits"], expected["logits"])
        assert pool.computed.sum(axis=1).tolist() == [0, N, 0]
        for name, rows in alone.rows.items():
            np.testing.assert_array_equal(pool.rows[name][1:2], rows)
            assert not pool.rows[name][::2].any()
        pool.clear()
        assert not pool.computed.any()
        assert pool.nbytes == 3 * alone.nbytes


def test_an_image_is_the_first_frame_of_a_stream(bundles: Path) -> None:
    with Backbone.load(bundles / "cached") as backbone, Backbone.load(bundles / "full") as whole:
        for name, values in backbone(FRAMES).items():
            np.testing.assert_allclose(values, whole(FRAMES)[name], atol=2e-5)
        with pytest.raises(ConfigError, match="without earlier frames has to be given all"):
            backbone(FRAMES, keep=[1, 2])


def test_a_graph_of_a_fixed_number_takes_that_number(bundles: Path) -> None:
    keep = np.array([[3, 1, 14, 2], [7, 6, 5, 0]])
    with Backbone.load(bundles / "fixed") as backbone:
        cache = backbone.new_cache(2)
        found = backbone.update(cache, take_patches(FRAMES[:2], keep, P), keep, outputs=["logits"])
        assert list(found) == ["logits"]
        assert cache.computed.sum(axis=1).tolist() == [4, 4]
        assert cache.tokens.any(axis=2).sum(axis=1).tolist() == [4, 4]
        with pytest.raises(ConfigError, match="keep has 3 patches an image, the graph is fixed to 4"):
            backbone.update(cache, take_patches(FRAMES[:2], keep[:, :3], P), keep[:, :3])
        with pytest.raises(ConfigError, match="without earlier frames has to be given all"):
            backbone(FRAMES[:2])
        with pytest.raises(ConfigError, match="3 streams"):
            backbone.new_cache(3)


@pytest.mark.parametrize(
    ("patches", "keep", "message"),
    [
        (np.zeros((1, 2, P, P, 3), np.uint8), [1, 1], "keep has the patch 1 twice"),
        (np.zeros((1, 2, P, P, 3), np.uint8), [1, N], f"keep has the patch {N}"),
        (np.zeros((1, 3, P, P, 3), np.uint8), [1, 2], r"patches are \(1, 3, 2, 2, 3\) for 2 patches of each of 1"),
        (np.zeros((1, 2, P, P, 3), np.int16), [1, 2], "patches are int16"),
        (np.zeros((1, 2, P, P, 4), np.uint8), [1, 2], r"patches are uint8 \(1, 2, 2, 2, 4\)"),
        (np.zeros((1, 2, P * P * 3), np.uint8), [1, 2], r"patches are uint8 \(1, 2, 12\)"),
        (np.zeros((2, 2, P * P * 3), np.float32), [1, 2], r"patches are \(2, 2, 12\) for 2 patches of each of 1"),
    ],
)
def test_what_an_update_cannot_take(bundles: Path, patches: Array, keep: list[int], message: str) -> None:
    with Backbone.load(bundles / "cached") as backbone:
        cache = backbone.new_cache()
        with pytest.raises(ConfigError, match=message):
            backbone.update(cache, patches, keep)
        assert not cache.computed.any()


def test_other_bundles_keep_nothing(bundles: Path) -> None:
    with (
        Backbone.load(bundles / "full") as backbone,
        pytest.raises(ConfigError, match="keeps nothing of earlier frames: its token mode is 'full'"),
    ):
        backbone.new_cache()


def test_normalised_patches_are_those_of_the_pixels(bundles: Path) -> None:
    keep = np.array([4, 9])
    with Backbone.load(bundles / "cached") as backbone:
        pixels = pixels_of(0, keep)
        normalised = backbone.preprocess.normalise_pixels(pixels).reshape(1, 2, -1)
        one, two = (backbone.update(backbone.new_cache(), given, keep) for given in (pixels, normalised))
        for name, values in one.items():
            np.testing.assert_array_equal(two[name], values)


def test_verify_checks_streams(bundles: Path) -> None:
    for name in ("cached", "fixed"):
        verification = verify_bundle(Bundle.load(bundles / name))
        assert verification.passed, verification.failures
        checks = {check.name for check in verification.checks}
        assert {"golden", "run again", "permuted ids_keep", "repeated update"} <= checks
        assert all(check.comparison.max_abs == 0 for check in verification.checks if check.name == "repeated update")


def test_a_planted_fault_is_found(bundles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A runtime that writes keys where values belong."""

    def misplaced(depth: int) -> list[str]:
        return [f"{part}_{index}" for index in range(depth) for part in ("values", "keys")]

    monkeypatch.setattr("mae_deploy.runtime.cache.cache_names", misplaced)
    assert not verify_bundle(Bundle.load(bundles / "fixed")).passed


@pytest.mark.parametrize(
    ("name", "by", "message"),
    [
        ("updates", 1, r"'updates' .* does not divide the 21 patches"),
        ("ids_keep", 5, r"'ids_keep' has 5 to \d+ of \d+ patches"),
        ("ids_keep", -(10**15), "'ids_keep' has -1000000000000000 to"),
    ],
)
def test_golden_updates_must_divide_their_patches(
    bundles: Path, tmp_path: Path, name: str, by: int, message: str
) -> None:
    import shutil

    folder = tmp_path / "bundle"
    shutil.copytree(bundles / "cached", folder)
    with np.load(folder / GOLDEN_FILE) as file:
        arrays = dict(file)
    arrays[name] = arrays[name] + by
    np.savez(folder / GOLDEN_FILE, **arrays)
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    manifest["files"][GOLDEN_FILE] = file_entry(folder / GOLDEN_FILE)
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    with pytest.raises(CheckFailed, match=message):
        Bundle.load(folder).golden()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("keys_1", {"dtype": "float16"}, "the input keys_1 is float16"),
        ("values_0", {"shape": ["B", 5, "R", 5]}, "the input values_0 is float32"),
        ("cache_mask", {"name": "mask"}, "a graph of token mode 'cached' has the inputs"),
        ("patches", {"shape": ["B", "K", 13]}, "the input patches is float32"),
    ],
)
def test_manifests_that_contradict_themselves(
    bundles: Path, name: str, change: dict[str, object], message: str
) -> None:
    manifest = json.loads((bundles / "cached" / MANIFEST_FILE).read_text())
    validate_manifest(manifest)
    next(entry for entry in manifest["graph"]["inputs"] if entry["name"] == name).update(change)
    with pytest.raises(ConfigError, match=message):
        validate_manifest(manifest)


def test_a_graph_for_tensorrt_takes_all_rows(bundles: Path, tmp_path: Path) -> None:
    export(bundles / "checkpoint", tmp_path / "bundle", "--tokens", "cached", "--engine", "trt", "--no-build")
    bundle = Bundle.load(tmp_path / "bundle")
    assert {tuple(entry["shape"]) for entry in bundle.inputs if entry["name"] == "keys_0"} == {(1, 5, 1 + N, 4)}
    assert verify_bundle(bundle, "onnxruntime").passed
    refused = [str(bundles / "checkpoint"), "--out", str(tmp_path / "other"), "--tokens", "cached", "--engine", "trt"]
    assert main(["export", *refused, "--no-build", "--triton", str(tmp_path / "models")]) == 2
    assert not (tmp_path / "other").exists()


def test_new_rows_are_an_output(bundles: Path) -> None:
    manifest = json.loads((bundles / "cached" / MANIFEST_FILE).read_text())
    outputs = manifest["graph"]["outputs"]
    rows = next(entry for entry in outputs if entry["name"] == "new_rows")
    rows["shape"] = ["B", 5, "T", 4]
    with pytest.raises(ConfigError, match="the output new_rows has the shape"):
        validate_manifest(manifest)
    outputs.remove(rows)
    with pytest.raises(ConfigError, match="has no output new_rows"):
        validate_manifest(manifest)
