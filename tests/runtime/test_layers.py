"""The drift after every block, and which block is named: the first below the floor, the one that loses most, or the one
that breaks.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mae_deploy.errors import ConfigError, MaeDeployError
from mae_deploy.runtime import Bundle
from mae_deploy.runtime.layers import FLOOR_DB, LayerDrift, LayerReport, trace_layers
from mae_deploy.runtime.parity.compare import Comparison
from tests.runtime.tiny_bundle import BLOCK_ROWS, BLOCK_TENSORS, write_bundle


def traced(path: Path, **settings: Any) -> LayerReport:
    return trace_layers(Bundle.load(write_bundle(path, **settings)), outputs_pass=True)


def report(*noise: float, outputs_pass: bool = False, floor: float = 30.0) -> LayerReport:
    """Blocks of these SQNR; NaN is a block that is broken."""
    layers: list[LayerDrift] = []
    for block, sqnr in enumerate(noise):
        comparison = Comparison(
            name="x", sqnr_db=sqnr, reason="the output has 3 NaN or infinite values" if math.isnan(sqnr) else None
        )
        drop = noise[block - 1] - sqnr if block else math.nan
        layers.append(
            LayerDrift(block=block, comparison=comparison, peak=1.0, drop_db=drop if math.isfinite(drop) else None)
        )
    return LayerReport(layers=tuple(layers), floor_db=floor, outputs_pass=outputs_pass, num_samples=2, num_tokens=3)


# --- measured --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"token_mode": "full"},
        {"token_mode": "full", "batch": 3},
        {"token_mode": "visible", "images": "uint8"},
        {"token_mode": "ragged"},
        {"token_mode": "ragged", "batch": 2, "keep": 6},
        {"token_mode": "reconstruct", "outputs": ("pixels",)},
    ],
    ids=str,
)
def test_fp32_loses_nothing(tmp_path: Path, settings: dict[str, Any]) -> None:
    found = traced(tmp_path / "b", **settings)
    assert [layer.block for layer in found.layers] == [0, 1]
    assert all(layer.comparison.sqnr_db > 110 and 0.9 < layer.peak < 2 for layer in found.layers)
    assert (found.floor_db, found.lost_at, found.broken) == (FLOOR_DB, None, None)
    assert found.conclusion == "no block is below 80 dB"
    assert found.num_samples == 2


@pytest.mark.parametrize("batch", [None, 1, 2, 3])
@pytest.mark.parametrize("token_mode", ["visible", "ragged"])
def test_blocks_that_work_on_rows(tmp_path: Path, token_mode: str, batch: int | None) -> None:
    found = traced(
        tmp_path / "b",
        token_mode=token_mode,
        batch=batch,
        change=lambda manifest: manifest["graph"].update(blocks=BLOCK_ROWS),
    )
    assert [layer.comparison.sqnr_db > 110 for layer in found.layers] == [True, True]


def test_the_block_with_another_weight_is_named(tmp_path: Path) -> None:
    found = traced(tmp_path / "b", flaw="block_weight")
    assert found.lost_at is found.layers[1]
    first, second = (layer.comparison.sqnr_db for layer in found.layers)
    assert first > 110
    assert found.layers[1].drop_db == pytest.approx(first - second)
    assert found.conclusion == f"precision is lost in block 1, the first below 80 dB: {second:.1f} dB"


def test_the_floor_is_that_of_the_tolerance(tmp_path: Path) -> None:
    found = traced(tmp_path / "b", precision="int8", bits=8)
    assert found.floor_db == 30
    assert [30 < layer.comparison.sqnr_db < 60 for layer in found.layers] == [True, True]
    assert found.lost_at is None
    assert traced(tmp_path / "c", precision="int8", bits=4).lost_at is not None


def test_every_token_is_a_row_and_the_mean_is_over_all(tmp_path: Path) -> None:
    """One token of 17 x 2 is off: the worst row shows it, as the mean of all rows would not."""
    path = write_bundle(tmp_path / "b", token_mode="full")
    bundle = Bundle.load(path)
    golden = copy.deepcopy(bundle.golden())
    golden["blocks"][1, 0, 5] *= -1
    bundle.golden = lambda: golden  # type: ignore[method-assign]
    found = trace_layers(bundle, outputs_pass=True)
    assert found.layers[0].comparison.cosine == pytest.approx(-1)
    assert found.layers[0].comparison.num_samples == 34
    assert found.num_tokens == 17


def test_a_block_of_infinities_is_named_and_is_plain_json(tmp_path: Path) -> None:
    found = traced(tmp_path / "b", flaw="block")
    assert found.broken is found.lost_at is found.layers[1]
    assert found.conclusion.startswith("precision is lost in block 1: the output has ")
    assert found.conclusion.endswith("NaN or infinite values")
    record = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert (record["lost_at"], record["conclusion"], record["floor_db"]) == (1, found.conclusion, 80)
    assert [row["block"] for row in record["blocks"]] == [0, 1]
    assert record["blocks"][0]["drop_db"] is None
    assert record["blocks"][0]["reason"] is None
    assert (record["blocks"][1]["peak"], record["blocks"][1]["sqnr_db"]) == (None, None)


def test_not_a_number_behind_the_golden_tokens_is_found(tmp_path: Path) -> None:
    """PyTorch's block outputs cover the first tokens only."""
    bundle = Bundle.load(write_bundle(tmp_path / "b", token_mode="full"))
    golden = copy.deepcopy(bundle.golden())
    golden["images"][1, :, -1, -1] = np.nan  # the last patch, which no other token of this graph sees
    bundle.golden = lambda: golden  # type: ignore[method-assign]
    found = trace_layers(bundle, outputs_pass=True)
    assert found.broken is found.layers[0]
    assert found.conclusion == "precision is lost in block 0: NaN or infinite values behind the first 17 tokens"


def test_not_a_number_in_padding_does_not_matter(tmp_path: Path) -> None:
    bundle = Bundle.load(write_bundle(tmp_path / "b", token_mode="ragged"))
    golden = copy.deepcopy(bundle.golden())
    golden["images"][1, :, 0, 0] = np.nan  # patch 0, which padding reads
    golden["ids_keep"][1, : golden["num_keep"][1]] = np.arange(3, 3 + golden["num_keep"][1])
    bundle.golden = lambda: golden  # type: ignore[method-assign]
    assert trace_layers(bundle, outputs_pass=True).broken is None


# --- which block is named --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("noise", "outputs_pass", "lost", "said"),
    [
        ((50, 45, 29, 20), False, 2, "in block 2, the first below 30 dB: 29.0 dB"),
        ((50, 45, 29, 20), True, 2, "in block 2, the first below 30 dB"),
        ((29, 45), False, 0, "in block 0, the first below 30 dB"),
        ((50, math.nan, 20), True, 1, "in block 1: the output has 3 NaN or infinite values"),
        (
            (50, 48, 40, 39),
            False,
            2,
            (
                "no block is below 30 dB, but the outputs miss their tolerance: precision is lost after the blocks, or"
                " in block 2, which loses most: 8.0 dB"
            ),
        ),
        ((50, 48, 40, 39), True, None, "no block is below 30 dB"),
        (
            (40, 41, 42),
            False,
            None,
            "no block is below 30 dB, but the outputs miss their tolerance: precision is lost after the last block",
        ),
        ((math.inf, 40, 39), False, 2, "which loses most: 1.0 dB"),
        ((40,), False, None, "precision is lost after the last block"),
    ],
)
def test_which_block_is_named(noise: tuple[float, ...], outputs_pass: bool, lost: int | None, said: str) -> None:
    found = report(*noise, outputs_pass=outputs_pass)
    assert (found.lost_at.block if found.lost_at is not None else None) == lost
    assert said in found.conclusion


# --- what cannot be traced -------------------------------------------------------------------------------------------


def test_a_bundle_without_block_outputs(tmp_path: Path) -> None:
    path = write_bundle(tmp_path / "b", change=lambda manifest: manifest["graph"].update(blocks=[]))
    with pytest.raises(ConfigError, match="holds no outputs of its blocks") as caught:
        trace_layers(Bundle.load(path), outputs_pass=True)
    assert caught.value.hint == "export the bundle again"


def test_a_tensor_that_the_graph_does_not_have(tmp_path: Path) -> None:
    path = write_bundle(
        tmp_path / "b", change=lambda manifest: manifest["graph"].update(blocks=[BLOCK_TENSORS[0], "elsewhere"])
    )
    with pytest.raises(MaeDeployError, match="elsewhere"):
        trace_layers(Bundle.load(path), outputs_pass=True)


@pytest.mark.parametrize(
    ("noise", "block", "expected"),
    [
        ((130.0, 84.0, 79.0), 1, "precision is lost in block 1: 84.0 dB, where 130.0 were to be expected"),
        ((88.0, 82.0, 79.0), 0, "precision is lost in block 0: 88.0 dB, where 110.0 were to be expected"),
        ((100.0, 90.0, 79.0), 2, "precision is lost in block 2, the first below 80 dB: 79.0 dB"),
    ],
)
def test_a_fault_begins_where_much_is_lost_at_once(noise: tuple[float, ...], block: int, expected: str) -> None:
    found = report(*noise, floor=FLOOR_DB)
    assert found.lost_at is found.layers[block]
    assert found.conclusion == expected


def test_the_block_that_is_worse_than_at_export(tmp_path: Path) -> None:
    found = dataclasses.replace(report(60.0, 57.0, 50.0, floor=30.0), exported_db=(60.5, 59.5, 58.0))
    assert found.lost_at is found.layers[1]
    assert found.conclusion == "precision is lost in block 1: 57.0 dB, at export 59.5"
    assert dataclasses.replace(found, outputs_pass=True).lost_at is None
    assert dataclasses.replace(found, exported_db=(60.5, None, 58.0)).lost_at is found.layers[2]
