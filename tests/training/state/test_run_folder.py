"""The run folder refuses to be another run, forgets what no checkpoint has seen, and never deletes what it needs."""

from __future__ import annotations

import json
import os
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mae_deploy.config import from_dict
from mae_deploy.data.config import DataConfig
from mae_deploy.errors import CheckFailed, ConfigError
from mae_deploy.files import point_link
from mae_deploy.pretrain.config import PretrainConfig
from mae_deploy.recipe import read_recipe
from mae_deploy.training.config import LoopConfig
from mae_deploy.training.state.lock import LOCK
from mae_deploy.training.state.run_folder import RunFolder, read_metrics
from tests.training.tiny_runs import optim, pretraining

DATA = {"images": 11, "sha256": "abc"}


def config_of(tmp_path: Path, **more: Any) -> PretrainConfig:
    return pretraining(tmp_path / "images", tmp_path / "run", **more)


def opened(tmp_path: Path) -> RunFolder:
    return RunFolder.open(tmp_path / "run", config_of(tmp_path), DATA, resume=False)


def write_checkpoint_folder(folder: RunFolder, step: int) -> None:
    state = folder.checkpoints / f"step-{step}" / "state"
    state.mkdir(parents=True)
    (state / "progress.json").write_text(json.dumps({"step": step}), encoding="utf-8")
    for file in (state.parent / "model.safetensors", state / "optimizer.safetensors"):
        save_file({"weight": torch.ones(7)}, file)


def opened_with(run: Path, step: int) -> Path:
    """A checkpoint of another run."""
    folder = RunFolder.open(run, config_of(run), DATA, resume=False)
    write_checkpoint_folder(folder, step)
    return folder.checkpoints / f"step-{step}"


def steps_in(folder: RunFolder) -> set[str]:
    return {path.name for path in folder.checkpoints.iterdir() if not path.is_symlink()}


# --- opening ---------------------------------------------------------------------------------------------------------


def test_a_run_starts_with_its_config_data_and_environment(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    assert from_dict(PretrainConfig, read_recipe(folder.path / "config.yaml")) == config_of(tmp_path)
    assert json.loads((folder.path / "data.json").read_text(encoding="utf-8")) == DATA
    found = json.loads((folder.path / "environment.json").read_text(encoding="utf-8"))
    assert set(found) == {
        "mae_deploy",
        "python",
        "platform",
        "processor",
        "threads",
        "gpus",
        "packages",
        "command",
        "git_revision",
    }
    assert found["packages"]["torch"] == metadata.version("torch")
    assert folder.last is None


def test_a_folder_with_something_in_it_is_refused_without_resume(tmp_path: Path) -> None:
    opened(tmp_path)
    before = (tmp_path / "run" / "config.yaml").stat().st_mtime_ns
    with pytest.raises(ConfigError, match="already exists") as caught:
        opened(tmp_path)
    assert caught.value.hint is not None
    assert "--resume" in caught.value.hint
    assert (tmp_path / "run" / "config.yaml").stat().st_mtime_ns == before


def test_an_empty_folder_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert opened(tmp_path).path == tmp_path / "run"


def test_only_the_main_process_writes_and_refuses(tmp_path: Path) -> None:
    """The others come when the main one has begun to write into the same folder."""
    RunFolder.open(tmp_path / "run", config_of(tmp_path), DATA, resume=False, write=False)
    assert not (tmp_path / "run").exists()
    opened(tmp_path)
    RunFolder.open(tmp_path / "run", config_of(tmp_path), DATA, resume=False, write=False)


def test_resume_starts_what_a_kill_left_before_the_config(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "data.json").write_text('{"images": 7}', encoding="utf-8")
    RunFolder.open(tmp_path / "run", config_of(tmp_path), DATA, resume=True)
    assert json.loads((tmp_path / "run" / "data.json").read_text(encoding="utf-8")) == DATA


def test_resume_removes_what_a_kill_left_half_written(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    (folder.path / ".partial-123-config.yaml").touch()
    (folder.checkpoints / ".partial-123-step-7" / "state").mkdir(parents=True)
    (folder.checkpoints / ".partial-123-last").symlink_to("step-7")
    RunFolder.open(folder.path, config_of(tmp_path), DATA, resume=True)
    assert list(folder.path.rglob(".partial-*")) == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"mask_ratio": 0.5}, ["mask_ratio: 0.75 -> 0.5"]),
        ({"seed": 1}, ["seed: 0 -> 1"]),
        ({"optim": optim(epochs=5, clip_grad=1.0)}, ["optim.epochs: 2 -> 5", "optim.clip_grad: - -> 1"]),
        ({"images": DataConfig(num_workers=0, mean=(0.1, 0.2, 0.3))}, ["images.mean: - -> 0.1,0.2,0.3"]),
        ({"loop": LoopConfig(precision="fp32")}, ["loop.precision: auto -> fp32"]),
    ],
)
def test_resume_with_other_settings_names_them(tmp_path: Path, change: dict[str, Any], named: list[str]) -> None:
    opened(tmp_path)
    with pytest.raises(ConfigError, match="--resume with other settings") as caught:
        RunFolder.open(tmp_path / "run", config_of(tmp_path, **change), DATA, resume=True)
    assert all(text in str(caught.value) for text in named)
    assert str(caught.value).count("->") == len(named)


def test_resume_may_change_what_does_not_change_the_losses(tmp_path: Path) -> None:
    opened(tmp_path)
    loop = LoopConfig(checkpoint_every=3, checkpoint_minutes=1.0, keep_checkpoints=2, eval_every=2)
    changed = config_of(
        tmp_path, images=DataConfig(num_workers=2, max_corrupt=7, cache=True), loop=loop, pictures_every=3, resume=True
    )
    RunFolder.open(tmp_path / "run", changed, DATA, resume=True)
    # What is written is what now holds.
    assert from_dict(PretrainConfig, read_recipe(tmp_path / "run" / "config.yaml")) == changed


def test_resume_with_other_data_names_it(tmp_path: Path) -> None:
    opened(tmp_path)
    with pytest.raises(ConfigError, match=r"with other data: .*'images': 11.*then, .*'images': 12.* now"):
        RunFolder.open(tmp_path / "run", config_of(tmp_path), {"images": 12, "sha256": "abc"}, resume=True)


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_steps_that_no_checkpoint_has_seen_are_forgotten(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    for step in range(1, 6):
        folder.append("metrics.jsonl", {"step": step, "loss": 0.1 * step})
    folder.append("eval.jsonl", {"step": 2, "top1": 50.0})
    folder.append("eval.jsonl", {"step": 4, "top1": 60.0})
    with (folder.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 2')
    with (folder.path / "metrics.jsonl").open("ab") as damaged:
        damaged.write(bytes(range(256)))
    folder.forget_after(3)
    assert read_metrics(folder.path) == [{"step": step, "loss": 0.1 * step} for step in (1, 2, 3)]
    assert read_metrics(folder.path, "eval.jsonl") == [{"step": 2, "top1": 50.0}]
    folder.forget_after(0)
    assert read_metrics(folder.path) == []


def test_metrics_of_a_run_that_has_none(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    folder.forget_after(0)
    assert read_metrics(folder.path) == []


def test_metrics_that_are_no_file(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    os.mkfifo(folder.path / "metrics.jsonl")
    with pytest.raises(CheckFailed, match=r"metrics\.jsonl is no file"):
        folder.forget_after(0)


# --- checkpoints -----------------------------------------------------------------------------------------------------


def test_last_is_a_checkpoint_that_can_be_resumed(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    found = [folder.last]
    for step in (5, 9):
        write_checkpoint_folder(folder, step)
    (folder.checkpoints / "step-12").mkdir()  # a copy that was cut short
    for target in ("step-5", "step-6"):
        point_link(folder.checkpoints / "last", target)
        found.append(folder.last)
    assert found == [None, folder.checkpoints / "last", folder.checkpoints / "step-9"]


def test_a_run_copied_without_links_goes_on_from_its_newest_checkpoint(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    for step in (9, 10):  # by number, not by name
        write_checkpoint_folder(folder, step)
    assert folder.last == folder.checkpoints / "step-10"


def test_a_run_copied_with_folders_in_place_of_links(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    write_checkpoint_folder(folder, 4)
    shutil.copytree(folder.checkpoints / "step-4", folder.checkpoints / "last")
    assert folder.last == folder.checkpoints / "step-4"
    write_checkpoint_folder(folder, 8)
    point_link(folder.checkpoints / "last", "step-8")
    assert (folder.checkpoints / "last").resolve() == folder.checkpoints / "step-8"
    shutil.rmtree(folder.checkpoints / "step-4")
    shutil.rmtree(folder.checkpoints / "step-8")
    (folder.checkpoints / "last").unlink()
    shutil.copytree(opened_with(tmp_path / "other", 6), folder.checkpoints / "last")
    assert folder.last == folder.checkpoints / "last", "nothing but last was copied"


def test_a_file_system_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: str) -> None:
        raise OSError("operation not supported")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    folder = opened(tmp_path)
    for step in (2, 4, 6):
        write_checkpoint_folder(folder, step)
    for name, step in (("best", 2), ("last", 4)):
        point_link(folder.checkpoints / name, f"step-{step}")
    assert folder.last == folder.checkpoints / "step-4"
    folder.prune(1)
    assert steps_in(folder) - {"best", "last"} == {"step-2", "step-4", "step-6"}
    point_link(folder.checkpoints / "last", "step-6")
    assert folder.last == folder.checkpoints / "step-6"


@pytest.mark.parametrize(
    ("epochs", "steps"), [((0.5, 1.0, 1.5), ()), ((0.5,), (7,))], ids=["metrics", "half a checkpoint"]
)
def test_a_run_that_lost_its_checkpoints_does_not_start_again(
    tmp_path: Path, epochs: tuple[float, ...], steps: tuple[int, ...]
) -> None:
    folder = opened(tmp_path)
    for step, epoch in enumerate(epochs, 1):
        folder.append("metrics.jsonl", {"step": step, "epoch": epoch, "loss": 1.0})
    for step in steps:
        (folder.checkpoints / f"step-{step}").mkdir()
    before = (folder.path / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"whose metrics go to epoch .* finds no checkpoint to go on from"):
        RunFolder.open(tmp_path / "run", config_of(tmp_path), DATA, resume=True)
    assert (folder.path / "metrics.jsonl").read_bytes() == before


def test_a_run_killed_before_its_first_checkpoint_starts_again(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    for step, epoch in enumerate((0.5, 1.0), 1):
        folder.append("metrics.jsonl", {"step": step, "epoch": epoch, "loss": 1.0})
    assert RunFolder.open(tmp_path / "run", config_of(tmp_path), DATA, resume=True).last is None


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    for step in (9, 10, 2, 100):  # by number, not by name
        write_checkpoint_folder(folder, step)
    point_link(folder.checkpoints / "last", "step-100")
    point_link(folder.checkpoints / "best", "step-2")
    folder.prune(2)
    assert steps_in(folder) == {"step-2", "step-10", "step-100"}
    folder.prune(1, spare=10)
    assert steps_in(folder) == {"step-2", "step-10", "step-100"}
    folder.prune(1)
    assert steps_in(folder) == {"step-2", "step-100"}


def test_last_is_kept_where_it_is_not_the_newest(tmp_path: Path) -> None:
    """Killed between the writing of step 8 and the move of `last`, resumed from step 4, and a timed checkpoint at step
    6.
    """
    folder = opened(tmp_path)
    for step in (4, 8, 6):
        write_checkpoint_folder(folder, step)
    point_link(folder.checkpoints / "last", "step-6")
    folder.prune(1)
    assert steps_in(folder) == {"step-6", "step-8"}
    assert folder.last is not None


# --- damage, failed starts, two processes ----------------------------------------------------------------------------


def cut(file: Path) -> None:
    """Lose the end of a file, as a full disk does."""
    os.truncate(file, file.stat().st_size - 5)


@pytest.mark.parametrize("name", ["model.safetensors", "state/optimizer.safetensors", "state/progress.json"])
def test_a_damaged_checkpoint_steps_back_to_the_one_before(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = opened(tmp_path)
    for step in (4, 10):
        write_checkpoint_folder(folder, step)
    point_link(folder.checkpoints / "last", "step-10")
    damaged = folder.checkpoints / "step-10" / name
    cut(damaged)
    capsys.readouterr()
    again = RunFolder.open(tmp_path / "run", config_of(tmp_path), DATA, resume=True)
    assert again.last == folder.checkpoints / "step-4"
    said = capsys.readouterr().err
    assert said.startswith("damaged: ")
    assert str(damaged) in said
    assert said.endswith("going on from step-4\n")

    cut(folder.checkpoints / "step-4" / name)
    with pytest.raises(CheckFailed, match=f"{damaged}.*there is no checkpoint before it"):
        RunFolder.open(tmp_path / "run", config_of(tmp_path), DATA, resume=True)


def test_of_a_start_that_fails_before_the_first_step_nothing_is_left(tmp_path: Path) -> None:
    def fail(after: str | None) -> None:
        with RunFolder.open(tmp_path / "run", config_of(tmp_path), DATA, resume=False) as folder:
            if after is not None:
                (folder.path / after).write_text("{}\n", encoding="utf-8")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail(None)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="full"):
        fail("metrics.jsonl")
    assert (tmp_path / "run" / "metrics.jsonl").is_file()
    assert not (tmp_path / "run" / LOCK).exists()


def test_a_run_is_one_process_alone(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    (folder.path / LOCK).write_text(json.dumps({"host": platform.node(), "process": os.getppid()}), encoding="utf-8")
    with pytest.raises(ConfigError, match=f"being written by process {os.getppid()} on "):
        RunFolder.open(tmp_path / "run", config_of(tmp_path), DATA, resume=True)
    assert (folder.path / LOCK).is_file(), "what is refused leaves the other's lock alone"
