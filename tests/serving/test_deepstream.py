"""DeepStream's files: what nvinfer is told computes what the runtime's preprocessing computes, and what it cannot is
refused.
"""

from __future__ import annotations

import configparser
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mae_deploy.errors import CheckFailed, ConfigError
from mae_deploy.images.geometry import CropMode
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.serving.deepstream import (
    FRAME,
    INFER_FILE,
    LABELS,
    PLAN_FILE,
    PREPROCESS_FILE,
    check_bundle,
    check_feeding,
    seen,
    write_deepstream,
)
from tests.runtime.tensorrt.planned_bundle import PLAN, plan_of, planned
from tests.runtime.tiny_bundle import CLASS_NAMES, MEAN, H, W

ONE_STD = {"std": [0.3, 0.3, 0.3]}


def read(path: Path) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=True, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read_string(path.read_text(encoding="utf-8"))
    return parser


def numbers(text: str) -> list[float]:
    return [float(number) for number in text.split(";")]


def written(tmp_path: Path, **settings: Any) -> Path:
    bundle = planned(tmp_path / "tiny", **{"token_mode": "full", "preprocess": ONE_STD, **settings})
    return write_deepstream(bundle, tmp_path / "deepstream", plan_of(bundle))


def test_files(tmp_path: Path) -> None:
    folder = written(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == [INFER_FILE, PREPROCESS_FILE, LABELS, PLAN_FILE]
    assert (folder / PLAN_FILE).read_bytes() == PLAN
    assert (folder / LABELS).read_text() == ";".join(CLASS_NAMES) + "\n", "one classifier, one line"


def test_both_elements_normalise_as_the_runtime_does(tmp_path: Path) -> None:
    folder = written(tmp_path)
    infer, user = read(folder / INFER_FILE)["property"], read(folder / PREPROCESS_FILE)["user-configs"]
    pixels = np.random.default_rng(0).integers(0, 256, (1, H, W, 3), dtype=np.uint8)
    spec = Preprocess(image_size=(H, W), mean=MEAN, std=(0.3, 0.3, 0.3))
    for factor, shifts in (
        (infer["net-scale-factor"], infer["offsets"]),
        (user["pixel-normalization-factor"], user["offsets"]),
    ):
        found = float(factor) * (pixels.astype(np.float32) - np.array(numbers(shifts), np.float32))
        # float32: eight digits of values up to 3
        np.testing.assert_allclose(found.transpose(0, 3, 1, 2), spec.normalise(pixels), atol=1e-6)


def test_what_nvinfer_is_told(tmp_path: Path) -> None:
    infer = read(written(tmp_path) / INFER_FILE)["property"]
    assert infer["model-engine-file"] == PLAN_FILE
    assert infer["infer-dims"] == f"3;{H};{W}"
    assert infer["batch-size"] == "32"
    assert infer["scaling-filter"] == "1", "bilinear"
    assert infer["network-type"] == "100", (
        "with outputs beside the logits, nvinfer would read classes from each of them"
    )
    assert infer["output-tensor-meta"] == "1"
    assert "onnx-file" not in infer, "nvinfer would build an engine that nobody has proven"


@pytest.mark.parametrize("output", ["probs", "logits"])
def test_a_classifier_alone_is_read_by_nvinfer(tmp_path: Path, output: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = written(tmp_path, outputs=(output,))
    infer = read(folder / INFER_FILE)["property"]
    assert (infer["network-type"], infer["labelfile-path"], infer["classifier-threshold"]) == ("1", LABELS, "0")
    # Its parser begins with a confidence of 0: of logits that are all below, it takes none.
    said = "labels: nvinfer names no class where all logits are below 0; export with --outputs probs\n"
    assert capsys.readouterr().err == (said if output == "logits" else "")
    assert ("--outputs probs" in (folder / INFER_FILE).read_text()) == (output == "logits")
    assert (folder / LABELS).is_file()


def test_fp16_logits_are_not_read_by_nvinfer(tmp_path: Path) -> None:
    infer = read(written(tmp_path, outputs=("logits",), features="float16") / INFER_FILE)["property"]
    assert infer["network-type"] == "100", "it reads FP32 only"


def test_what_nvdspreprocess_is_told(tmp_path: Path) -> None:
    folder = written(tmp_path, entry={"profiles": [{"B": [1, 2, 6]}]})
    preprocess = read(folder / PREPROCESS_FILE)
    settings, group = preprocess["property"], preprocess["group-0"]
    assert settings["network-input-shape"] == f"6;3;{H};{W}"
    assert (settings["processing-height"], settings["processing-width"]) == (str(H), str(W))
    assert (settings["tensor-name"], settings["tensor-data-type"], settings["network-input-order"]) == (
        "images",
        "0",
        "0",
    )
    assert settings["target-unique-ids"] == read(folder / INFER_FILE)["property"]["gie-unique-id"]
    assert list(group).index("process-on-roi") < list(group).index("roi-params-src-0"), (
        "in this order, says the plug-in"
    )
    left, top, width, height = numbers(group["roi-params-src-0"])
    assert 0 <= left <= FRAME[1] - width
    assert 0 <= top <= FRAME[0] - height
    assert width / height == pytest.approx(W / H, rel=0.01)


@pytest.mark.parametrize(("size", "crop_pct"), [((224, 224), 0.875), ((96, 160), 1.0), ((40, 24), 0.7)])
@pytest.mark.parametrize("frame", [(180, 320), (300, 200)])
@pytest.mark.parametrize("crop_mode", ["center", "squash"])
def test_the_region_is_what_the_crop_keeps(
    size: tuple[int, int], crop_pct: float, frame: tuple[int, int], crop_mode: CropMode
) -> None:
    spec = Preprocess(image_size=size, crop_pct=crop_pct, interpolation="nearest", crop_mode=crop_mode)
    rows, columns = np.mgrid[: frame[0], : frame[1]]
    crop = (
        spec.crop(Image.fromarray(np.stack([rows // 2, columns // 2, rows * 0], axis=2).astype(np.uint8))).astype(int)
        * 2
    )
    left, top, width, height = seen(spec, frame)
    # Two pixels: the coordinates are halved to fit 8 bits, and a pixel of the crop may cover more than one of the
    # frame.
    blur = 2 + max(frame) / min(size)
    assert crop[0, 0, :2] == pytest.approx([top, left], abs=blur)
    assert crop[-1, -1, :2] == pytest.approx([top + height - 1, left + width - 1], abs=blur)


def test_squashed_frames_need_nothing_but_nvinfer(tmp_path: Path) -> None:
    folder = written(tmp_path, preprocess={**ONE_STD, "crop_mode": "squash"})
    infer, preprocess = read(folder / INFER_FILE)["property"], read(folder / PREPROCESS_FILE)
    for settings in (infer, preprocess["property"]):
        assert settings["maintain-aspect-ratio"] == "0"
        assert "symmetric-padding" not in settings
    assert numbers(preprocess["group-0"]["roi-params-src-0"]) == [0, 0, FRAME[1], FRAME[0]]
    assert "nvinfer alone gives it the whole frame" in (folder / INFER_FILE).read_text()


def test_a_letterbox_is_padded_at_both_sides_by_both_elements(tmp_path: Path) -> None:
    folder = written(tmp_path, preprocess={**ONE_STD, "crop_mode": "letterbox"})
    for settings in (read(folder / INFER_FILE)["property"], read(folder / PREPROCESS_FILE)["property"]):
        assert (settings["maintain-aspect-ratio"], settings["symmetric-padding"]) == ("1", "1")
    assert numbers(read(folder / PREPROCESS_FILE)["group-0"]["roi-params-src-0"]) == [0, 0, FRAME[1], FRAME[0]]


@pytest.mark.parametrize(
    ("settings", "why", "hint"),
    [
        ({"token_mode": "visible"}, "--tokens visible has other inputs", "--tokens full"),
        ({"images": "uint8"}, "the images are uint8", "--images float32"),
        ({"images": "float16"}, "the images are float16", "--images float32"),
        ({"preprocess": {**ONE_STD, "crop_mode": "border"}}, "it pads with black", "--crop-mode letterbox"),
        ({"preprocess": {**ONE_STD, "interpolation": "box"}}, "it has no box filter", "lanczos"),
        ({"preprocess": {}}, "the standard deviations are 0.2, 0.3, 0.4", "--one-std"),
        ({"entry": {"stripped": True}}, "without its weights", "--strip"),
        ({"entry": {"version_compatible": True}}, "code for the CPU", "--version-compatible"),
        ({"entry": {"profiles": [{"B": [2, 4, 8]}]}}, "smaller than the engine's smallest, 2", "B 1"),
        ({"batch": 4}, "smaller than the engine's smallest, 4", "B 1"),
        (
            {"change": lambda manifest: manifest.update(class_names=["a;b", *CLASS_NAMES[1:]])},
            "the class 'a;b' does",
            "rename",
        ),
    ],
)
def test_what_deepstream_cannot_feed(tmp_path: Path, settings: dict[str, Any], why: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(why)) as raised:
        written(tmp_path, **settings)
    assert hint in str(raised.value.hint)
    assert not (tmp_path / "deepstream").exists()


def test_a_bundle_is_judged_before_its_plan_is_built(tmp_path: Path) -> None:
    check_bundle(planned(tmp_path / "one", token_mode="full", preprocess=ONE_STD))
    with pytest.raises(ConfigError, match="one scale"):
        check_bundle(planned(tmp_path / "three", token_mode="full"))
    with pytest.raises(ConfigError, match="no format of 4 channels"):
        check_feeding(
            "full", "float32", Preprocess(image_size=(H, W), channels=4, mean=(0.5,) * 4, std=(0.25,) * 4), None
        )
    check_feeding("full", "float32", Preprocess(image_size=(H, W), channels=1, mean=(0.5,), std=(0.25,)), None)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    folder = written(tmp_path)
    bundle = planned(tmp_path / "again", token_mode="full", preprocess=ONE_STD)
    with pytest.raises(ConfigError, match=re.escape(f"--deepstream {folder} already exists")):
        write_deepstream(bundle, folder, plan_of(bundle))


def test_a_changed_plan_is_not_copied(tmp_path: Path) -> None:
    bundle = planned(tmp_path / "tiny", token_mode="full", preprocess=ONE_STD)
    (bundle.path / plan_of(bundle)["file"]).write_bytes(PLAN + b"\x00")
    with pytest.raises(CheckFailed, match="is not the file that was exported"):
        write_deepstream(bundle, tmp_path / "deepstream", plan_of(bundle))
    assert not (tmp_path / "deepstream").exists()
