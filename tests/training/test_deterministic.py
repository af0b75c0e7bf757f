"""`--deterministic`: two runs have the same bits, and a kernel that cannot is refused in one line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mae_deploy.cli import main
from mae_deploy.errors import explained
from mae_deploy.training.device import compute_deterministically
from mae_deploy.training.state.run_folder import read_metrics
from tests.training.tiny_runs import SAME_EACH_TIME, command_of, pretraining


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    yield
    compute_deterministically(False)


def test_two_runs_have_the_same_bits(images: Path, tmp_path: Path) -> None:
    found = []
    for name in ("one", "two"):
        assert main(command_of(pretraining(images, tmp_path / name), "--deterministic")) == 0
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        step = (tmp_path / name / "checkpoints" / "last").resolve()
        losses = [[line[key] for key in SAME_EACH_TIME] for line in read_metrics(tmp_path / name)]
        weights = (step / "model.safetensors").read_bytes()
        length = int.from_bytes(weights[:8], "little")  # of the header, which holds the run's folder
        found.append((losses, weights[8 + length :], (step / "state" / "optimizer.safetensors").read_bytes()))
    assert found[0] == found[1]


def test_the_next_run_may_take_any_kernel_again(images: Path, tmp_path: Path) -> None:
    compute_deterministically(True)
    assert main(command_of(pretraining(images, tmp_path / "run"))) == 0
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_workspace_that_was_chosen_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    compute_deterministically(True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_a_kernel_that_cannot_is_named() -> None:
    compute_deterministically(True)
    with pytest.raises(RuntimeError, match="deterministic") as caught:
        torch.ones(3).put_(torch.tensor([0, 0]), torch.ones(2), accumulate=False)
    found = explained(caught.value)
    assert found is not None
    assert str(found).startswith("--deterministic: put_ does not have a deterministic implementation")
    assert found.hint == "leave --deterministic out"
