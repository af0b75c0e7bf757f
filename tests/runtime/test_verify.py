"""A verification passes for what was exported, and fails for every kind of graph that computes something else."""

from __future__ import annotations

import json
from pathlib import Path

import onnxruntime
import pytest

from mae_deploy.errors import CheckFailed, ConfigError
from mae_deploy.runtime import Bundle
from mae_deploy.runtime.verify import Verification, verify_bundle
from tests.runtime.tiny_bundle import OUTPUTS, SAMPLES, K, write_bundle


def checks(result: Verification) -> list[str]:
    return list(dict.fromkeys(check.name for check in result.checks))


def failed(result: Verification) -> set[str]:
    return {check.name for check in result.checks if check.failures}


@pytest.mark.parametrize(
    ("token_mode", "batch", "keep", "expected"),
    [
        ("visible", None, None, ["golden", "run again", "permuted ids_keep", "sample alone"]),
        ("visible", None, 2, ["golden", "run again", "permuted ids_keep", "sample alone"]),
        ("visible", 2, K, ["golden", "run again", "permuted ids_keep", "other neighbours"]),
        ("visible", 7, K, ["golden", "run again", "permuted ids_keep", "other neighbours"]),
        ("visible", 1, 1, ["golden", "run again"]),
        ("full", None, None, ["golden", "run again", "sample alone"]),
        ("full", 3, None, ["golden", "run again", "other neighbours"]),
        ("full", 1, None, ["golden", "run again"]),
    ],
)
def test_what_was_exported_passes(tmp_path: Path, token_mode: str, batch: int | None, keep: int | None, expected: list[str]) -> None:
    path = write_bundle(tmp_path / "b", token_mode=token_mode, batch=batch, keep=keep)
    result = verify_bundle(Bundle.load(path), threads=1)
    assert result.failures == []
    assert result.passed
    assert checks(result) == expected
    assert [check.comparison.name for check in result.outputs] == list(OUTPUTS)
    assert len(result.invariances) == len(OUTPUTS) * (len(expected) - 1)


def test_the_record_is_plain_json(visible_bundle: Path) -> None:
    record = json.loads(json.dumps(verify_bundle(Bundle.load(visible_bundle)).to_dict(), allow_nan=False))
    assert record["passed"] is True
    assert (record["engine"], record["engine_version"], record["device"]) == ("onnxruntime", onnxruntime.__version__, "cpu")
    assert record["num_samples"] == SAMPLES
    assert record["tolerance"] == {"cosine": 0.99999, "max_abs": 1e-4}
    assert {row["name"]: row["passed"] for row in record["outputs"]} == dict.fromkeys(OUTPUTS, True)
    assert all(row["max_abs"] < 1e-5 and row["check"] == "golden" for row in record["outputs"])
    assert record["failures"] == []


def test_other_weights_with_the_right_hash_fail(tmp_path: Path) -> None:
    result = verify_bundle(Bundle.load(write_bundle(tmp_path / "b", weights_seed=1)))
    assert not result.passed
    assert result.to_dict()["passed"] is False
    assert failed(result) == {"golden"}
    assert {check.comparison.name for check in result.outputs if check.failures} == set(OUTPUTS)
    assert any(line.startswith("golden: cls: cosine") for line in result.failures)


def test_patches_off_by_one_fail(tmp_path: Path) -> None:
    result = verify_bundle(Bundle.load(write_bundle(tmp_path / "b", flaw="off_by_one")))
    assert failed(result) == {"golden"}


@pytest.mark.parametrize(
    ("flaw", "broken"),
    [("batch", {"sample alone"}), ("order", {"permuted ids_keep"})],
)
def test_a_broken_invariance_fails_although_the_golden_outputs_agree(tmp_path: Path, flaw: str, broken: set[str]) -> None:
    result = verify_bundle(Bundle.load(write_bundle(tmp_path / "b", flaw=flaw, golden_of_graph=True)))
    assert failed(result) == broken
    assert not result.passed
    assert {check.comparison.name for check in result.invariances if check.failures} == set(OUTPUTS)


def test_a_fixed_batch_whose_samples_influence_one_another_fails(tmp_path: Path) -> None:
    result = verify_bundle(Bundle.load(write_bundle(tmp_path / "b", flaw="batch", batch=2)))
    assert "other neighbours" in failed(result)


def test_a_random_draw_in_the_graph_fails(tmp_path: Path) -> None:
    assert "run again" in failed(verify_bundle(Bundle.load(write_bundle(tmp_path / "b", flaw="random"))))


def test_nan_outputs_fail_everywhere(tmp_path: Path) -> None:
    result = verify_bundle(Bundle.load(write_bundle(tmp_path / "b", flaw="nan")))
    assert failed(result) == set(checks(result))
    assert any("NaN or infinite" in line for line in result.failures)


def test_nan_golden_outputs_are_no_agreement(tmp_path: Path) -> None:
    result = verify_bundle(Bundle.load(write_bundle(tmp_path / "b", flaw="nan", golden_of_graph=True)))
    assert "golden" in failed(result)


def test_a_tight_tolerance_of_the_bundle_is_used(tmp_path: Path) -> None:
    path = write_bundle(tmp_path / "b", change=lambda manifest: manifest.update(tolerance={"cosine": 0.9, "max_abs": 1.0, "sqnr_db": 1000.0}))
    result = verify_bundle(Bundle.load(path))
    assert any("sqnr_db" in line for line in result.failures)


def test_every_listed_file_is_checked_even_one_that_no_engine_reads(tmp_path: Path) -> None:
    path = write_bundle(tmp_path / "b", change=lambda manifest: manifest["files"].update({"notes.txt": manifest["files"]["golden.npz"]}))
    (path / "notes.txt").write_text("other")
    with pytest.raises(CheckFailed, match=r"notes\.txt is not the file"):
        verify_bundle(Bundle.load(path))


def test_an_unknown_engine(visible_bundle: Path) -> None:
    with pytest.raises(ConfigError, match="unknown engine"):
        verify_bundle(Bundle.load(visible_bundle), "abacus")
