"""Benchmarks of tiny graphs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mae_deploy.commands.benchmark import roofline
from mae_deploy.commands.benchmark.roofline import yardsticks


@pytest.fixture(autouse=True)
def small_yardsticks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rate at which weights are read is that of 67 MB, which takes a second to write and to load."""
    monkeypatch.setattr(
        roofline,
        "yardsticks",
        lambda engine: [replace(mark, size=64) if mark.kind == "weights" else mark for mark in yardsticks(engine)],
    )
