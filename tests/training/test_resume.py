"""A run that is killed at any moment and resumed repeats the losses, the learning rates and the weights of the unbroken
run, bit for bit.

FP32 on a CPU. Killed runs are processes of their own that get SIGKILL, as a power cut or a batch system would end them.
"""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mae_deploy.checkpoint import WEIGHTS, open_checkpoint
from mae_deploy.cli import main
from mae_deploy.data.config import DataConfig
from mae_deploy.distill.config import DistillConfig, FeatureObjectiveConfig
from mae_deploy.pretrain.config import MixConfig
from mae_deploy.pretrain.finetune import run_finetune
from mae_deploy.pretrain.run import run_pretrain
from mae_deploy.training.config import LoopConfig
from mae_deploy.training.state.progress import REST
from mae_deploy.training.state.run_folder import read_metrics
from tests.data.image_folders import write_classes, write_noise
from tests.training.tiny_runs import (
    DECODER,
    STUDENT,
    command_of,
    finetuning,
    losses_of,
    optim,
    pretraining,
    progress_of,
    run_command,
    start_command,
)

SIGKILLED = -9


def resume_until_done(config: Any, kill_before: Iterable[int]) -> int:
    """Kill before each of these changes of the run's files in turn, then let it finish; returns how often it was
    killed.
    """
    command = command_of(config, "--resume")
    kills = 0
    for number in kill_before:
        before = progress_of(config.out)
        code = run_command(command, kill_at=number)
        if code == 0:
            return kills
        assert code == SIGKILLED
        kills += 1
        assert progress_of(config.out) >= before
        if progress_of(config.out) > 0:
            # Whatever was being written, the last checkpoint is whole.
            assert open_checkpoint(config.out / "checkpoints" / "last").tensors() != {}
    assert run_command(command) == 0
    return kills


def assert_same_run(resumed: Path, whole: Path, *more: str) -> None:
    assert len(losses_of(whole)) > 0
    assert losses_of(resumed, *more) == losses_of(whole, *more)
    assert read_metrics(resumed, "eval.jsonl") == read_metrics(whole, "eval.jsonl")
    last, expected = (load_file(run / "checkpoints" / "last" / WEIGHTS) for run in (resumed, whole))
    assert set(last) == set(expected)
    assert [name for name in expected if not torch.equal(last[name], expected[name])] == []
    assert list(resumed.rglob(".partial-*")) == []


def lines_of(run: Path) -> list[str]:
    """The metrics of a run that is still writing them."""
    path = run / "metrics.jsonl"
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def wait_for_a_step(run: Path, alive: Callable[[], bool]) -> None:
    """Until the metrics change: a resumed run first forgets some of them."""
    before = lines_of(run)
    while lines_of(run) == before and alive():
        time.sleep(0.005)


@pytest.mark.slow
def test_pretraining_killed_before_any_change_of_its_files(images: Path, tmp_path: Path) -> None:
    """From the first file to the first checkpoint before every sixth change, then before every second around the
    checkpoints that replace another.
    """
    settings = optim(epochs=3, accum_iter=2, batch_size=2)
    run_pretrain(pretraining(images, tmp_path / "whole", optim=settings))
    kills = resume_until_done(
        pretraining(images, tmp_path / "resumed", optim=settings), [*range(1, 46, 6), *range(37, 60, 2)]
    )
    assert kills > 12
    assert_same_run(tmp_path / "resumed", tmp_path / "whole")


@pytest.mark.slow
def test_pretraining_killed_at_random_times(images: Path, tmp_path: Path) -> None:
    """First the command itself, as a user starts it, with workers; then again and again by the clock."""
    settings = optim(epochs=30)
    run_pretrain(pretraining(images, tmp_path / "whole", optim=settings))
    config = pretraining(images, tmp_path / "resumed", optim=settings, images=DataConfig(num_workers=2))
    command = command_of(config, "--resume")
    moment = random.Random(0)
    with subprocess.Popen(
        [sys.executable, "-m", "mae_deploy", *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as user:
        wait_for_a_step(config.out, lambda: user.poll() is None)
        time.sleep(moment.uniform(0, 0.05))
        user.kill()
    assert user.returncode == SIGKILLED
    assert len(lines_of(config.out)) > 0
    for _ in range(3):
        process = start_command(command)
        wait_for_a_step(config.out, process.is_alive)
        time.sleep(moment.uniform(0, 0.05))
        process.kill()
        process.join()
        assert process.exitcode in (SIGKILLED, 0)
    assert run_command(command) == 0
    assert_same_run(tmp_path / "resumed", tmp_path / "whole")


def test_pretraining_killed_between_checkpoints(images: Path, tmp_path: Path) -> None:
    """Mid-epoch, with timed checkpoints at each step, other workers and a cache."""
    settings = optim(epochs=3)
    run_pretrain(pretraining(images, tmp_path / "whole", optim=settings))
    config = pretraining(images, tmp_path / "resumed", optim=settings)
    loop = LoopConfig(checkpoint_minutes=1e-9)
    every_step = pretraining(
        images, tmp_path / "resumed", optim=settings, images=DataConfig(num_workers=1, cache=True), loop=loop
    )
    assert run_command(command_of(every_step, "--resume"), kill_at=100) == SIGKILLED
    assert progress_of(config.out) == 3
    assert run_command(command_of(config, "--resume")) == 0
    assert_same_run(tmp_path / "resumed", tmp_path / "whole")


def test_resuming_a_finished_run_changes_nothing(images: Path, tmp_path: Path) -> None:
    config = pretraining(images, tmp_path / "run")
    first = run_pretrain(config)
    metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    again = run_pretrain(pretraining(images, tmp_path / "run", resume=True))
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics
    assert again == first


def test_fine_tuning(tmp_path: Path) -> None:
    """With every source of randomness that the recipe has, and best and last checkpoints."""
    data = write_classes(tmp_path / "data")
    run_pretrain(pretraining(data / "train", tmp_path / "pretrained"))
    more = {"optim": optim(epochs=4), "mix": MixConfig(drop_path=0.3)}
    run_finetune(finetuning(data, tmp_path / "whole", tmp_path / "pretrained", **more))
    # Opening takes 17 changes, an epoch about 25.
    assert resume_until_done(finetuning(data, tmp_path / "resumed", tmp_path / "pretrained", **more), [21, 48, 60]) == 3
    assert_same_run(tmp_path / "resumed", tmp_path / "whole")
    best = [open_checkpoint(tmp_path / run / "checkpoints" / "best").metadata for run in ("resumed", "whole")]
    assert (best[0].step, best[0].metrics) == (best[1].step, best[1].metrics)


def test_distilling_features_with_the_projector(images: Path, tmp_path: Path) -> None:
    run_pretrain(pretraining(images, tmp_path / "teacher"))

    def config(name: str) -> DistillConfig:
        common: dict[str, Any] = {
            "optim": optim(epochs=3),
            "images": DataConfig(num_workers=0),
            "decoder": DECODER,
            "features": FeatureObjectiveConfig(mask_ratio=0.5),
        }
        return DistillConfig(
            data=images, teacher=tmp_path / "teacher", out=tmp_path / name, device="cpu", **STUDENT, **common
        )

    assert run_command(command_of(config("whole"))) == 0
    assert resume_until_done(config("resumed"), [25, 46, 55]) == 3
    assert_same_run(tmp_path / "resumed", tmp_path / "whole", "feature_loss", "pixel_loss")
    projectors = [load_file(tmp_path / run / "checkpoints" / "last" / "state" / REST) for run in ("resumed", "whole")]
    assert set(projectors[0]) == {f"objectives.feature.projectors.0.{name}" for name in ("weight", "bias")}
    assert all(torch.equal(projectors[0][name], tensor) for name, tensor in projectors[1].items())


def test_distilling_logits(tmp_path: Path) -> None:
    data = write_classes(tmp_path / "data")
    write_noise(tmp_path / "more", 5)
    run_finetune(
        finetuning(data, tmp_path / "teacher", None, from_scratch=True, model="vit_nano_patch4", image_size=(12, 8))
    )

    def config(name: str) -> DistillConfig:
        common: dict[str, Any] = {"optim": optim(epochs=3), "images": DataConfig(num_workers=0)}
        return DistillConfig(
            data=data, teacher=tmp_path / "teacher", out=tmp_path / name, device="cpu", **STUDENT, **common
        )

    assert run_command(command_of(config("whole"))) == 0
    assert resume_until_done(config("resumed"), [22, 47]) == 2
    assert_same_run(tmp_path / "resumed", tmp_path / "whole", "logits_loss", "label_loss")


# --- refusals, as the command line says them -------------------------------------------------------------------------


def test_without_resume_a_run_is_not_overwritten(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = pretraining(images, tmp_path / "run")
    run_pretrain(config)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    assert main(command_of(config)) == 2
    assert capsys.readouterr().err.splitlines()[-2:] == [  # behind the line that says what the data are
        f"error: --out {tmp_path / 'run'} already exists",
        "hint: pass --resume to go on with this run, or choose another --out",
    ]
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_resume_refuses_other_settings_and_other_data(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_pretrain(pretraining(images, tmp_path / "run"))
    capsys.readouterr()
    assert (
        main(command_of(pretraining(images, tmp_path / "run", mask_ratio=0.5, optim=optim(epochs=3)), "--resume")) == 2
    )
    assert "mask_ratio: 0.75 -> 0.5; optim.epochs: 2 -> 3" in capsys.readouterr().err
    write_noise(images, 1, first=11)
    assert main(command_of(pretraining(images, tmp_path / "run"), "--resume")) == 2
    assert "with other data: {'images': 11, " in capsys.readouterr().err


def test_resume_takes_the_settings_of_the_run(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--resume RUN` is enough, also where the run was moved; what is given must be as it was."""
    config = pretraining(images, tmp_path / "run", optim=optim(epochs=3))
    run_pretrain(pretraining(images, tmp_path / "whole", optim=optim(epochs=3)))
    assert run_command(command_of(config), kill_at=40) == SIGKILLED
    moved = config.out.rename(tmp_path / "moved")
    assert main(["pretrain", "--resume", str(moved)]) == 0
    assert main(["pretrain", "--out", str(moved), "--resume", "--num-workers", "1"]) == 0
    assert_same_run(moved, tmp_path / "whole")

    capsys.readouterr()
    assert main(["pretrain", "--resume", str(moved), "--epochs", "5", "--mask-ratio", "0.5"]) == 2
    said = capsys.readouterr().err
    assert "mask_ratio: 0.75 -> 0.5; optim.epochs: 3 -> 5" in said
    assert f"from these weights with --init {moved}" in said
    assert main(["pretrain", "--resume", str(tmp_path / "nothing")]) == 2
    assert f"error: --resume {tmp_path / 'nothing'}: no run is there" in capsys.readouterr().err
