"""A manifest is read strictly: what is missing, of a wrong type or contradictory is refused with its name."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from mae_deploy.errors import ConfigError
from mae_deploy.runtime.check_manifest import validate_manifest
from mae_deploy.runtime.manifest import Manifest, follows_keep, read_preprocess
from tests.runtime.tensorrt.planned_bundle import planned
from tests.runtime.tiny_bundle import MORE_OUTPUTS, OUTPUTS, write_bundle


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = write_bundle(tmp_path_factory.mktemp("manifest") / "bundle", keep=4)
    loaded: dict[str, Any] = json.loads((path / "manifest.json").read_text())
    return loaded


def changed(manifest: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy with the dotted key set to `value`; numbers index lists."""
    manifest = copy.deepcopy(manifest)
    target: Any = manifest
    *parents, last = [int(part) if part.isdigit() else part for part in key.split("/")]
    for part in parents:
        target = target[part]
    target[last] = value
    return manifest


def test_a_valid_manifest_is_returned_as_it_is(valid: dict[str, Any]) -> None:
    assert validate_manifest(valid) is valid


def test_unknown_keys_are_left_alone(valid: dict[str, Any]) -> None:
    assert validate_manifest({**valid, "later": 1})["token_mode"] == "visible"


@pytest.mark.parametrize("key", sorted(Manifest.__required_keys__ - {"schema_version"}))
def test_every_key_is_needed(valid: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=f"'{key}' is missing"):
        validate_manifest({name: value for name, value in valid.items() if name != key})


def test_a_nested_key_is_needed(valid: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"'model\.embed_dim' is missing"):
        validate_manifest(
            changed(valid, "model", {key: value for key, value in valid["model"].items() if key != "embed_dim"})
        )


@pytest.mark.parametrize("version", [None, 0, 1, True, "2", 2.0])
def test_no_schema_version_that_is_known(valid: dict[str, Any], version: Any) -> None:
    with pytest.raises(ConfigError, match="schema version") as caught:
        validate_manifest({**valid, "schema_version": version})
    assert caught.value.hint == "export the bundle again"


def test_a_newer_schema_asks_for_an_upgrade(valid: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="schema version 3") as caught:
        validate_manifest({"schema_version": 3})
    assert caught.value.hint is not None
    assert "--upgrade" in caught.value.hint


@pytest.mark.parametrize("value", [None, [], "text", 3])
def test_not_a_mapping(value: Any) -> None:
    with pytest.raises(ConfigError, match="must be a mapping"):
        validate_manifest(value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("created", 3, "'created' must be str, not 3"),
        ("kind", "detector", "'kind' must be"),
        ("model", [], "'model' must be"),
        ("model/depth", 1.5, r"'model\.depth' must be int"),
        ("model/depth", True, r"'model\.depth' must be int"),
        ("model/mlp_ratio", "4", r"'model\.mlp_ratio' must be float"),
        ("model/image_size", [6, "14"], r"'model\.image_size\[1\]' must be int"),
        ("class_names", [1], "'class_names' must be"),
        ("token_mode", "masked", "'token_mode' must be .*'full', 'visible', 'ragged', 'reconstruct'.*'masked'"),
        ("token_mode", [], "'token_mode' must be"),
        ("precision", "int4", "'precision' must be .*'int4'"),
        ("typing", "loose", "'typing' must be"),
        ("engine", "tflite", "'engine' must be"),
        ("quantization", "int8", r"'quantization' must be dict\[str, Any\] \| null"),
        ("profile", None, "'profile' must be"),
        ("profile/B", 4, r"profile\['B'\]' must be list\[int\]"),
        ("profile/K", [4, "4", 4], r"profile\['K'\]\[1\]' must be int"),
        ("graph/blocks", "block", r"'graph\.blocks' must be list\[str\]"),
        ("tolerance/sqnr_db", "30", r"'tolerance\.sqnr_db' must be float \| null"),
        ("batch", "2", "'batch' must be int | null"),
        ("graph/outputs/1", "tokens", r"'graph\.outputs\[1\]' must be"),
        ("graph/inputs/0/shape", [None], r"'graph\.inputs\[0\]\.shape\[0\]' must be"),
        ("provenance", None, "'provenance' must be"),
        ("engines", {}, "'engines' must be"),
        ("files/encoder.onnx", "sum", r"files\['encoder\.onnx'\]' must be"),
        ("files/encoder.onnx/size", None, r"size' must be int"),
        ("preprocess/mean", 0.5, r"'preprocess\.mean' must be"),
        ("preprocess/image_size", [6, 14, 3], r"'preprocess\.image_size' must be"),
        ("preprocess/interpolation", "cubic", r"'preprocess\.interpolation' must be .*'lanczos'.*, not 'cubic'"),
        ("preprocess/crop_mode", "centre", r"'preprocess\.crop_mode' must be .*'squash'.*, not 'centre'"),
        ("preprocess/padding", 3, "unknown preprocessing 'padding'"),
        ("preprocess/pixel_max", "255", r"'preprocess\.pixel_max' must be float \| null"),
        ("preprocess/pixel_max", 0, "pixel_max 0 must be above 0"),
        ("model/band_groups", [[0, 1], 2], r"'model\.band_groups\[1\]' must be list\[int\]"),
        ("tolerance/cosine", "high", r"'tolerance\.cosine' must be float \| null"),
    ],
)
def test_wrong_types(valid: dict[str, Any], key: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate_manifest(changed(valid, key, value))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_patches", 20, "num_patches is 20"),
        (
            "model/band_groups",
            [[0, 1], [2]],
            r"num_patches is 21, but image size \[6, 14\] has 42 patches of 2 in 2 groups of bands",
        ),
        (
            "model/band_groups",
            [[0, 1], [1]],
            r"the groups of bands \[\[0, 1\], \[1\]\] do not have each of 3 channels once",
        ),
        ("model/image_size", [6], "image size"),
        ("model/image_size", [6, 0], "image size"),
        ("model/patch_size", 0, "patch size 0"),
        ("model/patch_size", 4, "multiples of the patch size 4"),
        ("preprocess/image_size", [14, 6], "preprocess makes"),
        ("batch", 0, "batch 0"),
        ("batch", 3, r"the profile \[1, 8, 32\] of B does not fit its fixed size 3"),
        ("keep", 22, "keep 22"),
        ("keep", 0, "keep 0"),
        ("keep", 5, r"the profile \[4, 4, 4\] of K does not fit its fixed size 5"),
        ("token_mode", "full", "keep 4 does not fit token mode 'full'"),
        ("token_mode", "ragged", "has the inputs images, ids_keep, num_keep, not images, ids_keep"),
        ("profile", {"B": [1, 8, 32]}, "the profile of token mode 'visible' is of B, K, not of B"),
        ("profile", {"B": [1, 8, 32], "K": [4, 4, 4], "H": [1, 1, 1]}, "not of B, K, H"),
        ("profile/B", [1, 8], "is not a smallest, usual and largest size"),
        ("profile/B", [0, 8, 32], "is not a smallest, usual and largest size"),
        ("profile/B", [8, 1, 32], "is not a smallest, usual and largest size"),
        ("precision", "int8", "precision int8 without a record of quantization"),
        ("precision", "fp8", "precision fp8 without a record of quantization"),
        ("quantization", {"policy": "static"}, "precision fp32 with a record of quantization"),
        ("graph/inputs/1/name", "keep", "has the inputs"),
        ("graph/inputs/1/dtype", "int32", "the input ids_keep is int32"),
        ("graph/inputs/1/shape", ["B", "K"], r"the input ids_keep is int64 \['B', 'K'\], not int64 \['B', 4\]"),
        ("graph/inputs/0/dtype", "float64", "the input images cannot be float64"),
        ("graph/inputs/0/dtype", "uint8", r"the input images is uint8 \['B', 3, 6, 14\], not uint8 \['B', 6, 14, 3\]"),
        ("graph/inputs/0/shape", ["B", 6, 14, 3], "the input images is float32"),
        (
            "graph/inputs/0/shape",
            [1, 3, 6, 14],
            r"the input images is float32 \[1, 3, 6, 14\], not float32 \['B', 3, 6, 14\]",
        ),
        ("graph/inputs/0/shape", ["B", 3, 6], "the input images is float32"),
        ("graph/outputs", [], "outputs"),
        ("graph/outputs/0/name", "tokens", "outputs"),
        ("graph/outputs/0/name", "images", "outputs"),
        ("graph/outputs/0/name", "block_2", "there is no block_2 in 2 blocks"),
        ("graph/outputs/0/name", "block_1", r"the output block_1 has the shape \['B', 13\], not \['B', 4, 13\]"),
        ("graph/outputs/0/name", "feature_map", r"the output feature_map has the shape .*, not \['B', 13, 3, 7\]"),
        ("graph/outputs/0/name", "pixels", r"the output pixels has the shape .*, not \['B', 21, 12\]"),
        ("graph/outputs/0/name", "p3", r"the output p3 has the shape .*, not \['B', 'channels', 'height', 'width'\]"),
        ("graph/outputs/0/shape", ["B", 14], "the output cls has the shape"),
        ("graph/outputs/1/shape", ["B", "K", 13], r"the output tokens has the shape .*, not \['B', 4, 13\]"),
        ("graph/outputs/3/shape", ["B", "classes"], "the output logits has the shape"),
        ("graph/outputs/0/dtype", "float64", "the output cls is float64"),
        ("graph/blocks", ["one"], "graph.blocks has 1 names for 2 blocks"),
        ("graph/blocks", ["one", "one"], "graph.blocks has 1 names for 2 blocks"),
        ("model/depth", 3, "graph.blocks has 2 names for 3 blocks"),
        ("class_names", ["one"], r"the output logits has the shape \['B', 11\], not \['B', 1\]"),
        ("graph/file", "other.onnx", r"graph\.file 'other\.onnx' is not listed"),
        ("golden/file", "other.npz", r"golden\.file 'other\.npz' is not listed"),
        ("golden/num_samples", 0, "num_samples 0"),
        ("files/encoder.onnx/sha256", "AB" * 32, "is not a SHA-256"),
        ("files/encoder.onnx/sha256", "ab" * 31, "is not a SHA-256"),
        ("tolerance/colour", 1.0, "unknown tolerance 'colour'"),
        ("tolerance", {}, "no measure covers every output"),
        ("tolerance", {"top1_agreement": 0.99, "cosine": None}, "no measure covers every output"),
        ("tolerance/max_abs", float("inf"), "'tolerance.max_abs' must be float"),
        ("tolerance/max_abs", float("nan"), "'tolerance.max_abs' must be float"),
        ("tolerance/cosine", -1, "cosine -1"),
    ],
)
def test_contradictions(valid: dict[str, Any], key: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate_manifest(changed(valid, key, value))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("file", "engines/other.plan", r"engines\[0\]: 'engines/other\.plan' is not listed in files"),
        ("layers", "engines/none.json", r"engines\[0\]: 'engines/none\.json' is not listed in files"),
        ("tensorrt", "../8.6", "'../8.6' is not a version of TensorRT"),
        ("tensorrt", "eight", "'eight' is not a version of TensorRT"),
        ("compute_capability", [8], r"the compute capability \[8\] is not a major and a minor number"),
        ("compute_capability", ["8", "7"], r"'engines\[0\]\.compute_capability\[0\]' must be int"),
        ("precision", "int4", r"'engines\[0\]\.precision' must be"),
        ("profiles", [], r"engines\[0\] has no profile"),
        ("profiles", [{"B": [1, 2, 3]}], "does not give a smallest, usual and largest B and K"),
        ("profiles", [{"B": [1, 2, 3], "K": [4, 4]}], "does not give a smallest, usual and largest"),
        ("profiles", [{"B": [3, 2, 1], "K": [4, 4, 4]}], "does not give a smallest, usual and largest"),
        ("profiles", [{"B": [0, 2, 3], "K": [4, 4, 4]}], "does not give a smallest, usual and largest"),
        ("hardware_compatible", "turing", r"'engines\[0\]\.hardware_compatible' must be"),
    ],
)
def test_engines_that_contradict_the_manifest(tmp_path: Path, key: str, value: Any, message: str) -> None:
    manifest = json.loads((planned(tmp_path / "b", keep=4).path / "manifest.json").read_text())
    assert validate_manifest(manifest)["engines"]
    with pytest.raises(ConfigError, match=message):
        validate_manifest(changed(manifest, f"engines/0/{key}", value))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("graph/inputs/0/dtype", "float16"),
        ("graph/outputs/0/dtype", "float16"),
        ("graph/outputs/0/name", "embedding"),
        ("graph/blocks", []),
        ("tolerance", {"sqnr_db": 30, "cosine": None}),
        ("class_names", None),
    ],
)
def test_what_is_left_open(valid: dict[str, Any], key: str, value: Any) -> None:
    validate_manifest(changed(valid, key, value))


@pytest.mark.parametrize("token_mode", ["full", "visible", "ragged", "reconstruct"])
@pytest.mark.parametrize(("batch", "keep", "images"), [(None, None, "uint8"), (2, 4, "float32")])
def test_every_token_mode_is_valid(
    tmp_path: Path, token_mode: str, batch: int | None, keep: int | None, images: str
) -> None:
    keep = None if token_mode == "full" else keep
    path = write_bundle(
        tmp_path / "b", token_mode=token_mode, batch=batch, keep=keep, images=images, outputs=(*OUTPUTS, *MORE_OUTPUTS)
    )
    assert validate_manifest(json.loads((path / "manifest.json").read_text()))["token_mode"] == token_mode


def test_a_profile_of_more_patches_than_there_are(valid: dict[str, Any]) -> None:
    loose = changed(changed(valid, "keep", None), "profile/K", [1, 4, 22])
    with pytest.raises(ConfigError, match=r"the profile \[1, 4, 22\] of K has more than 21 patches"):
        validate_manifest(loose)


@pytest.mark.parametrize(
    ("name", "follows"),
    [("tokens", True), ("block_0", True), ("block_11", True), ("cls", False), ("block_", False), ("block_01", False)],
)
def test_which_outputs_follow_ids_keep(name: str, follows: bool) -> None:
    assert follows_keep(name) == follows


def test_whole_numbers_are_numbers(valid: dict[str, Any]) -> None:
    assert validate_manifest(changed(valid, "model/mlp_ratio", 4))["model"]["mlp_ratio"] == 4


def test_a_missing_preprocessing_field_takes_no_default(valid: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"'preprocess\.mean' is missing"):
        read_preprocess({key: value for key, value in valid["preprocess"].items() if key != "mean"})


def test_preprocessing_is_read_back_as_it_was_written(valid: dict[str, Any]) -> None:
    preprocess = read_preprocess(valid["preprocess"])
    assert preprocess.image_size == (6, 14)
    assert (preprocess.mean, preprocess.std) == ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    assert (preprocess.crop_pct, preprocess.interpolation, preprocess.channels) == (1.0, "bilinear", 3)


def test_pixels_of_more_than_eight_bits_are_said_to_be_such(valid: dict[str, Any]) -> None:
    """Manifests of older versions do not know of them."""
    assert read_preprocess(valid["preprocess"]).divisor == 255
    assert read_preprocess({**valid["preprocess"], "pixel_max": 10000}).divisor == 10000


def test_a_manifest_without_a_crop_mode_means_the_centre(valid: dict[str, Any]) -> None:
    assert "crop_mode" not in valid["preprocess"]
    assert read_preprocess(valid["preprocess"]).crop_mode == "center"
    assert read_preprocess({**valid["preprocess"], "crop_mode": "letterbox"}).crop_mode == "letterbox"


def test_a_manifest_that_is_no_json(tmp_path: Path) -> None:
    from mae_deploy.runtime import Bundle

    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ConfigError, match=r"cannot read .*manifest\.json"):
        Bundle.load(tmp_path)
