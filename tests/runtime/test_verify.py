"""A verification passes for what was exported, and fails for every kind of graph that computes something else."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from mae_deploy.errors import CheckFailed, ConfigError
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.images.read import Array
from mae_deploy.reporting.bundles import verification_table
from mae_deploy.runtime import Bundle
from mae_deploy.runtime.engines.base import EngineOptions
from mae_deploy.runtime.parity.checks import AS_EXPORTED, PREPROCESSING, Verification, verify_engine
from mae_deploy.runtime.parity.invariances import other_lengths, samples_alone, variations
from mae_deploy.runtime.parity.own_noise import noise_record
from mae_deploy.runtime.registry import load_engine
from mae_deploy.runtime.verify import verify_bundle
from tests.runtime.tiny_bundle import MORE_OUTPUTS, OUTPUTS, SAMPLES, K, N, rehash, write_bundle

EVERY_OUTPUT = (*OUTPUTS, *MORE_OUTPUTS)


def checks(result: Verification) -> list[str]:
    return list(dict.fromkeys(check.name for check in result.checks))


def failed(result: Verification) -> set[str]:
    return {check.name for check in result.checks if check.failures}


ORDERS = ["permuted ids_keep", "sorted ids_keep"]
ALONE = ["sample alone", "other batches", "largest batch"]


@pytest.mark.parametrize(
    ("token_mode", "batch", "keep", "expected"),
    [
        (
            "ragged",
            None,
            None,
            [
                "golden",
                "run again",
                *ORDERS,
                "other padding",
                "longer padding",
                *ALONE,
                "other lengths",
            ],
        ),
        (
            "ragged",
            3,
            None,
            [
                "golden",
                "run again",
                *ORDERS,
                "other padding",
                "longer padding",
                "other neighbours",
                "other lengths",
            ],
        ),
        (
            "ragged",
            None,
            6,
            [
                "golden",
                "run again",
                *ORDERS,
                "other padding",
                *ALONE,
                "other lengths",
            ],
        ),
        (
            "ragged",
            1,
            6,
            ["golden", "run again", *ORDERS, "other padding", "other lengths"],
        ),
        (
            "reconstruct",
            None,
            None,
            [
                "golden",
                "run again",
                *ORDERS,
                *ALONE,
            ],
        ),
        (
            "visible",
            None,
            None,
            [
                "golden",
                "run again",
                *ORDERS,
                *ALONE,
            ],
        ),
        (
            "visible",
            None,
            2,
            [
                "golden",
                "run again",
                *ORDERS,
                *ALONE,
            ],
        ),
        ("visible", 2, K, ["golden", "run again", *ORDERS, "other neighbours"]),
        ("visible", 7, K, ["golden", "run again", *ORDERS, "other neighbours"]),
        ("visible", 1, 1, ["golden", "run again"]),
        ("full", None, None, ["golden", "run again", *ALONE]),
        ("full", 3, None, ["golden", "run again", "other neighbours"]),
        ("full", 1, None, ["golden", "run again"]),
    ],
)
def test_what_was_exported_passes(
    tmp_path: Path, token_mode: str, batch: int | None, keep: int | None, expected: list[str]
) -> None:
    path = write_bundle(tmp_path / "b", token_mode=token_mode, batch=batch, keep=keep, outputs=EVERY_OUTPUT)
    result = verify_bundle(Bundle.load(path), options=EngineOptions(threads=1))
    assert result.failures == []
    assert result.passed
    assert result.outputs_pass
    assert (result.bundle, result.engine, result.device) == (str(path), "onnxruntime", "cpu")
    assert (result.engine_version, result.num_samples) == (onnxruntime.__version__, SAMPLES)
    assert checks(result) == expected
    assert [check.comparison.name for check in result.outputs] == list(EVERY_OUTPUT)
    assert len(result.invariances) == len(EVERY_OUTPUT) * (len(expected) - 1)


FRAME = np.random.default_rng(3).integers(0, 256, (23, 61, 3), dtype=np.uint8)


@pytest.mark.parametrize("preprocess", [{}, {"crop_mode": "letterbox"}, {"crop_pct": 0.75}], ids=str)
def test_a_frame_is_prepared_as_at_export(tmp_path: Path, preprocess: dict[str, Any]) -> None:
    path = write_bundle(tmp_path / "b", frame=FRAME, preprocess=preprocess)
    result = verify_bundle(Bundle.load(path))
    assert result.passed
    assert checks(result)[-1] == PREPROCESSING
    assert result.preprocessing is not None
    assert result.preprocessing.comparison.max_abs == 0
    assert PREPROCESSING not in {check.name for check in result.invariances}


@pytest.mark.parametrize(
    "edit",
    [
        {"mean": [0.6, 0.5, 0.4]},
        {"std": [0.21, 0.315, 0.42]},
        {"interpolation": "bicubic"},
        {"crop_pct": 0.6},
        {"crop_mode": "squash"},
    ],
    ids=str,
)
def test_a_manifest_that_prepares_images_otherwise(tmp_path: Path, edit: dict[str, Any]) -> None:
    path = write_bundle(tmp_path / "b", frame=FRAME, change=lambda manifest: manifest["preprocess"].update(edit))
    assert failed(verify_bundle(Bundle.load(path))) == {PREPROCESSING}


@pytest.mark.parametrize(
    "broken",
    [lambda pixels: pixels[..., ::-1], lambda pixels: np.roll(pixels, 1, axis=1), lambda pixels: pixels[::-1]],
    ids=["order of the channels", "one pixel off", "upside down"],
)
def test_a_device_that_prepares_images_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: Callable[[Array], Array]
) -> None:
    path = write_bundle(tmp_path / "b", frame=FRAME)
    crop = Preprocess.crop
    monkeypatch.setattr(Preprocess, "crop", lambda spec, image: broken(crop(spec, image)))
    assert failed(verify_bundle(Bundle.load(path))) == {PREPROCESSING}


def test_a_bundle_without_a_frame_says_so(tmp_path: Path) -> None:
    result = verify_bundle(Bundle.load(write_bundle(tmp_path / "b")))
    assert (result.preprocessing, result.to_dict()["preprocessing"]) == (None, None)
    assert "preprocessing was not checked" in verification_table(result).notes[-1]


@pytest.mark.parametrize("images", ["uint8", "float16"])
def test_images_in_the_form_of_the_graph(tmp_path: Path, images: str) -> None:
    assert verify_bundle(Bundle.load(write_bundle(tmp_path / "b", images=images))).failures == []


@pytest.mark.parametrize(("precision", "bits"), [("fp16", None), ("bf16", 10), ("int8", 8)])
@pytest.mark.parametrize("token_mode", ["full", "ragged"])
def test_lower_precisions_meet_their_own_tolerance(
    tmp_path: Path, token_mode: str, precision: str, bits: int | None
) -> None:
    features = "float16" if precision == "fp16" else "float32"
    result = verify_bundle(
        Bundle.load(
            write_bundle(tmp_path / "b", token_mode=token_mode, precision=precision, bits=bits, features=features)
        )
    )
    assert result.failures == []
    assert any(check.comparison.max_abs > 1e-4 for check in result.outputs)
    # Compared with PyTorch in every form; only a second run is compared with the first.
    assert {check.name for check in result.checks if check.comparison.sqnr_db == math.inf} == {"run again"}
    assert "other lengths" not in checks(result)


def test_a_second_run_must_repeat_the_first_whatever_the_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise of 1e-3 is far inside of INT8's tolerance."""
    bundle, rng = (
        Bundle.load(write_bundle(tmp_path / "b", token_mode="full", precision="int8")),
        np.random.default_rng(0),
    )
    with load_engine(bundle) as engine:
        run = engine.run

        def noisy(inputs: dict[str, Array], outputs: tuple[str, ...]) -> dict[str, Array]:
            return {
                name: array + rng.normal(scale=1e-3, size=array.shape) for name, array in run(inputs, outputs).items()
            }

        monkeypatch.setattr(engine, "run", noisy)
        assert failed(verify_engine(bundle, engine)) == {"run again"}


def test_too_few_bits_miss_the_tolerance_in_every_form(tmp_path: Path) -> None:
    result = verify_bundle(Bundle.load(write_bundle(tmp_path / "b", precision="int8", bits=4)))
    assert failed(result) == {*checks(result)} - {"run again"}
    assert not result.outputs_pass


def test_the_record_is_plain_json(visible_bundle: Path) -> None:
    record = json.loads(json.dumps(verify_bundle(Bundle.load(visible_bundle)).to_dict(), allow_nan=False))
    assert record["passed"] is True
    assert (record["engine"], record["engine_version"], record["device"]) == (
        "onnxruntime",
        onnxruntime.__version__,
        "cpu",
    )
    assert record["num_samples"] == SAMPLES
    assert record["tolerance"] == {"cosine": 0.99999, "max_abs": 1e-4, "max_relative": 1e-5}
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
    [
        ("batch", {*ORDERS, *ALONE}),
        ("order", {*ORDERS}),
    ],  # samples are permuted differently
)
def test_a_broken_invariance_fails_although_the_golden_outputs_agree(
    tmp_path: Path, flaw: str, broken: set[str]
) -> None:
    result = verify_bundle(Bundle.load(write_bundle(tmp_path / "b", flaw=flaw, golden_of_graph=True)))
    assert failed(result) == broken
    assert not result.passed
    assert result.outputs_pass
    assert {check.comparison.name for check in result.invariances if check.failures} == set(OUTPUTS)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("keep", [None, 6])
def test_padding_that_is_read_fails(tmp_path: Path, keep: int | None, precision: str) -> None:
    path = write_bundle(
        tmp_path / "b", token_mode="ragged", keep=keep, flaw="padding", golden_of_graph=True, precision=precision
    )
    assert "other padding" in failed(verify_bundle(Bundle.load(path)))


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_padding_that_is_counted_fails(tmp_path: Path, precision: str) -> None:
    """The mean is over the padded length: what the padding holds does not matter, how long it is does."""
    path = write_bundle(tmp_path / "b", token_mode="ragged", flaw="length", golden_of_graph=True, precision=precision)
    result = verify_bundle(Bundle.load(path))
    assert failed(result) == {"longer padding", "sample alone", "other lengths"} - (
        {"other lengths"} if precision == "int8" else set()
    )


def test_a_ragged_graph_is_proven_for_lengths_that_the_golden_samples_have_not(tmp_path: Path) -> None:
    bundle = Bundle.load(write_bundle(tmp_path / "b", token_mode="ragged", profile_keep=(2, 4, 17)))
    golden = bundle.golden()
    inputs = {name: golden[name] for name in bundle.input_names}
    others = other_lengths(bundle, inputs)
    assert others["num_keep"].tolist() == [2, 6, 10, 13, 17]
    assert others["ids_keep"].shape == (SAMPLES, 17)
    for ids, length in zip(others["ids_keep"], others["num_keep"], strict=True):
        assert len({*ids[:length].tolist()} & {*range(N)}) == length
    assert {-1, 2**63 - 1, -(2**63)} <= {*others["ids_keep"].ravel().tolist()}
    assert [part["ids_keep"].shape for part in samples_alone(bundle, others)] == [
        (1, length) for length in (2, 6, 10, 13, 17)
    ]


def test_padding_grows_no_longer_than_the_profile(tmp_path: Path) -> None:
    """The golden rows have 8 entries."""
    for most, width in ((9, 9), (21, 11)):
        bundle = Bundle.load(write_bundle(tmp_path / str(most), token_mode="ragged", profile_keep=(1, 4, most)))
        golden = bundle.golden()
        (longer,) = (
            v
            for v in variations(bundle, {name: golden[name] for name in bundle.input_names})
            if v.name == "longer padding"
        )
        assert longer.parts[0]["ids_keep"].shape == (SAMPLES, width)


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
    path = write_bundle(
        tmp_path / "b",
        change=lambda manifest: manifest.update(tolerance={"cosine": 0.9, "max_abs": 1.0, "sqnr_db": 1000.0}),
    )
    result = verify_bundle(Bundle.load(path))
    assert any("sqnr_db" in line for line in result.failures)


def test_every_listed_file_is_checked_even_one_that_no_engine_reads(tmp_path: Path) -> None:
    path = write_bundle(
        tmp_path / "b", change=lambda manifest: manifest["files"].update({"notes.txt": manifest["files"]["golden.npz"]})
    )
    (path / "notes.txt").write_text("other")
    with pytest.raises(CheckFailed, match=r"notes\.txt is not the file"):
        verify_bundle(Bundle.load(path))


def test_an_unknown_engine(visible_bundle: Path) -> None:
    with pytest.raises(ConfigError, match="unknown engine"):
        verify_bundle(Bundle.load(visible_bundle), "abacus")


# --- as exported -----------------------------------------------------------------------------------------------------


def recorded(path: Path, **changes: Any) -> Path:
    """The bundle with what this machine's engine gave, as an export records it."""
    with load_engine(Bundle.load(path)) as engine:
        verification = verify_engine(Bundle.load(path), engine)
    manifest = json.loads((path / "manifest.json").read_text())
    figures = {**verification.to_dict(), **noise_record(verification.figures, None), **changes}
    manifest["parity"] = {f"onnx-{manifest['precision']}": figures}
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def with_other_weights(path: Path, by: float) -> Path:
    """The bundle with a weight that is a little off, under the right hash."""
    model = onnx.load(path / "encoder.onnx")
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "block_weight")
    value = numpy_helper.to_array(tensor).copy()
    value[0] += by
    tensor.CopyFrom(numpy_helper.from_array(value, "block_weight"))
    onnx.save(model, path / "encoder.onnx")
    rehash(path)
    return path


def test_more_noise_than_at_export_is_a_miss_below_the_tolerance(tmp_path: Path) -> None:
    path = recorded(write_bundle(tmp_path / "b", precision="int8", bits=12))
    right = verify_bundle(Bundle.load(path))
    assert (right.passed, right.left_out) == (True, ())
    assert AS_EXPORTED in checks(right)
    found = verify_bundle(Bundle.load(with_other_weights(path, 0.01)))
    assert failed(found) == {AS_EXPORTED}
    assert "at export" in found.failures[0]
    assert not found.outputs_pass


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"engine_version": "0.1"}, "the export measured it on onnxruntime 0.1"),
        ({"machine": ["Another CPU", "avx2"]}, "the export measured it on another CPU, Another CPU"),
        ({"engine": "openvino"}, "the export measured it on openvino"),
        ({"emulated": "bf16"}, "the export did not measure it"),
    ],
    ids=str,
)
def test_the_noise_of_another_machine_says_nothing(tmp_path: Path, changes: dict[str, Any], why: str) -> None:
    path = recorded(write_bundle(tmp_path / "b", precision="int8", bits=12), **changes)
    found = verify_bundle(Bundle.load(with_other_weights(path, 0.01)))
    assert found.passed
    assert AS_EXPORTED not in checks(found)
    note, *_ = verification_table(found).notes
    assert note.startswith(f"left out: 'as exported' (how near to PyTorch it was then): {why}")
    assert found.to_dict()["left_out"] == [note.removeprefix("left out: ")]
