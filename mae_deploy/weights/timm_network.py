"""Any timm model with the weights of a file, computed by timm itself: also those whose arithmetic our own encoder does
not have.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from torch import Tensor

from mae_deploy.errors import CheckFailed, ConfigError
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.progress import notice
from mae_deploy.weights.read.check_names import check_names
from mae_deploy.weights.read.check_numbers import check_numbers
from mae_deploy.weights.read.files import Source, find_weights, read_source
from mae_deploy.weights.read.timm_vit import SPDX, timm_evaluation

_SPARE = ("mask_token",)
"""Tensors of a pretraining that the features do not depend on."""


def build_timm(architecture: str, *, image_size: tuple[int, int] | None = None, num_classes: int = 0) -> Any:
    """`timm.create_model(architecture)` without weights; nothing is downloaded.

    Args:
        image_size: another than its own, for networks that are made for one.

    Raises:
        ConfigError: timm has no such model, or cannot build it.
    """
    _check_known(architecture)
    size: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
    try:
        return timm.create_model(architecture, pretrained=False, num_classes=num_classes, **size)
    except Exception as error:  # timm asserts and raises whatever its arguments lead to
        raise ConfigError(
            f"timm {timm.__version__} cannot build {architecture}: {' '.join(str(error).split())}"
        ) from error


def read_timm(path: Path, architecture: str) -> Source:
    """The weights of a model of timm's, the running average where there is one, without the prefix of a wrapper.

    Raises:
        ConfigError: no such file, or timm has no such model.
        CheckFailed: the file is damaged, or holds something else.
    """
    source = read_source(find_weights(path), average=True)
    with torch.device("meta"):
        first = next(iter(build_timm(architecture).state_dict()))
    prefixes = {name.removesuffix(first) for name in source.tensors if name.endswith(f".{first}")}
    if len(prefixes) == 1 and all(name.startswith(tuple(prefixes)) for name in source.tensors):
        source.tensors = {name.removeprefix(*prefixes): tensor for name, tensor in source.tensors.items()}
        source.notes.append(f"the prefix '{prefixes.pop()}' was taken off all names")
    for note in source.notes:
        notice("weights:", f"{path}: {note}")
    return source


def load_timm(model: Any, source: Source, architecture: str) -> None:
    """Put a file's weights into the model: every tensor of the model, and none that it does not know but a head's.

    Raises:
        CheckFailed: the file is not of this model.
    """
    tensors: dict[str, Tensor] = source.tensors
    convert: Callable[..., dict[str, Tensor]] | None = getattr(
        sys.modules[type(model).__module__], "checkpoint_filter_fn", None
    )
    if convert is not None:
        _check_patches(model, source)
        try:
            tensors = convert(dict(tensors), model)  # renames those of other releases, and resizes position embeddings
        except Exception as error:  # a file of another network: whatever it lacks
            raise CheckFailed(f"{source.file} is not of {architecture}: {' '.join(str(error).split())}") from error
    spare = (*_SPARE, *head_names(model.pretrained_cfg))
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tensors = {
        name: tensor.float() for name, tensor in tensors.items() if name in expected or not name.startswith(spare)
    }
    check_names(tensors, expected, source.file, model=architecture)
    check_numbers(tensors, source.file)
    model.load_state_dict(tensors)


def head_names(pretrained_cfg: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the layers that give the logits, the first of them the main one."""
    heads = pretrained_cfg.get("classifier") or "head"
    return (heads,) if isinstance(heads, str) else tuple(heads)


def count_classes(source: Source, architecture: str) -> int:
    """Width of the logits in a weights file of this model; 0 where it has no head.

    Raises:
        ConfigError: timm has no such model.
    """
    _check_known(architecture)
    known = timm.get_pretrained_cfg(architecture.partition(".")[0])
    head, *_ = head_names({} if known is None else known.to_dict())
    weight = source.tensors.get(f"{head}.weight")
    return 0 if weight is None else weight.shape[0]


def timm_licence(model: Any, architecture: str) -> str | None:
    """The licence that timm states for the weights of a tag; None where no tag says which weights they are."""
    licence: str | None = model.pretrained_cfg.get("license")
    return SPDX.get(str(licence), licence) if "." in architecture else None


def timm_preprocess(model: Any) -> Preprocess:
    """timm's evaluation transform in our terms, at the size that the model was built for."""
    config = resolve_data_config({}, model=model)
    _, height, width = config["input_size"]
    built: Any = getattr(getattr(model, "patch_embed", None), "img_size", None)
    size = (height, width) if built is None else (built[0], built[1])
    return timm_evaluation(model.pretrained_cfg, size, config["input_size"][0])


def _check_known(architecture: str) -> None:
    name, _, _ = architecture.partition(".")
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=1)
        raise ConfigError(
            f"timm {timm.__version__} has no model '{name}'",
            hint=f"did you mean '{near[0]}'?" if near else "see timm.list_models()",
        )


def _check_patches(model: Any, source: Source) -> None:
    """timm would resample patch embeddings of another size and go on."""
    own, given = (
        getattr(getattr(model, "patch_embed", None), "proj", None),
        source.tensors.get("patch_embed.proj.weight"),
    )
    if own is not None and given is not None and given.ndim == 4 and given.shape != own.weight.shape:
        raise CheckFailed(
            f"{source.file}: patch_embed.proj.weight has the shape {tuple(given.shape)}, not {tuple(own.weight.shape)}"
        )
