"""One rule for `--device` and one for `--precision`, whatever the command."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from mae_deploy.cli import main
from mae_deploy.errors import MissingDependency
from mae_deploy.runtime.cuda.driver import Gpu
from mae_deploy.training import device as device_module
from mae_deploy.training.device import autocast, bf16_gain, resolve_device, resolve_precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("asked", "there", "expected"),
    [("auto", True, CUDA), ("auto", False, CPU), ("cpu", True, CPU), ("cpu", False, CPU), ("cuda", True, CUDA)],
)
def test_the_device(asked: Any, there: bool, expected: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(device_module, "_trial", lambda: None)
    assert resolve_device(asked) == expected


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MissingDependency, match="--device cuda, but torch sees no CUDA device"):
        resolve_device("cuda")


H200 = Gpu(index=0, name="NVIDIA H200", compute_capability=(9, 0), memory_bytes=1 << 37, driver="12.4")


@pytest.mark.parametrize("problem", ["no kernels", "old driver"])
def test_auto_is_a_gpu_that_computes_not_one_that_is_there(
    problem: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def is_available() -> bool:
        if problem == "old driver":
            warnings.warn("CUDA initialization: The NVIDIA driver\non your system is too old", stacklevel=1)
        return problem == "no kernels"

    device_module._trial.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    monkeypatch.setattr(torch, "ones", Mock(side_effect=RuntimeError("no kernel image\nis available")))
    monkeypatch.setattr(device_module, "gpus", lambda: [H200])
    try:
        assert [resolve_device("auto") for _ in range(2)] == [CPU] * 2
        why = {
            "no kernels": f"torch {torch.__version__} cannot compute on the GPU: no kernel image is available",
            "old driver": "torch sees no CUDA device (CUDA initialization: The NVIDIA driver on"
            " your system is too old)",
        }[problem]
        assert capsys.readouterr().err == f"CPU: --device auto computes on it: {why}\n", "once"
        with pytest.raises(MissingDependency, match=re.escape(why)):
            resolve_device("cuda")
    finally:
        device_module._trial.cache_clear()


@pytest.mark.parametrize(
    "command",
    [
        "pretrain {images} --out {out}",
        "finetune {classes} --init {run} --out {out}",
        "linprobe {classes} --init {run} --out {out}",
        "knn {classes} --init {run}",
        "compare {run} --data {classes}",
        "sweep {images} --labelled {classes} --mask-ratio 0.5 --out {out}",
        "distill {images} --teacher {run} --student vit_nano_patch4 --patch-size 5 --image-size 15,10 --out {out}",
        "reconstruct {images} --checkpoint {run} --out {out}.png",
        "export {run} --out {out} --samples {images}",
    ],
    ids=lambda command: command.split()[0],
)
def test_no_command_takes_another_device_than_the_one_asked_for(
    command: str,
    images: Path,
    classes: Path,
    pretrained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = command.format(images=images, classes=classes, run=pretrained, out=tmp_path / "out").split()
    capsys.readouterr()
    assert main([*words, "--device", "cuda"]) == 3
    assert "error: --device cuda, but torch sees no CUDA device\n" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("granted", "before", "variable", "expected"),
    [(1, 2, None, 1), (2, 1, None, 1), (None, 2, None, 2), (1, 2, "2", 2)],
)
def test_threads_on_a_cpu(
    granted: int | None, before: int, variable: str | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", variable)
    monkeypatch.setattr(device_module, "default_threads", lambda: granted)
    try:
        torch.set_num_threads(before)
        resolve_device("cpu")
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("avx512", "amx", "expected"), [(True, False, "bf16"), (False, True, "bf16"), (False, False, "fp32")]
)
def test_auto_on_a_cpu_is_what_it_multiplies_in(
    avx512: bool, amx: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert resolve_precision("auto", CPU, frozen=True) == expected
    assert resolve_precision("auto", CPU) == "fp32", "a training run is the same on every CPU"
    assert resolve_precision("fp32", CPU) == "fp32"


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_on_a_gpu(native: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda *, including_emulation: native and not including_emulation
    )
    assert resolve_precision("auto", CUDA) == expected
    assert resolve_precision("fp16", CUDA) == "fp16"


def test_fp16_needs_a_gpu() -> None:
    with pytest.raises(MissingDependency, match="--teacher-precision fp16"):
        resolve_precision("fp16", CPU, option="--teacher-precision")


def test_what_is_entered_for_a_precision() -> None:
    x = torch.ones(2, 2)
    for precision, expected in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("auto", torch.float32)):
        with autocast(precision, CPU)():  # type: ignore[arg-type]
            assert (x @ x).dtype == expected


@pytest.mark.parametrize(("native", "gain"), [(True, 4.0), (False, 0.125)])
def test_bf16_that_would_be_emulated_is_said_with_the_measured_factor(
    native: bool, gain: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    device_module._say_emulated.cache_clear()
    monkeypatch.setattr(device_module, "multiplies_bf16", lambda _: native)
    monkeypatch.setattr(device_module, "bf16_gain", lambda _: gain)
    assert [resolve_precision("bf16", CPU) for _ in range(2)] == ["bf16"] * 2
    assert resolve_precision("auto", CPU, frozen=True) == ("bf16" if native else "fp32")
    said = capsys.readouterr().err
    device_module._say_emulated.cache_clear()
    assert said == (
        ""
        if native
        else "bf16: --precision bf16 is emulated: this CPU has no products in BF16, which take 8.0 times as long as in"
        " FP32; --precision fp32 is faster\n"
    )


def test_the_gain_is_measured() -> None:
    assert 0 < bf16_gain(CPU) < 100
