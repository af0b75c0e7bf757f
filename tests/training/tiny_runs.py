"""Settings of runs that take a fraction of a second, and runs that are killed where a test wants them killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from mae_deploy.config import to_yaml
from mae_deploy.data.config import DataConfig
from mae_deploy.models.config import DecoderConfig, EncoderConfig
from mae_deploy.pretrain.config import FinetuneConfig, MixConfig, PretrainConfig
from mae_deploy.training.config import LoopConfig, OptimConfig
from mae_deploy.training.state.run_folder import read_metrics

# 3x2 patches of 5x5 pixels; nothing equals anything else.
ENCODER = EncoderConfig(name="tiny", image_size=(15, 10), patch_size=5, embed_dim=12, depth=2, num_heads=3)
DECODER = DecoderConfig(decoder_depth=1, decoder_embed_dim=8, decoder_num_heads=2)
STUDENT: dict[str, Any] = {"student": "vit_nano_patch4", "image_size": (12, 8), "patch_size": 4}
"""The smallest preset, with the same 3x2 grid."""
NO_MIX = MixConfig(drop_path=0.0, label_smoothing=0.0, mixup=0.0, cutmix=0.0, reprob=0.0, auto_augment=None)

SAME_EACH_TIME = ("step", "epoch", "loss", "lr")
"""What a resumed run repeats; the speed is the machine's."""


def optim(**more: Any) -> OptimConfig:
    return OptimConfig(**{"epochs": 2, "batch_size": 5, "lr": 1e-3, "warmup_epochs": 0.5, **more})


def pretraining(data: Path, out: Path, **more: Any) -> PretrainConfig:
    """Eleven images make two steps an epoch."""
    common: dict[str, Any] = {
        "model": ENCODER,
        "decoder": DECODER,
        "optim": optim(),
        "images": DataConfig(num_workers=0),
        "loop": LoopConfig(),
        "device": "cpu",
    }
    return PretrainConfig(data=str(data), out=out, **{**common, **more})


def finetuning(data: Path, out: Path, init: Path | None, **more: Any) -> FinetuneConfig:
    common: dict[str, Any] = {"optim": optim(), "images": DataConfig(num_workers=0), "mix": NO_MIX, "device": "cpu"}
    return FinetuneConfig(data=data, out=out, init=init, **{**common, **more})


def command_of(config: Any, *more: str) -> list[str]:
    """The arguments of `mae-deploy` that run this config, by way of a recipe beside its run folder."""
    recipe: Path = config.out.with_suffix(".yaml")
    recipe.write_text(to_yaml(config), encoding="utf-8")
    stage = type(config).__name__.removesuffix("Config").lower()
    return [stage, "--recipe", str(recipe), *more]


def losses_of(run: Path, *more: str) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` without what the machine's speed decides."""
    return [{key: line[key] for key in (*SAME_EACH_TIME, *more)} for line in read_metrics(run)]


# --- killing ---------------------------------------------------------------------------------------------------------

_CONTEXT = multiprocessing.get_context("forkserver")
_PRELOADED = [
    "mae_deploy.pretrain.run",
    "mae_deploy.pretrain.finetune",
    "mae_deploy.distill.run",
    "mae_deploy.cli",
    __name__,
]
_CONTEXT.set_forkserver_preload(_PRELOADED)
"""Torch is imported once for all runs: a fork of that server starts in milliseconds, as clean as a fresh
interpreter."""


def preload(module: str) -> None:
    """Import this module for all processes, too; before the first of them."""
    _CONTEXT.set_forkserver_preload([*_PRELOADED, module])


_WRITING = ("os.rename", "os.symlink", "os.remove", "os.mkdir", "os.rmdir")


def start_command(arguments: list[str], *, kill_at: int | None = None) -> ForkServerProcess:
    """Start `mae-deploy` in a process of its own.

    Args:
        kill_at: SIGKILL immediately before the process changes the run's files for that time, counted from 1.
    """
    process = _CONTEXT.Process(target=_main, args=(arguments, kill_at))
    process.start()
    return process


def start_process(function: Callable[..., Any], *arguments: Any) -> ForkServerProcess:
    """Call a module's function in a process of its own."""
    process = _CONTEXT.Process(target=function, args=arguments)
    process.start()
    return process


def run_processes(count: int, function: Callable[..., Any], *arguments: Any) -> list[int | None]:
    """Call a module's function in some processes that train together, as torchrun starts them; returns their exit
    codes.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        _CONTEXT.Process(target=_in_group, args=(rank, count, port, function, arguments)) for rank in range(count)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def _in_group(rank: int, count: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    function(*arguments)


def command(arguments: list[str], signal_at: tuple[int, int, int] | None = None) -> None:
    """Run `mae-deploy` and exit with its code.

    Args:
        signal_at: a process of the group, a signal, and the step in which the process gets it.
    """
    from mae_deploy.cli import main

    if signal_at is not None and signal_at[0] == int(os.environ["RANK"]):
        _signal_in_step(*signal_at[1:])
    sys.exit(main(arguments))


def _signal_in_step(number: int, step: int) -> None:
    from mae_deploy.training.step import Stepper

    take = Stepper.take

    def watched(self: Any, batches: Any, before: int, *arguments: Any) -> Any:
        if before + 1 == step:
            # As a batch system does it: to every process of the run.
            for process in (os.getpid(), *(worker.pid for worker in multiprocessing.active_children() if worker.pid)):
                os.kill(process, number)
        return take(self, batches, before, *arguments)

    Stepper.take = watched  # type: ignore[method-assign, assignment]


def run_command(arguments: list[str], *, kill_at: int | None = None) -> int:
    """Run `mae-deploy` as `start_command` does, and return its exit code; -9 where it was killed."""
    process = start_command(arguments, kill_at=kill_at)
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _main(arguments: list[str], kill_at: int | None) -> None:
    from mae_deploy.cli import main

    if kill_at is not None:
        recipe = Path(arguments[arguments.index("--recipe") + 1])
        _die_before_change(str(recipe.with_suffix("")), kill_at)
    sys.exit(main(arguments))


def _die_before_change(folder: str, number: int) -> None:
    changes = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal changes
        if event in _WRITING or (event == "open" and isinstance(arguments[1], str) and arguments[1][0] in "wax"):
            path = os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes | os.PathLike) else ""
            # A bare name is one of a folder that is being removed as a whole. TensorBoard's files are no state of ours.
            if (path.startswith(folder) or os.sep not in path) and "tfevents" not in path:
                changes += 1
                if changes == number:
                    os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def progress_of(run: Path) -> int:
    """Steps that the last complete checkpoint has seen."""
    file = run / "checkpoints" / "last" / "state" / "progress.json"
    return int(json.loads(file.read_text(encoding="utf-8"))["step"]) if file.is_file() else 0
