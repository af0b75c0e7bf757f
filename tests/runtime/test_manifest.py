"""A manifest is read strictly: what is missing, of a wrong type or contradictory is refused with its name."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from mae_deploy.errors import ConfigError
from mae_deploy.runtime.manifest import Manifest, read_preprocess, validate_manifest
from tests.runtime.tiny_bundle import write_bundle


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


@pytest.mark.parametrize("key", [key for key in Manifest.__annotations__ if key != "schema_version"])
def test_every_key_is_needed(valid: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=f"'{key}' is missing"):
        validate_manifest({name: value for name, value in valid.items() if name != key})


def test_a_nested_key_is_needed(valid: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"'model\.embed_dim' is missing"):
        validate_manifest(changed(valid, "model", {key: value for key, value in valid["model"].items() if key != "embed_dim"}))


@pytest.mark.parametrize("version", [None, 0, True, "1", 1.0])
def test_no_schema_version_that_is_known(valid: dict[str, Any], version: Any) -> None:
    with pytest.raises(ConfigError, match="schema version") as caught:
        validate_manifest({**valid, "schema_version": version})
    assert caught.value.hint == "export the bundle again"


def test_a_newer_schema_asks_for_an_upgrade(valid: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="schema version 2") as caught:
        validate_manifest({"schema_version": 2})
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
        ("token_mode", "ragged", "'token_mode' must be .*'full', 'visible'.*'ragged'"),
        ("token_mode", [], "'token_mode' must be"),
        ("batch", "2", "'batch' must be int | null"),
        ("graph/outputs/1", "tokens", r"'graph\.outputs\[1\]' must be"),
        ("graph/inputs/0/shape", [None], r"'graph\.inputs\[0\]\.shape\[0\]' must be"),
        ("provenance", None, "'provenance' must be"),
        ("engines", {}, "'engines' must be"),
        ("files/encoder.onnx", "sum", r"files\['encoder\.onnx'\]' must be"),
        ("files/encoder.onnx/size", None, r"size' must be int"),
        ("preprocess/mean", 0.5, r"'preprocess\.mean' must be"),
        ("preprocess/image_size", [6, 14, 3], r"'preprocess\.image_size' must be"),
        ("preprocess/interpolation", "cubic", "interpolation 'cubic'"),
        ("preprocess/padding", 3, "unknown preprocessing 'padding'"),
        ("tolerance/cosine", "high", r"'tolerance\.cosine' must be float"),
    ],
)
def test_wrong_types(valid: dict[str, Any], key: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate_manifest(changed(valid, key, value))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_patches", 20, "num_patches is 20"),
        ("model/image_size", [6], "image size"),
        ("model/image_size", [6, 0], "image size"),
        ("model/patch_size", 0, "patch size 0"),
        ("model/patch_size", 4, "multiples of the patch size 4"),
        ("preprocess/image_size", [14, 6], "preprocess makes"),
        ("batch", 0, "batch 0"),
        ("keep", 22, "keep 22"),
        ("keep", 0, "keep 0"),
        ("token_mode", "full", "keep 4 does not fit token mode 'full'"),
        ("graph/inputs/1/name", "keep", "has the inputs"),
        ("graph/inputs/0/dtype", "float16", "has the inputs"),
        ("graph/inputs/0/shape", ["B", 6, 14, 3], "input shape"),
        ("graph/outputs", [], "outputs"),
        ("graph/outputs/0/name", "tokens", "outputs"),
        ("graph/outputs/0/name", "images", "outputs"),
        ("class_names", ["one"], "1 class names"),
        ("graph/file", "other.onnx", r"graph\.file 'other\.onnx' is not listed"),
        ("golden/file", "other.npz", r"golden\.file 'other\.npz' is not listed"),
        ("golden/num_samples", 0, "num_samples 0"),
        ("files/encoder.onnx/sha256", "AB" * 32, "is no SHA-256"),
        ("files/encoder.onnx/sha256", "ab" * 31, "is no SHA-256"),
        ("tolerance/colour", 1.0, "unknown tolerance 'colour'"),
        ("tolerance/max_abs", float("inf"), "max_abs inf"),
        ("tolerance/max_abs", float("nan"), "max_abs nan"),
        ("tolerance/cosine", -1, "cosine -1"),
    ],
)
def test_contradictions(valid: dict[str, Any], key: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate_manifest(changed(valid, key, value))


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


def test_a_manifest_that_is_no_json(tmp_path: Path) -> None:
    from mae_deploy.runtime import Bundle

    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ConfigError, match=r"cannot read .*manifest\.json"):
        Bundle.load(tmp_path)
