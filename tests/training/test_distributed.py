"""Two processes on a CPU (gloo), started as users start them."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

from mae_deploy.checkpoint import open_checkpoint
from mae_deploy.cli import main
from mae_deploy.training.config import LoopConfig
from mae_deploy.training.run_folder import read_metrics
from tests.data.image_folders import spoil
from tests.training.tiny_runs import command_of, optim, pretraining


@pytest.mark.slow
def test_two_processes_train_one_model(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = spoil(images / "03.png")
    # Checkpoints by the clock too: the processes have a clock each.
    config = pretraining(images, tmp_path / "run", optim=optim(batch_size=2, epochs=3, blr=0.64, lr=None), loop=LoopConfig(checkpoint_minutes=1e-4))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "mae_deploy", *command_of(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr

    lines = read_metrics(config.out)
    # Eleven images, four a step.
    assert [(line["step"], line["epoch"]) for line in lines] == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0), (5, 2.5), (6, 3.0)]
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert lines[1]["lr"] == pytest.approx(0.64 * 4 / 256)
    assert open_checkpoint(config.out).metadata.step == 6
    listed = (config.out / "unreadable.txt").read_text(encoding="utf-8").splitlines()
    assert [line.partition(":")[0] for line in listed] == [str(broken)]
    assert list(config.out.rglob(".partial-*")) == []

    assert main(command_of(config, "--resume")) == 2
    assert "--resume on 1 process(es) of a run on 2" in capsys.readouterr().err
