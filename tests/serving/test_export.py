"""Exports that also write for servers, and the single standard deviation that DeepStream needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mae_deploy.errors import ConfigError
from mae_deploy.export.config import ExportConfig
from mae_deploy.export.run import run_export
from mae_deploy.images.find import find_images
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.images.read import read_image
from mae_deploy.runtime.backbone import Backbone
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.serving.deepstream import check_bundle


@pytest.fixture
def settings(robust: Path, tmp_path: Path) -> dict[str, Any]:
    """Of an export of the classifier, with nothing at `out` yet."""
    return {
        "checkpoint": robust / "classifier",
        "out": tmp_path / "bundles" / "mine",
        "samples": robust / "photos",
        "num_samples": 2,
        "threads": 1,
    }


def images_of(robust: Path) -> list[Any]:
    return [np.asarray(read_image(path)) for path in find_images(robust / "photos")[:3]]


def test_an_export_writes_its_graph_for_triton(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run_export(ExportConfig(**settings, triton=tmp_path / "models"))
    model = tmp_path / "models" / "mine"
    assert result.data["served"] == {"triton": str(model)}
    assert (model / "1" / "model.onnx").read_bytes() == (settings["out"] / "encoder.onnx").read_bytes()
    assert 'name: "mine"' in (model / "config.pbtxt").read_text(), (
        "the bundle's name, not that of the folder where it was written"
    )
    assert str(model) in capsys.readouterr().err


def test_a_call_that_was_ended_between_bundle_and_server_goes_on_there(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    config = ExportConfig(**settings, triton=tmp_path / "models")
    with monkeypatch.context() as patch:
        patch.setattr("mae_deploy.export.run.write_for_servers", killed)
        with pytest.raises(KeyboardInterrupt):
            run_export(config)
    before = (settings["out"] / "manifest.json").read_bytes()
    other = ExportConfig(**{**settings, "num_samples": 3}, triton=tmp_path / "models")
    with pytest.raises(ConfigError, match=r"--out .*mine already exists"):
        run_export(other)
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr("mae_deploy.export.run.prepare", killed)  # nothing is computed again
        served = run_export(config).data["served"]
    assert served == {"triton": str(tmp_path / "models" / "mine")}
    assert "kept: " in capsys.readouterr().err
    assert (tmp_path / "models" / "mine" / "1" / "model.onnx").is_file()
    assert (settings["out"] / "manifest.json").read_bytes() == before
    with pytest.raises(ConfigError, match=r"--out .*mine already exists"):
        run_export(config)


def test_what_is_there_stops_an_export_before_it_begins(settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    (tmp_path / "models" / "mine" / "config.pbtxt").touch()
    with pytest.raises(ConfigError, match=r"--triton .*mine already exists"):
        run_export(ExportConfig(**{**settings, "checkpoint": tmp_path / "nowhere"}, triton=tmp_path / "models"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"deepstream": Path("ds")}, "this export builds none"),
        ({"deepstream": Path("ds"), "engine": "trt", "build": False}, "this export builds none"),
        ({"one_std": True, "tokens": "reconstruct"}, "--one-std with --tokens reconstruct"),
        ({"triton": Path("models"), "engine": "openvino", "precision": "bf16"}, "ONNX Runtime, which serves the graph"),
    ],
)
def test_what_cannot_be_served(settings: dict[str, Any], changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ExportConfig(**{**settings, **changed})


def test_one_standard_deviation_changes_no_result(settings: dict[str, Any], robust: Path) -> None:
    run_export(ExportConfig(**settings))
    one = settings["out"].with_name("one")
    run_export(ExportConfig(**{**settings, "out": one}, one_std=True))
    before, after = Bundle.load(settings["out"]).preprocess, Bundle.load(one).preprocess
    assert len(set(before.std)) == 3
    assert after == Preprocess(
        **{
            **{name: getattr(before, name) for name in ("image_size", "channels", "crop_pct", "interpolation", "mean")},
            "std": after.std,
        }
    )
    assert after.std == pytest.approx((np.mean(before.std),) * 3)
    images = images_of(robust)
    with (
        Backbone.load(settings["out"], "onnxruntime", threads=1) as plain,
        Backbone.load(one, "onnxruntime", threads=1) as folded,
    ):
        expected, found = plain(images).logits, folded(images).logits
        wrong = folded(plain.preprocess(images)).logits
    # Rounding of one weight matrix and of the pixels; these models have activations in the hundreds.
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    assert np.abs(wrong - expected).max() > 100 * np.abs(found - expected).max(), (
        "the weights must have taken up what the pixels lost"
    )
    check_bundle(Bundle.load(one))
    with pytest.raises(ConfigError, match="one scale for all channels"):
        check_bundle(Bundle.load(settings["out"]))
