"""Which of a file's state dicts are the weights, and under which prefix a wrapper has put them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from mae_deploy.errors import CheckFailed, ConfigError

_WRAPPERS = ("model", "state_dict", "model_state", "model_state_dict", "module", "net", "network", "weights", "params")
"""Where training scripts put the weights."""
_AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
"""Where they put the running average of the weights."""
_TEACHER, _STUDENT = "teacher", "student"
"""What DINO and its descendants train: the teacher is the average of students, and what they evaluate."""

_WRAPPED = re.compile(r"(^|\.)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Of torch.compile, FSDP and activation checkpointing: they stand anywhere in a name."""
_PARALLEL = re.compile(r"^(?:module\.)+")
"""Of data parallelism and moving averages: before all names."""

_PATCHES = re.compile(
    r"^(.*?)(?:(?:(?:vit|dinov2|dinov2_with_registers|vision_model)\.)?embeddings\.patch_embeddings?(?:\.projection)?"
    r"|(?:backbone\.)?patch_embed\.projection|patch_embed(?:\.\d+)?\.proj|conv_proj)\.weight$"
)
"""The patch embedding as each layout that is read calls it, behind a wrapper's prefix."""

_BESIDE = re.compile(
    r"(?:^|\.)(?:head\.(?:mlp|last_layer)|dino_head|ibot_head)\.|(?:^|\.)n_averaged$"
    r"|^(?:criterion|loss\w*|\w*metrics?|(?:train|val|valid|test)_\w+)\."
)
"""Beside the encoder: DINO's projection heads, the counter of a moving average, losses and metrics of Lightning."""

_Path = tuple[str, ...]
"""The keys that lead to a state dict."""

_NAMED = 6
"""Names that a message gives."""


@dataclass(slots=True)
class StateDict:
    """Tensors by name, and what was done to get at them."""

    tensors: dict[str, Tensor]
    beside: dict[str, Any] = field(default_factory=dict)
    """What the file holds beside them, but for other weights and optimisers."""
    dropped: list[str] = field(default_factory=list)
    """Tensors beside the model's."""
    notes: list[str] = field(default_factory=list)
    """What was chosen where another choice was possible."""


def choose_state_dict(content: Any, file: Path, *, average: bool, key: str | None = None) -> StateDict:
    """The weights in the content of a file of torch.save, under their own names but for those of parallel, compiled and
    sharded modules.

    Args:
        average: take the running average of the weights where there is one, as timm does.
        key: where the weights are, as `teacher` or `callbacks.ema`.

    Raises:
        ConfigError: nothing is there.
        CheckFailed: none or several are there.
    """
    found = dict(_state_dicts(content))
    path = next((path for path in found if ".".join(path) == key), None) if key else _usual(found, average)
    if path is None and key:
        raise ConfigError(f"{file} has no state dict under --key {key}", hint=_holds(content, found))
    if path is None and found:
        raise CheckFailed(f"{file} holds several state dicts: {_listed(found)}", hint="say which: import … --key NAME")
    if path is None:
        raise CheckFailed(f"{file} holds no state dict of tensors", hint=_holds(content, found))
    chosen = StateDict(_unwrapped(found[path], file), _beside(content, path))
    others = {other: tensors for other, tensors in found.items() if other != path and len(tensors) > 1}
    if key is None and (others or not {*path} <= {*_WRAPPERS}):
        also = f", the file also has {_listed(others)}: --key takes another" if others else ""
        chosen.notes.append(f"the weights under '{'.'.join(path)}' are taken{also}")
    return chosen


def strip_prefix(tensors: dict[str, Tensor], file: Path, prefix: str | None = None) -> StateDict:
    """The tensors of a ViT without the prefix of what it is a part of.

    Args:
        prefix: which one to take, the rest is left out; None: the only one, if nothing but the ViT is there.

    Raises:
        ConfigError: nothing has this prefix.
        CheckFailed: there are several ViTs, or tensors of which it is not known whether the model needs them.
    """
    notes: list[str] = []
    prefixes = list(dict.fromkeys(match[1] for name in tensors if (match := _PATCHES.match(name))))
    if prefix is not None:
        prefix = prefix and prefix.rstrip(".") + "."
        if not any(name.startswith(prefix) for name in tensors):
            tops = dict.fromkeys(name.partition(".")[0] for name in tensors)
            raise ConfigError(
                f"no tensor of {file} begins with --prefix {prefix}", hint=f"they begin with {_some(list(tops))}"
            )
        chosen = prefix
    else:
        chosen = "" if not prefixes or "" in prefixes else _only(prefixes, file, notes)
    pools = any(name.endswith("head.probe") for name in tensors)  # SigLIP's, with an MLP of its own
    beside = [name for name in tensors if _BESIDE.search(name)] if prefixes and prefix is None and not pools else []
    outside = [name for name in tensors if not name.startswith(chosen) or name in beside]
    model = {name.removeprefix(chosen): tensor for name, tensor in tensors.items() if name not in outside}
    others = tuple(other for other in prefixes if other != chosen)
    unknown = [name for name in outside if name not in beside and not name.startswith(others or "\0")]
    if unknown and prefix is None:
        shapes = [f"{name} {tuple(tensors[name].shape)}" for name in unknown]
        raise CheckFailed(
            f"{file} has a ViT under '{chosen}' and {len(unknown)} tensors that are no part of it: {_some(shapes)}",
            hint=f"take the ViT alone: mae-deploy import {file} --prefix {chosen} --out CKPT",
        )
    if chosen:
        notes.append(f"the prefix '{chosen}' was taken off {len(model)} names")
    if outside:
        notes.append(f"{len(outside)} tensors beside the model are left out: {_some(outside)}")
    return StateDict(model, dropped=outside, notes=notes)


def _state_dicts(content: Any, path: _Path = (), depth: int = 4) -> Iterator[tuple[_Path, dict[str, Tensor]]]:
    """Every mapping of names to nothing but tensors, or to those of a ViT among others, by the keys that lead to it;
    optimisers' are passed over.
    """
    if not isinstance(content, dict):
        return
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if tensors and (len(tensors) == len(content) or any(map(_PATCHES.match, tensors))):
        yield path, tensors
    elif depth:
        for name, value in content.items():
            if isinstance(name, str) and not name.startswith("optim"):
                yield from _state_dicts(value, (*path, name), depth - 1)


def _usual(found: dict[_Path, dict[str, Tensor]], average: bool) -> _Path | None:
    """The key under which training scripts put the weights, alone or one within the other; else the only one that leads
    to a ViT.
    """
    order = (*(_AVERAGES if average else ()), *_WRAPPERS)
    if known := [path for path in found if {*path} <= {*order}]:
        return min(known, key=lambda path: [order.index(part) for part in path])
    if {(_TEACHER,), (_STUDENT,)} <= {*found}:
        return (_TEACHER,)
    vits = [path for path, tensors in found.items() if any(map(_PATCHES.match, tensors))] or list(found)
    return vits[0] if len(vits) == 1 else None


def _unwrapped(tensors: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    names = {name: _WRAPPED.sub(r"\1", name) for name in tensors}
    inner = {_PARALLEL.sub("", short): tensors[name] for name, short in names.items()}
    if len(inner) < len(tensors):
        raise CheckFailed(f"{file} holds the same tensors twice: with and without the prefix of a wrapper")
    return inner


def _beside(content: Any, path: _Path) -> dict[str, Any]:
    """The records on the way to the weights."""
    beside: dict[str, Any] = {}
    for part in path:
        heavy = (part, "optimizer", _STUDENT, _TEACHER, *_AVERAGES)
        beside |= {name: value for name, value in content.items() if name not in heavy}
        content = content[part]
    return beside


def _only(prefixes: list[str], file: Path, notes: list[str]) -> str:
    """The one prefix, or of a pair of student and teacher the teacher's."""
    teachers = [prefix for prefix in prefixes if _TEACHER in prefix]
    if len(prefixes) == 2 and len(teachers) == 1:
        student = teachers[0].replace(_TEACHER, _STUDENT)
        if student in prefixes:
            notes.append(f"the teacher is taken; the student stands under {student}")
            return teachers[0]
    if len(prefixes) > 1:
        raise CheckFailed(
            f"{file} holds {len(prefixes)} ViTs, under {' and '.join(prefixes)}",
            hint="say which: import … --prefix NAME",
        )
    return prefixes[0]


def _holds(content: Any, found: dict[_Path, dict[str, Tensor]]) -> str:
    if found:
        return f"it has {_listed(found)}"
    if not isinstance(content, dict):
        return f"it holds a {type(content).__name__}; save the model's state_dict() instead"
    kinds = [f"{name} ({type(value).__name__})" for name, value in content.items()]
    return f"its keys: {_some(kinds) or 'none'}"


def _listed(found: dict[_Path, dict[str, Tensor]]) -> str:
    return _some([f"'{'.'.join(path)}' ({len(tensors)} tensors)" for path, tensors in found.items()])


def _some(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (" …" if len(names) > _NAMED else "")
