"""Run folders that mean harm, each made of one that can be resumed."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save_file

from tests.hostile.texts import RECIPES

Write = Callable[[Path], object]
"""Makes the copy of a run folder hostile."""

_LAST = "checkpoints/last"


def _file(name: str, content: bytes | Callable[[bytes], bytes]) -> Write:
    def write(run: Path) -> None:
        old = (run / name).read_bytes() if (run / name).is_file() else b""
        (run / name).unlink(missing_ok=True)
        (run / name).write_bytes(content if isinstance(content, bytes) else content(old))

    return write


def _json(name: str, edit: Callable[[Any], object]) -> Write:
    def change(content: bytes) -> bytes:
        value = json.loads(content)
        edit(value)
        return json.dumps(value).encode()

    return _file(name, change)


def _state(name: str, edit: Callable[[dict[str, torch.Tensor]], object]) -> Write:
    def write(run: Path) -> None:
        path = next(path for path in (run / _LAST).rglob("*.safetensors") if path.name == name)
        tensors = load(path.read_bytes())
        edit(tensors)
        save_file(tensors, path)

    return write


def _states(content: Callable[[bytes], bytes]) -> Write:
    """Every file of tensors of every checkpoint."""

    def write(run: Path) -> None:
        for path in run.rglob("*.safetensors"):
            if not path.is_symlink():
                path.write_bytes(content(path.read_bytes()))

    return write


def _setting(key: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda found: found.update({key: value})


class _Runs:
    def __reduce__(self) -> Any:
        return os.system, ("touch CANARY",)


def _link(target: str) -> Write:
    def write(run: Path) -> None:
        (run / _LAST).unlink()
        (run / _LAST).symlink_to(target)

    return write


def _step_folder(name: str) -> Write:
    return lambda run: (run / "checkpoints" / name).mkdir()


def _pipe(name: str) -> Write:
    def write(run: Path) -> None:
        (run / name).unlink(missing_ok=True)
        os.mkfifo(run / name)

    return write


_DEEP = b"[" * 50_000 + b"]" * 50_000
_VALUES: tuple[Any, ...] = (-1, 10**30, "x", None, [], float("nan"))
_PROGRESS = f"{_LAST}/state/progress.json"

RUNS: dict[str, Write] = {
    **{
        f"config.yaml of {name}": _file("config.yaml", content)
        for name, content in RECIPES.items()
        if "RECIPE" not in str(content)
    },
    "config.yaml with another seed": _file("config.yaml", lambda old: old.replace(b"seed: 3", b"seed: 4")),
    "config.yaml with a model of 10^9": _file(
        "config.yaml", lambda old: old.replace(b"embed_dim: 12", b"embed_dim: 1200000000")
    ),
    "config.yaml with other data": _file("config.yaml", lambda old: old.replace(b"data: images", b"data: /etc")),
    "metrics.jsonl cut off": _file("metrics.jsonl", lambda old: old[:-20]),
    "metrics.jsonl of garbage": _file("metrics.jsonl", bytes(range(256)) * 4),
    "metrics.jsonl of lists": _file("metrics.jsonl", b"[]\n5\nnull\n" * 9),
    "metrics.jsonl that is deep": _file("metrics.jsonl", _DEEP + b"\n"),
    "metrics.jsonl that is empty": _file("metrics.jsonl", b""),
    "metrics.jsonl of steps that are text": _file("metrics.jsonl", b'{"step": "x"}\n' * 9),
    "metrics.jsonl of steps of 10^400": _file("metrics.jsonl", b'{"step": 1' + b"0" * 400 + b"}\n"),
    "metrics.jsonl of NaN": _file("metrics.jsonl", b'{"step": NaN}\n'),
    "metrics.jsonl that is a pipe": _pipe("metrics.jsonl"),
    "data.json cut off": _file("data.json", b'{"images": 1'),
    "data.json that is deep": _file("data.json", _DEEP),
    "data.json that is a list": _file("data.json", b"[]"),
    "environment.json cut off": _file("environment.json", b"{"),
    "environment.json that is deep": _file("environment.json", _DEEP),
    "progress.json cut off": _file(_PROGRESS, b"{"),
    "progress.json that is a list": _file(_PROGRESS, b"[]"),
    "progress.json that is deep": _file(_PROGRESS, _DEEP),
    "progress.json of another key": _json(_PROGRESS, lambda value: value.update(unknown=1)),
    **{
        f"progress.json of {key} {value!r:.20}": _json(_PROGRESS, _setting(key, value))
        for key in ("step", "images", "lr_factor", "good", "rollback_at", "candidate")
        for value in _VALUES
    },
    "last that is a link out": _link("/etc"),
    "last that is a link to itself": _link("last"),
    "last that is a link to nothing": _link("absent"),
    "a step of 10^400": _step_folder("step-1" + "0" * 200),
    "a step below zero": _step_folder("step--5"),
    "a step of other digits": _step_folder("step-١٢"),
    "tensors that are pickles": _states(lambda old: pickle.dumps(_Runs(), protocol=2)),
    "tensors that are cut off": _states(lambda old: old[:-3]),
    "tensors of a huge header": _states(lambda old: struct.pack("<Q", 1 << 62) + old[8:]),
    "tensors that are zeros": _states(lambda old: bytes(len(old))),
    "optimiser of NaN": _state(
        "optimizer.safetensors", lambda tensors: [t.fill_(float("nan")) for t in tensors.values()]
    ),
    "optimiser of other shapes": _state(
        "optimizer.safetensors", lambda tensors: tensors.update({name: torch.zeros(3) for name in tensors})
    ),
    "optimiser of other names": _state("optimizer.safetensors", lambda tensors: tensors.update(x=torch.zeros(3))),
    "optimiser of less": _state("optimizer.safetensors", lambda tensors: tensors.popitem()),
    "optimiser of whole numbers": _state(
        "optimizer.safetensors",
        lambda tensors: tensors.update({name: t.to(torch.int64) for name, t in tensors.items()}),
    ),
    "weights of NaN": _state("model.safetensors", lambda tensors: [t.fill_(float("nan")) for t in tensors.values()]),
    "weights of less": _state("model.safetensors", lambda tensors: tensors.popitem()),
}
