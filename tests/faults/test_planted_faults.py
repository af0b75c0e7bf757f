"""One fault of every kind, planted into two bundles: each is found, and where it lies in a block, the block is named.
`make faults` plants all of them into every kind of bundle.
"""

from __future__ import annotations

import pytest

from tests.faults.corpus import bundles
from tests.faults.run import Judge, Row, report


@pytest.fixture(scope="module", params=["ragged fp32", "full fp16"])
def rows(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    folder = tmp_path_factory.mktemp("faults")
    ((name, path),) = bundles(folder, only=request.param)
    return list(Judge(name, path, folder / "scratch").some())


def test_every_fault_that_is_more_than_noise_is_found(rows: list[Row]) -> None:
    found = report(rows)
    assert found["kinds"] >= 50
    assert found["above the noise"] >= 40
    assert found["missed"] == []


def test_the_block_is_named(rows: list[Row]) -> None:
    found = report(rows)
    assert found["in a block"] >= 20
    assert found["right block named"] >= 0.95 * found["in a block"]
