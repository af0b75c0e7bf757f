"""The run folder: config, environment, metrics, checkpoints; everything survives a kill at any moment."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch

from mae_deploy import __version__
from mae_deploy.checkpoint import steps_in
from mae_deploy.config import differences, from_dict, to_yaml
from mae_deploy.errors import CheckFailed, ConfigError
from mae_deploy.files import (
    follow_link,
    read_json,
    refuse_to_overwrite,
    remove,
    remove_partial,
    remove_whole,
    write_json,
    write_text,
)
from mae_deploy.progress import notice
from mae_deploy.recipe import ENVIRONMENT, RUN_CONFIG, check_written_by, read_recipe
from mae_deploy.text import parse_json
from mae_deploy.training.state.lock import LOCK, RunLock
from mae_deploy.training.state.progress import PROGRESS, STATE, damage

C = TypeVar("C")


_AT_START = {RUN_CONFIG, "data.json", ENVIRONMENT, LOCK, "checkpoints", "tensorboard", "profile"}
"""What is in the folder of a run that has not come as far as its first step."""


class RunFolder:
    """A folder with `config.yaml`, `environment.json`, `metrics.jsonl`, `eval.jsonl`, `unreadable.txt`, `checkpoints/`,
    `tensorboard/`; as a context, this process's alone until the block ends.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self._lock: RunLock | None = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Let go of the folder; of a start that failed before the first step, nothing is left."""
        if self._lock is None:
            return
        self._lock.release()
        if error is not None and not any(self.checkpoints.iterdir()) and {*os.listdir(self.path)} <= _AT_START:
            remove(self.path)

    @classmethod
    def open(cls, path: Path, config: Any, data: dict[str, Any], *, resume: bool, write: bool = True) -> RunFolder:
        """Start a run, or go on with one (or start it, where a kill came before the first file).

        Args:
            config: the stage's config, a dataclass.
            data: the fingerprint of its data.
            write: only the main process writes.

        Raises:
            ConfigError: the folder holds something and `resume` was not asked for, what is resumed differs, or another
                process is at work in it.
            CheckFailed: what is resumed has damaged checkpoints only.
        """
        folder = cls(path)
        if write and not resume:  # the other processes may come here when the main one has begun to write
            refuse_to_overwrite(path, hint="pass --resume to go on with this run, or choose another --out", filled=True)
        if resume and (path / RUN_CONFIG).is_file():
            _check_same_run(path, config, data)
            folder._check_not_lost(config)
            if write:
                folder._report_damage()
        if write:
            folder.checkpoints.mkdir(parents=True, exist_ok=True)
            lock = RunLock(path)
            lock.acquire()
            folder._lock = lock
            for place in (path, folder.checkpoints):
                remove_partial(place)
            # The config is written last: where it is, everything that a resumption reads is there too.
            write_json(path / "data.json", data)
            write_json(path / ENVIRONMENT, environment())
            write_text(path / RUN_CONFIG, to_yaml(config))
        return folder

    def _check_not_lost(self, config: Any) -> None:
        """A run that has written checkpoints never starts again at step 0, over its metrics and checkpoints.

        Raises:
            ConfigError: there is no checkpoint to resume from where one has been written.
        """
        if self.last is not None:
            return
        if damaged := self._damaged():
            raise CheckFailed(
                f"--resume of {self.path}: {damaged[0]}, and there is no checkpoint before it",
                hint="copy the run again, or start a new one with another --out",
            )
        epoch = max((line.get("epoch", 0) for line in _lines(self.path / "metrics.jsonl")), default=0)
        # step-0 is a probe's that is fitted without steps, and has no state.
        unfinished = [folder.name for folder in steps_in(self.checkpoints) if folder.name != "step-0"]
        if unfinished or epoch > config.loop.checkpoint_every:
            there = f"{', '.join(unfinished)} without their state" if unfinished else "none"
            raise ConfigError(
                f"--resume of {self.path}, whose metrics go to epoch {epoch:.2f}, finds no checkpoint to go on from:"
                f" {there} in {self.checkpoints}",
                hint="copy the run again with checkpoints/step-*, or start a new one with another --out",
            )

    def _damaged(self) -> list[str]:
        """What is wrong with each checkpoint that has a state and cannot be resumed from, the newest first."""
        steps = [step for step in steps_in(self.checkpoints) if (step / STATE / PROGRESS).is_file()]
        return [found for step in reversed(steps) if (found := damage(step)) is not None]

    def _report_damage(self) -> None:
        for found in self._damaged():
            assert self.last is not None
            notice("damaged:", f"{found}; going on from {self.last.resolve().name}")

    @property
    def last(self) -> Path | None:
        """The checkpoint to resume from: what `last` points to; where that is damaged, or the run was copied without
        its links, or with folders in their place, the newest whole one.
        """
        folder = follow_link(self.checkpoints / "last")
        if _resumable(folder) and (folder.is_symlink() or folder.name != "last"):
            return folder
        complete = [step for step in steps_in(self.checkpoints) if _resumable(step)]
        if complete:
            return complete[-1]
        return folder if _resumable(folder) else None

    def append(self, name: str, line: dict[str, Any]) -> None:
        """Add one line to a JSONL file; what is not finite becomes null."""
        valid = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in line.items()
        }
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(valid, allow_nan=False) + "\n")

    def forget_after(self, step: int) -> None:
        """Drop the metrics of steps that the checkpoint at `step` has not seen, and a half-written last line."""
        for name in ("metrics.jsonl", "eval.jsonl"):
            path = self.path / name
            if path.is_file():
                kept = [
                    line
                    for line in path.read_text(encoding="utf-8", errors="replace").splitlines()
                    if (found := _step_of(line)) is not None and found <= step
                ]
                write_text(path, "".join(line + "\n" for line in kept))
            elif path.exists():
                raise CheckFailed(f"{path} is no file")

    def prune(self, keep: int, *, spare: int | None = None) -> None:
        """Delete all but the newest `keep` checkpoints, those that `best` and `last` point to, and that of step
        `spare`.
        """
        steps = steps_in(self.checkpoints)
        # `last` is not always the newest: a kill between the writing of a checkpoint and the move of `last` leaves a
        # newer one.
        links = (follow_link(self.checkpoints / name) for name in ("best", "last"))
        pointed_to = {link.resolve() for link in links if link.exists()}
        for folder in steps[:-keep]:
            if folder.resolve() not in pointed_to and folder.name != f"step-{spare}":
                remove_whole(folder)


def _resumable(checkpoint: Path) -> bool:
    return (checkpoint / STATE / PROGRESS).is_file() and damage(checkpoint) is None


def read_metrics(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The lines of a run's JSONL file."""
    return _lines(run / name)


def environment() -> dict[str, Any]:
    """What this run ran on: versions, machine, command, git revision of the working folder."""
    packages: dict[str, str | None] = {}
    for name in ("torch", "torchvision", "timm", "accelerate", "numpy", "pillow", "safetensors"):
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            packages[name] = None
    return {
        "mae_deploy": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "packages": packages,
        "command": sys.argv,
        "git_revision": _git_revision(),
    }


def _check_same_run(path: Path, config: Any, data: dict[str, Any]) -> None:
    check_written_by(path)
    stored = from_dict(type(config), read_recipe(path / RUN_CONFIG))
    changed = differences(stored, config)
    if changed:
        raise ConfigError(
            f"--resume with other settings than {path} was started with: {'; '.join(changed)}",
            hint=_other_epochs(path, stored, config) or "leave them out, or start a new run with another --out",
        )
    before = read_json(path / "data.json")
    if before != data:
        raise ConfigError(f"--resume of {path} with other data: {before} then, {data} now")


def _other_epochs(path: Path, stored: Any, config: Any) -> str | None:
    """What to do instead of resuming with more epochs or fewer."""
    if stored.optim.epochs == config.optim.epochs:
        return None
    return (
        f"the learning rate's schedule is one of {stored.optim.epochs} epochs from the first step on; start a new run"
        f" with another --out: pretrain, finetune and distill go on from these weights with --init {path}"
    )


def _git_revision() -> str | None:
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _lines(path: Path) -> list[dict[str, Any]]:
    """A JSONL file's lines, without one that a kill cut short or something else has damaged."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    found = []
    for line in text.splitlines():
        try:
            value = parse_json(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def _step_of(line: str) -> int | None:
    try:
        return int(parse_json(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError):
        return None
