"""TensorBoard always; other trackers are told the same, and a resumed run goes on with its record."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from accelerate.tracking import GeneralTracker, on_main_process

from mae_deploy.cli import main
from mae_deploy.errors import MissingDependency
from mae_deploy.training.config import LoopConfig
from mae_deploy.training.loop import make_accelerator
from mae_deploy.training.monitor import trackers
from tests.training.linear_runs import Planted, train
from tests.training.tiny_runs import command_of, optim, pretraining


class Recorder(GeneralTracker):  # type: ignore[misc]
    """What Weights & Biases' tracker is given."""

    name = "wandb"
    requires_logging_directory = False
    started: ClassVar[list[dict[str, Any]]] = []
    logged: ClassVar[list[tuple[int | None, dict[str, Any]]]] = []

    def __init__(self, project: str, **more: Any) -> None:
        super().__init__()
        self.more = {"project": project, **more}

    @property
    def tracker(self) -> Recorder:
        return self

    @on_main_process  # type: ignore[untyped-decorator]
    def start(self) -> None:
        self.started.append(self.more)

    @on_main_process  # type: ignore[untyped-decorator]
    def log(self, values: dict[str, Any], step: int | None = None, **more: Any) -> None:
        self.logged.append((step, values))


def test_a_tracker_is_told_every_step_and_its_record_goes_on(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "WandBTracker", Recorder)
    loop = LoopConfig(tracker=("wandb",))
    train(images, tmp_path / "run", optim(epochs=2), loop, loss=Planted([2]))
    assert [step for step, _ in Recorder.logged] == [1, 2, 3, 4]
    assert set(Recorder.logged[0][1]) == {
        "epoch",
        "loss",
        "bias",
        "grad_norm",
        "lr",
        "skipped",
        "images_per_second",
        "data_wait",
    }
    assert "loss" not in Recorder.logged[1][1]  # it was no number
    train(images, tmp_path / "run", optim(epochs=2), loop, resume=True)
    first, second = Recorder.started
    assert first["name"] == "run"
    assert first["id"] == second["id"] != ""


def test_a_package_that_is_not_there_is_named_before_anything_is_written(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        make_accelerator("cpu", "fp32", tmp_path, ("wandb",))
    except MissingDependency:
        pass
    else:
        pytest.skip("wandb is installed")
    config = pretraining(images, tmp_path / "run", loop=LoopConfig(tracker=("wandb",)))
    assert main(command_of(config)) == 3
    assert "pip install 'mae-deploy[wandb]'" in capsys.readouterr().err
    assert not config.out.exists()


def test_a_full_disk_names_what_it_is_full_of(tmp_path: Path) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    accelerator: Any = SimpleNamespace(init_trackers=lambda _: None, log=full, is_main_process=True)
    with pytest.raises(OSError, match="No space left") as caught:
        trackers.Trackers(accelerator, (), tmp_path, step=0).log({"loss": 1.0}, 1)
    assert caught.value.filename == str(tmp_path / "tensorboard")
