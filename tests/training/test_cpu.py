"""What a run sets up on a CPU: the choice of kernels goes with the run, and can be left alone."""

from __future__ import annotations

import ctypes
import platform
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mae_deploy.files import read_json
from mae_deploy.models import cpu_kernels as kernels
from mae_deploy.models.cpu_kernels import MeasuredLinear
from mae_deploy.pretrain.run import run_pretrain
from mae_deploy.training import cpu, step
from mae_deploy.training.cpu import advise_bf16, bf16_gain, keep_freed_memory, prepare_cpu
from mae_deploy.training.monitor.signals import Stopped
from mae_deploy.training.state.run_folder import read_metrics
from tests.training.tiny_runs import pretraining


def test_a_model_computes_by_measured_kernels_unless_that_is_off(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MAE_DEPLOY_CACHE", str(tmp_path))
    model, chosen = nn.Sequential(nn.Linear(3, 5)), {"a size": "onednn"}
    prepare_cpu(model, chosen, measured=False)
    assert type(model[0]) is nn.Linear
    found = prepare_cpu(model, chosen, measured=True)
    assert isinstance(model[0], MeasuredLinear)
    assert model[0].kernels is found
    assert found.chosen is chosen


def test_memory_settings_are_those_of_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []

    class Library:
        @staticmethod
        def mallopt(parameter: int, value: int) -> int:
            calls.append((parameter, value))
            return 1

    monkeypatch.setattr(ctypes, "CDLL", lambda _: Library)
    for name, expected in (("glibc", [(-1, 2**31 - 1), (-3, 2**30)]), ("", [])):
        calls.clear()
        monkeypatch.setattr(platform, "libc_ver", lambda name=name: (name, "2"))
        keep_freed_memory.__wrapped__()
        assert calls == expected


@pytest.mark.parametrize("has", [True, False])
def test_bf16_is_named_where_the_cpu_has_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], has: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(cpu, "bf16_gain", lambda: 4.96)
    advise_bf16.__wrapped__()
    assert ("5.0 times as fast as FP32: --precision bf16" in capsys.readouterr().err) is has


def test_bf16_gain_is_a_ratio_of_times() -> None:
    assert 0 < bf16_gain() < 100


def test_a_resumed_run_goes_on_with_the_kernels_of_its_first_part(
    monkeypatch: pytest.MonkeyPatch, images: Path, tmp_path: Path
) -> None:
    """Four steps, stopped in the middle, measured anew or not: the losses of a run in one piece, to the last bit."""
    monkeypatch.setattr(kernels, "_SMALLEST", 0)
    monkeypatch.setenv("MAE_DEPLOY_CACHE", str(tmp_path / "first"))
    run_pretrain(pretraining(images, tmp_path / "whole"))
    chosen = read_json(tmp_path / "whole" / "checkpoints" / "last" / "state" / "progress.json")["kernels"]
    assert {name.split("/")[3] for name in chosen} == {"forward", "grad input", "grad weight", "attention"}

    take = step.Stepper.take

    def take_and_stop(*given: Any) -> step.StepNumbers:
        numbers = take(*given)
        signal.raise_signal(signal.SIGTERM)
        return numbers

    broken = pretraining(images, tmp_path / "broken", resume=True)
    with monkeypatch.context() as patch:
        patch.setattr(step.Stepper, "take", take_and_stop)
        with pytest.raises(Stopped):
            run_pretrain(broken)
    monkeypatch.setenv(
        "MAE_DEPLOY_CACHE", str(tmp_path / "second")
    )  # a machine that knows nothing, and would measure something else

    def unexpected(*_: object) -> dict[str, float]:
        raise AssertionError("measured again")

    monkeypatch.setattr(kernels, "measure", unexpected)
    run_pretrain(broken)
    assert [line["loss"] for line in read_metrics(broken.out)] == [
        line["loss"] for line in read_metrics(tmp_path / "whole")
    ]
