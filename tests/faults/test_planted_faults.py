"""One fault of every kind, planted into two bundles: each is found, and where it lies in a block, the block is named.
`make faults` plants all of them into every kind of bundle.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from tests.faults.corpus import bundles, rotary_bundle
from tests.faults.graphs import GraphFault, graph_faults
from tests.faults.run import Judge, Row, report


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """Faults of a graph that both bundles can have, in one of the two."""
    folder = tmp_path_factory.mktemp("faults")
    made = [bundle for name in ("ragged fp32", "full fp16") for bundle in bundles(folder / name, only=name)]
    one, two = (Judge(name, path, folder / "scratch") for name, path in made)
    shared = sorted(one.kinds() & two.kinds())
    return [*one.some(one.kinds() - {*shared[::2]}), *two.some(two.kinds() - {*shared[1::2]})]


@pytest.mark.parametrize(("kind", "least"), [("dinov3", 8), ("mixed", 6)])
def test_faults_of_rotary_positions_are_found_and_the_block_is_named(kind: str, least: int, tmp_path: Path) -> None:
    """One table serves all blocks, and a fault in it begins in the first; with learned frequencies each has its own."""
    path = rotary_bundle(tmp_path, kind)
    model = onnx.load(path / "encoder.onnx")
    judge = Judge(kind, path, tmp_path / "scratch")
    found: dict[str, list[GraphFault]] = {}
    for fault in graph_faults(model):
        if "rotary" in fault.place or "_turned" in fault.place:
            found.setdefault(fault.kind, []).append(fault)
    assert len(found) >= least
    for turn, faults in enumerate(found.values()):
        fault = faults[turn % len(faults)]
        row = judge.plant(model, fault)
        assert row.found_by is not None, fault
        assert row.named == (fault.block or 0), fault


def test_every_fault_that_is_more_than_noise_is_found(rows: list[Row]) -> None:
    found = report(rows)
    assert found["kinds"] >= 80
    assert found["above the noise"] >= 120
    assert found["missed"] == []


def test_the_block_is_named(rows: list[Row]) -> None:
    found = report(rows)
    assert found["in a block"] >= 20
    assert found["right block named"] >= 0.95 * found["in a block"]
