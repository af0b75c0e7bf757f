"""A signal ends a run in good order, with a checkpoint and a way on."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from mae_deploy.cli import main
from mae_deploy.data.config import DataConfig
from mae_deploy.training.monitor.signals import EXIT_STOPPED, STOPPING, Stopped, StopSignals
from mae_deploy.training.state.run_folder import read_metrics
from mae_deploy.training.step import StepBatch
from tests.training.linear_runs import squared_error, train
from tests.training.tiny_runs import (
    command,
    command_of,
    losses_of,
    optim,
    pretraining,
    progress_of,
    run_command,
    run_processes,
)


@pytest.mark.parametrize("name", STOPPING)
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint(images: Path, tmp_path: Path, name: str) -> None:
    number = getattr(signal, name)
    before = {each: signal.getsignal(getattr(signal, each)) for each in STOPPING}

    def loss(model: Any, batch: StepBatch) -> Any:
        if batch.step == 2 and not (tmp_path / "sent").exists():
            (tmp_path / "sent").touch()
            os.kill(os.getpid(), number)
        return squared_error(model, batch)

    with pytest.raises(Stopped, match=f"stopped by {name} after step 3 of 8; its checkpoint is in ") as caught:
        train(images, tmp_path / "run", optim(epochs=4), loss=loss)
    assert (caught.value.exit_code, caught.value.hint) == (143, f"go on with --resume {tmp_path / 'run'}")
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3]
    assert {each: signal.getsignal(getattr(signal, each)) for each in STOPPING} == before

    train(images, tmp_path / "run", optim(epochs=4), loss=loss, resume=True)
    whole = train(images, tmp_path / "whole", optim(epochs=4))
    assert losses_of(tmp_path / "run") == losses_of(whole.folder.path)


def test_on_the_command_line_with_workers(images: Path, tmp_path: Path) -> None:
    config = pretraining(images, tmp_path / "run", optim=optim(epochs=3), images=DataConfig(num_workers=1))
    assert run_processes(1, command, command_of(config), (0, signal.SIGTERM, 3)) == [EXIT_STOPPED]
    assert progress_of(config.out) == 3
    assert run_command(command_of(config, "--resume")) == 0
    assert progress_of(config.out) == 6


def as_if_stopped(signals: StopSignals) -> StopSignals:
    """A signal came before the first step."""
    signals.received = "SIGTERM"
    return signals


def test_what_is_said(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StopSignals, "__enter__", as_if_stopped)
    config = pretraining(images, tmp_path / "run")
    assert main(command_of(config)) == EXIT_STOPPED
    assert capsys.readouterr().err.splitlines()[-2:] == [
        f"error: stopped by SIGTERM after step 1 of 4; its checkpoint is in {config.out}",
        f"hint: go on with --resume {config.out}",
    ]


def test_a_second_ctrl_c_interrupts_at_once() -> None:
    inherited = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background jobs begin with SIGINT ignored
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGINT)
            assert signals.received == "SIGINT"
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, inherited)


def test_outside_of_the_main_thread_nothing_is_caught() -> None:
    def enter() -> None:
        with StopSignals():
            found.append(signal.getsignal(signal.SIGTERM))

    found: list[Any] = []
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [before]
