"""Two processes on a CPU (gloo): the same losses as one, in copies or in shares, moved from one number to another, and
stopped by signals.
"""

from __future__ import annotations

import math
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mae_deploy.checkpoint import open_checkpoint
from mae_deploy.pretrain.config import PretrainConfig
from mae_deploy.training.config import LoopConfig, Sharding
from mae_deploy.training.state.run_folder import read_metrics
from tests.data.image_folders import spoil, write_classes
from tests.training.tiny_runs import command, command_of, finetuning, losses_of, optim, pretraining, run_processes

STOPPED = 143


def run(config: Any, processes: int, *, signal_at: tuple[int, int, int] | None = None) -> list[int | None]:
    """Start or resume."""
    return run_processes(processes, command, command_of(config, "--resume"), signal_at)


def config_of(
    images: Path, out: Path, batch_size: int, *, loop: LoopConfig | None = None, **more: Any
) -> PretrainConfig:
    """Eleven images, four a step: two steps an epoch."""
    return pretraining(images, out, optim=optim(batch_size=batch_size, epochs=4, **more), loop=loop or LoopConfig())


def assert_same_losses(run: Path, expected: Path) -> None:
    lines, others = losses_of(run, "grad_norm"), losses_of(expected, "grad_norm")
    assert len(lines) == len(others) == 8
    for line, other in zip(lines, others, strict=True):
        assert line == pytest.approx(other, rel=1e-5)  # the same float32 sums in another order


def assert_same_tensors(run: Path, expected: Path, name: str = "model.safetensors") -> None:
    ours, theirs = (load_file(folder / "checkpoints" / "last" / name) for folder in (run, expected))
    assert set(ours) == set(theirs)
    for key, tensor in theirs.items():
        # AdamW divides by the size of gradients, some of them tiny: a tenth of the learning rate. Those of the keys'
        # bias are all rounding.
        if "qkv.bias" not in key:
            torch.testing.assert_close(ours[key], tensor, rtol=1e-3, atol=1e-4, msg=key)


@pytest.fixture
def alone(images: Path, tmp_path: Path) -> Path:
    """A run on one process."""
    config = config_of(images, tmp_path / "alone", 4)
    assert run(config, 1) == [0]
    return config.out


@pytest.mark.slow
def test_torchrun(images: Path, tmp_path: Path) -> None:
    broken = spoil(images / "03.png")
    # Checkpoints by the clock too: the main process's counts.
    config = pretraining(
        images,
        tmp_path / "run",
        optim=optim(batch_size=2, epochs=3, blr=0.64, lr=None),
        loop=LoopConfig(checkpoint_minutes=1e-4),
    )
    start = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "mae_deploy",
        *command_of(config),
    ]
    done = subprocess.run(start, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr

    lines = read_metrics(config.out)
    # Eleven images, four a step.
    assert [(line["step"], line["epoch"]) for line in lines] == [
        (1, 0.5),
        (2, 1.0),
        (3, 1.5),
        (4, 2.0),
        (5, 2.5),
        (6, 3.0),
    ]
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert lines[1]["lr"] == pytest.approx(0.64 * 4 / 256)
    assert open_checkpoint(config.out).metadata.step == 6
    listed = (config.out / "unreadable.txt").read_text(encoding="utf-8").splitlines()
    assert [line.partition(":")[0] for line in listed] == [str(broken)]
    assert list(config.out.rglob(".partial-*")) == []


def test_two_processes_have_the_losses_of_one(images: Path, alone: Path, tmp_path: Path) -> None:
    together = config_of(images, tmp_path / "together", 2)
    assert run(together, 2) == [0, 0]
    assert_same_losses(together.out, alone)
    assert_same_tensors(together.out, alone)


@pytest.mark.parametrize(
    ("processes", "batch_sizes"),
    [
        pytest.param((1, 2), (4, 4), marks=pytest.mark.slow),  # chosen: 2 images on each process
        ((2, 1), (2, 2)),  # chosen: two accumulated batches of 2
        pytest.param((2, 1), (2, 4), marks=pytest.mark.slow),  # given: the same product
    ],
)
def test_moved_to_another_number_of_processes_within_an_epoch(
    images: Path, alone: Path, tmp_path: Path, processes: Sequence[int], batch_sizes: Sequence[int]
) -> None:
    """Stopped in step 5, the first of an epoch of two."""
    out = tmp_path / "moved"
    codes = run(config_of(images, out, batch_sizes[0]), processes[0], signal_at=(processes[0] - 1, signal.SIGUSR1, 5))
    assert codes == [STOPPED] * processes[0]
    assert [line["step"] for line in read_metrics(out)] == [1, 2, 3, 4, 5]
    assert run(config_of(images, out, batch_sizes[1]), processes[1]) == [0] * processes[1]
    assert_same_losses(out, alone)


@pytest.mark.slow
def test_one_of_two_processes_is_killed_within_an_epoch(images: Path, tmp_path: Path) -> None:
    """The other ends too; resumed, the losses are those of the unbroken run, bit for bit."""
    whole = config_of(images, tmp_path / "whole", 2)
    assert run(whole, 2) == [0, 0]
    config = config_of(images, tmp_path / "run", 2, loop=LoopConfig(checkpoint_minutes=1e-9))
    codes = run(config, 2, signal_at=(1, signal.SIGKILL, 6))
    assert codes[1] == -signal.SIGKILL
    assert codes[0] not in (0, None)
    assert run(config, 2) == [0, 0]
    assert losses_of(config.out, "grad_norm") == losses_of(whole.out, "grad_norm")
    ours, theirs = (
        load_file(folder / "checkpoints" / "last" / "model.safetensors") for folder in (config.out, whole.out)
    )
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


@pytest.mark.slow
def test_shares_have_the_losses_of_copies(images: Path, tmp_path: Path) -> None:
    """FSDP2, stopped and resumed, then resumed in copies; with a moving average and clipped gradients."""
    more: dict[str, Any] = {"ema": 0.9, "clip_grad": 0.3}
    copies = config_of(images, tmp_path / "copies", 2, **more)
    assert run(copies, 2) == [0, 0]
    assert all(line["grad_norm"] > 0.3 for line in read_metrics(copies.out))

    shares = config_of(images, tmp_path / "shares", 2, loop=LoopConfig(sharding="fsdp2"), **more)
    for step in (3, 5):
        assert run(shares, 2, signal_at=(1, signal.SIGTERM, step)) == [STOPPED, STOPPED]
    assert [line["step"] for line in read_metrics(shares.out)] == [1, 2, 3, 4, 5]
    assert run(shares, 2) == [0, 0]
    assert_same_losses(shares.out, copies.out)
    for name in ("model.safetensors", "state/trained.safetensors", "state/optimizer.safetensors"):
        assert_same_tensors(shares.out, copies.out, name)
    assert (shares.out / "reconstruction-0004.png").is_file()

    mixed = config_of(images, tmp_path / "mixed", 2, loop=LoopConfig(sharding="fsdp2"), **more)
    assert run(mixed, 2, signal_at=(0, signal.SIGTERM, 5)) == [STOPPED, STOPPED]
    assert run(config_of(images, tmp_path / "mixed", 2, **more), 2) == [0, 0]
    assert_same_losses(mixed.out, copies.out)


@pytest.mark.slow
def test_a_classifier_in_shares_is_validated(tmp_path: Path) -> None:
    """Three validation images of each class: the processes have different numbers of them."""
    data = write_classes(tmp_path / "data")
    found = {}
    shardings: tuple[Sharding, ...] = ("ddp", "fsdp2")
    for sharding in shardings:
        more: dict[str, Any] = {"from_scratch": True, "model": "vit_nano_patch4", "image_size": (12, 8)}
        config = finetuning(
            data, tmp_path / sharding, None, optim=optim(batch_size=2), loop=LoopConfig(sharding=sharding), **more
        )
        assert run(config, 2) == [0, 0]
        found[sharding] = read_metrics(config.out, "eval.jsonl")
    for ours, theirs in zip(found["fsdp2"], found["ddp"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.slow
def test_rolled_back_in_shares(images: Path, tmp_path: Path) -> None:
    """A learning rate that no network survives; both processes end at the same step."""
    loop = LoopConfig(sharding="fsdp2", max_skips=1, max_rollbacks=1)
    config = config_of(images, tmp_path / "run", 2, loop=loop, lr=1e38, warmup_epochs=0.0, ema=0.9)
    assert run(config, 2) == [1, 1]
    lines = read_metrics(config.out)
    assert lines[-1]["skipped"] == 2
    assert lines[-1]["lr"] < 0.6e38
