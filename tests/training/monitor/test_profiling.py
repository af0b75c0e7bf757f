"""A trace and a table of a few steps."""

from __future__ import annotations

import json
from pathlib import Path

from mae_deploy.training.config import LoopConfig
from tests.training.linear_runs import train
from tests.training.tiny_runs import optim


def test_a_trace_of_three_steps(images: Path, tmp_path: Path) -> None:
    train(images, tmp_path / "run", optim(epochs=5), LoopConfig(profile=True))
    events = json.loads((tmp_path / "run" / "profile" / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    assert sum(event.get("name") == "aten::linear" for event in events) == 3
    assert any(event.get("name") == "aten::_fused_adamw_" for event in events)
    operators = (tmp_path / "run" / "profile" / "operators.txt").read_text(encoding="utf-8")
    assert "Self CPU" in operators
    assert "aten::" in operators  # which are the costliest is a matter of the moment


def test_a_run_that_is_over_before_leaves_none(images: Path, tmp_path: Path) -> None:
    train(images, tmp_path / "run", optim(epochs=1), LoopConfig(profile=True))
    assert not (tmp_path / "run" / "profile" / "trace.json").exists()
