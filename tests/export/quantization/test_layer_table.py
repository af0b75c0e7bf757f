"""The per-layer table as JSON and as a picture."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
from PIL import Image

from mae_deploy.errors import MissingDependency
from mae_deploy.export.quantization.layer_table import LayerRow, table_rows, write_table
from mae_deploy.files import read_json
from mae_deploy.models.quantization.activations import activation_scales
from tests.export.outlier_models import noisy_encoder
from tests.models.quantization.test_smoothing import observe


def row(index: int) -> LayerRow:
    return LayerRow(
        layer=f"blocks.{index}.mlp.fc1",
        macs_share=1 / 128,
        noise_db=-50 + index / 10,
        precision="int8" if index % 3 else "fp32",
    )


def test_rows_hold_what_is_known_of_each_linear() -> None:
    stats = observe(noisy_encoder().state_dict())
    names = ["blocks.0.attn.qkv", "blocks.1.mlp.fc2"]
    scales = {**activation_scales({names[0]: stats[names[0]]}), names[1]: None}
    noise, cost = {names[0]: 0.0001, names[1]: 0.0}, {names[0]: 3.0, names[1]: 1.0}
    first, second = table_rows(noise, cost, scales, {names[0]: stats[names[0]]}, {names[1]}, otherwise="bf16")
    entry = stats[names[0]]
    assert first == LayerRow(
        layer=names[0],
        macs_share=0.75,
        noise_db=-40.0,
        precision="bf16",
        scale=scales[names[0]],
        absmax=entry.absmax.max(),
        outlier_ratio=entry.outlier_ratio,
    )
    assert second == LayerRow(layer=names[1], macs_share=0.25, noise_db=-math.inf, precision="int8")


@pytest.mark.parametrize("count", [1, 40])
def test_the_files(count: int, tmp_path: Path) -> None:
    rows = [row(index) for index in range(count)]
    files = write_table(tmp_path / "made" / "layers", rows)
    assert files == [tmp_path / "made" / "layers.json", tmp_path / "made" / "layers.png"]
    assert sorted(files[0].parent.iterdir()) == files
    assert [entry["layer"] for entry in read_json(files[0])] == [entry.layer for entry in rows]
    with Image.open(files[1]) as image:
        assert image.format == "PNG"
        assert image.height > 18 * count  # a line of text for each layer


def test_no_noise_at_all_is_null_in_json(tmp_path: Path) -> None:
    silent = LayerRow(layer="blocks.0.mlp.fc1", macs_share=1.0, noise_db=-math.inf, precision="int8", scale=0.5)
    found = read_json(write_table(tmp_path / "layers", [silent, row(1)])[0])
    expected = {
        "layer": "blocks.0.mlp.fc1",
        "macs_share": 1.0,
        "noise_db": None,
        "precision": "int8",
        "scale": 0.5,
        "absmax": None,
        "outlier_ratio": None,
    }
    assert found[0] == expected


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependency) as caught:
        write_table(tmp_path / "layers", [row(0)])
    assert "mae-deploy[plot]" in (caught.value.hint or "")
    assert not any(tmp_path.iterdir())
