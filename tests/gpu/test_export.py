"""`export --engine trt` on a GPU: the engine in the bundle computes what PyTorch computes at every size, and eight bits
are kept only where they are worth it.

torch and onnx are needed too; a machine with TensorRT alone skips this and has `test_build.py`.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from mae_deploy.runtime.tensorrt.api import Api

if TYPE_CHECKING:
    from tests.export.robust_exports import Exports

pytestmark = pytest.mark.gpu

MODES: dict[str, tuple[str, ...]] = {
    "full": ("--tokens", "full"),
    "visible": ("--tokens", "visible", "--profile", "K:3,5,15"),
    "ragged": ("--tokens", "ragged", "--profile", "K:3,5,15"),
    "reconstruct": ("--tokens", "reconstruct", "--profile", "K:4,6,15"),
}

FLOORS = {"fp32": 90, "fp16": 40, "bf16": 30, "int8": 25, "fp8": 18}
"""dB for images that the export has not seen."""

EIGHT_BITS = ("--no-search", "--min-cosine", 0.9, "--min-sqnr", 15)
"""Models of this size bear little noise."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoint `mae`, whose heads of 16 TensorRT fuses, 11 `photos` and 128 images for
    `calibration`.
    """
    for package in ("torch", "onnx", "timm"):
        pytest.importorskip(package)
    from tests.export.robust_exports import CONFIG, robust_mae, write_blots
    from tests.export.tiny_exports import write_checkpoint

    root = tmp_path_factory.mktemp("gpu-export")
    write_checkpoint(root / "mae", robust_mae(replace(CONFIG, embed_dim=64, num_heads=4)), licence="own")
    write_blots(root / "photos", 11)
    write_blots(root / "calibration", 128, first=100)
    return root


@pytest.fixture
def exports(
    api: Api, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Exports:
    """Exports of `mae` to a folder that is not there yet; nothing is kept in the user's caches."""
    from tests.export.robust_exports import Exports

    monkeypatch.setenv("MAE_DEPLOY_CACHE", str(checkpoint / "cache"))
    return Exports(checkpoint / "mae", checkpoint / "photos", tmp_path / "place" / "bundle", capsys)


def computes_as_pytorch(exports: Exports, mode: str, floor: float) -> None:
    """Whether images that the export has not seen give PyTorch's numbers, each batch size for itself."""
    from mae_deploy.runtime import Backbone
    from tests.export.robust_exports import CONFIG, robust_mae
    from tests.export.test_run_precisions import KEEP, given, unseen
    from tests.export.tiny_exports import pytorch_outputs, sqnr

    model = robust_mae(replace(CONFIG, embed_dim=64, num_heads=4))
    with Backbone.load(exports.out, "trt") as backbone:
        found = backbone(unseen(), KEEP[mode])
        expected = pytorch_outputs(model, backbone.preprocess([*unseen()]), given(KEEP[mode]))
        for name in backbone.output_names:
            assert sqnr(found[name], expected[name]) > floor, name


def supports(api: Api, precision: str) -> bool:
    """Whether this TensorRT on this GPU computes so."""
    least = {"bf16": (8, 0), "fp8": (8, 9)}.get(precision, (0, 0))
    return api.gpu.compute_capability >= least and (api.major >= 10 or precision not in ("bf16", "fp8"))


@pytest.mark.parametrize(
    ("precision", "mode"), [*(("fp16", mode) for mode in MODES), ("fp32", "visible"), ("bf16", "visible")]
)
def test_an_engine_is_built_proven_and_put_into_the_bundle(
    exports: Exports, api: Api, precision: str, mode: str
) -> None:
    if not supports(api, precision):
        pytest.skip(f"TensorRT {api.version} on {api.gpu.name} has no {precision}")
    result = exports.passed("--engine", "trt", "--precision", precision, *MODES[mode])
    manifest = exports.manifest
    [entry] = manifest["engines"]
    assert (entry["tensorrt"], entry["gpu"], entry["precision"]) == (api.version, api.gpu.name, precision)
    assert manifest["typing"] == ("weak" if api.major == 8 else "strong")
    assert entry["file"] in manifest["files"]
    assert result["built"]["file"] == entry["file"]
    assert manifest["parity"][f"tensorrt-{precision}"]["num_samples"] == 11
    assert set(manifest["parity"]) == {f"onnx-{precision}", f"tensorrt-{precision}"}
    exports.verified("--engine", "trt")
    computes_as_pytorch(exports, mode, FLOORS[precision])


def test_every_profile_is_proven_at_its_sizes(exports: Exports) -> None:
    exports.passed(
        "--engine", "trt", "--precision", "fp16", "--tokens", "visible", "--profile", "B:1,1,1 K:5,5,5; B:2,4,8 K:3,6,9"
    )
    manifest = exports.manifest
    assert manifest["profile"] == {"B": [1, 1, 8], "K": [3, 5, 9]}
    assert manifest["engines"][0]["profiles"] == [{"B": [1, 1, 1], "K": [5, 5, 5]}, {"B": [2, 4, 8], "K": [3, 6, 9]}]
    computes_as_pytorch(exports, "visible", FLOORS["fp16"])


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_eight_bits_are_timed_against_fp16(exports: Exports, api: Api, checkpoint: Path, precision: str) -> None:
    arguments: tuple[Any, ...] = (
        "--engine",
        "trt",
        "--precision",
        precision,
        "--calib-data",
        checkpoint / "calibration",
        *EIGHT_BITS,
    )
    if not supports(api, precision):
        code, said = exports(*arguments)
        assert (code, exports.left) == (2, set()), said
        return
    exports.passed(*arguments, "--max-latency", 1000)
    record = exports.manifest["quantization"]
    assert record["speed"] == f"measured on {api.gpu.name}"
    assert record["latency_ratio"] == pytest.approx(record["latency_ms"][precision] / record["latency_ms"]["fp16"])
    computes_as_pytorch(exports, "full", FLOORS[precision])


def test_int8_that_is_not_faster_is_rejected_with_both_figures_or_fp16_is_kept(
    exports: Exports, checkpoint: Path
) -> None:
    arguments: tuple[Any, ...] = (
        "--engine",
        "trt",
        "--precision",
        "int8",
        "--calib-data",
        checkpoint / "calibration",
        *EIGHT_BITS,
        "--max-latency",
        1e-9,
    )
    code, said = exports(*arguments)
    assert code == 1
    assert re.search(
        r"INT8 is rejected: it is not faster; it takes \d+\.\d\d of FP16's latency, \d+\.\d+ against \d+\.\d+ ms", said
    )
    assert exports.left == set()
    result = exports.passed(*arguments, "--prefer", "fp16")
    assert result["rejected"].startswith("INT8 is rejected: it is not faster; ")
    assert (exports.manifest["precision"], exports.manifest["quantization"]) == ("fp16", None)
    assert [entry["precision"] for entry in exports.manifest["engines"]] == ["fp16"]
    computes_as_pytorch(exports, "full", FLOORS["fp16"])


def test_a_wrong_engine_leaves_nothing(exports: Exports, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every output is judged: one that is off in one number of one sample is enough."""
    from mae_deploy.runtime.tensorrt.slots import Slot

    on_host = Slot.on_host

    def off(slot: Slot, *given: Any) -> dict[str, np.ndarray]:
        found = on_host(slot, *given)
        return {
            name: np.where(np.arange(array.size).reshape(array.shape) == 0, array + 9, array)
            for name, array in found.items()
        }

    monkeypatch.setattr(Slot, "on_host", off)
    code, said = exports("--engine", "trt", "--precision", "fp16")
    assert code == 1
    assert "misses parity" in said
    assert exports.left == set()
