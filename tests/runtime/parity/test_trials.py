"""What the golden file holds beside the golden samples: how it is read, judged, and refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mae_deploy.errors import CheckFailed
from mae_deploy.images.read import Array
from mae_deploy.runtime import Bundle
from mae_deploy.runtime.manifest import file_entry
from mae_deploy.runtime.parity.trials import (
    EXTREMES,
    changed_entries,
    exported_array,
    tolerance_of_trial,
    trial_arrays,
    trials,
)
from mae_deploy.runtime.tolerance import TOLERANCES
from mae_deploy.runtime.verify import verify_bundle
from tests.runtime.tiny_bundle import OUTPUTS, N, golden_inputs, reference, write_bundle

Edit = Callable[[dict[str, Array]], Any]


def with_golden(path: Path, **more: Array) -> Bundle:
    """The bundle with more arrays in its golden file."""
    with np.load(path / "golden.npz") as file:
        arrays = {**file, **more}
    np.savez(path / "golden.npz", **arrays)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["golden.npz"] = file_entry(path / "golden.npz")
    (path / "manifest.json").write_text(json.dumps(manifest))
    return Bundle.load(path)


def whole(path: Path, edit: Edit = lambda arrays: None) -> Bundle:
    """A bundle with a trial of all patches of the first two golden images."""
    path = write_bundle(path)
    images = golden_inputs(visible=True)["images"][:2]
    ids = np.tile(np.arange(N), (2, 1))
    arrays = {"ids_keep": ids, **reference(images=images, ids_keep=ids, outputs=tuple(OUTPUTS))}
    edit(arrays)
    return with_golden(path, **trial_arrays("K=21", arrays))


def test_a_trial_without_images_has_the_golden_ones(tmp_path: Path) -> None:
    bundle = whole(tmp_path / "b")
    (trial,) = trials(bundle)
    assert (trial.name, set(trial.expected)) == ("K=21", {*OUTPUTS})
    np.testing.assert_array_equal(trial.inputs["images"], bundle.golden()["images"][:2])
    result = verify_bundle(bundle)
    assert (result.passed, result.trials) == (True, ("K=21",))
    assert [check["check"] for check in result.to_dict()["trials"]] == ["K=21"] * len(OUTPUTS)
    assert not {"K=21"} & {check.name for check in result.invariances}


def test_a_fault_at_another_number_of_patches_is_found(tmp_path: Path) -> None:
    result = verify_bundle(whole(tmp_path / "b", lambda arrays: arrays["tokens"].__iadd__(0.01)))
    assert {check.name for check in result.checks if check.failures} == {"K=21"}
    assert not result.outputs_pass


@pytest.mark.parametrize(
    ("edit", "name"),
    [
        (lambda arrays: arrays.pop("cls"), "cls"),
        (lambda arrays: arrays.update(ids_keep=arrays["ids_keep"].astype(np.int32)), "ids_keep"),
        (lambda arrays: arrays.update(tokens=arrays["tokens"][:1]), "tokens"),
        (lambda arrays: arrays.update(tokens=arrays["tokens"][0]), "tokens"),
    ],
)
def test_what_is_no_trial_is_refused(tmp_path: Path, edit: Edit, name: str) -> None:
    with pytest.raises(CheckFailed, match=f"'{name}' of 'K=21' is missing, or not what the graph takes or gives"):
        list(trials(whole(tmp_path / "b", edit)))


def test_images_that_no_calibration_has_seen_need_only_give_numbers() -> None:
    for precision in ("int8", "fp8"):
        limits = tolerance_of_trial(EXTREMES, precision, TOLERANCES[precision])
        assert limits.to_dict() == {"max_abs": 1e100}
        assert tolerance_of_trial("K=1", precision, TOLERANCES[precision]) is TOLERANCES[precision]
    assert tolerance_of_trial(EXTREMES, "fp16", TOLERANCES["fp16"]) is TOLERANCES["fp16"]


# --- the manifest ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda m: m["preprocess"].update(crop_pct=0.876), "preprocess.crop_pct is 0.876, at export it was "),
        (lambda m: m.update(class_names=["a", "b"]), 'class_names is ["a", "b"], at export it was '),
        (lambda m: m["tolerance"].update(max_abs=1.0), "tolerance.max_abs is 1.0, at export it was 0.0001"),
        (lambda m: m["model"].update(mlp_ratio=2.5), "model.mlp_ratio is 2.5, at export it was "),
        (lambda m: m.update(licence="MIT"), 'licence is "MIT", at export it was '),
    ],
)
def test_what_was_changed_since_the_export_is_named(tmp_path: Path, edit: Callable[[Any], Any], said: str) -> None:
    write_bundle(tmp_path / "b")
    bundle = with_golden(tmp_path / "b", **exported_array(Bundle.load(tmp_path / "b").manifest))
    assert changed_entries(bundle) == []
    assert verify_bundle(bundle).passed
    edit(bundle.manifest)
    (line,) = changed_entries(bundle)
    assert line.startswith(said)
    assert verify_bundle(bundle).failures == [f"manifest: {line}"]


def test_what_later_commands_change_is_no_change(tmp_path: Path) -> None:
    write_bundle(tmp_path / "b")
    bundle = with_golden(tmp_path / "b", **exported_array(Bundle.load(tmp_path / "b").manifest))
    bundle.manifest["parity"] = {"tensorrt-fp16": {}}
    bundle.manifest["files"]["README.md"] = {"sha256": "0" * 64, "size": 1}
    assert changed_entries(bundle) == []


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[]"])
def test_a_record_that_cannot_be_read(tmp_path: Path, content: bytes) -> None:
    bundle = with_golden(write_bundle(tmp_path / "b"), exported=np.frombuffer(content, np.uint8))
    assert changed_entries(bundle) == ["golden.npz does not tell what was exported"]


def test_bundles_of_older_versions_have_neither(visible_bundle: Path) -> None:
    bundle = Bundle.load(visible_bundle)
    assert (list(trials(bundle)), changed_entries(bundle)) == ([], [])
