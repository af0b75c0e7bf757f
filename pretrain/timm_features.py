"""Features of any timm model from a weights file: also of those whose arithmetic our own encoder does not have."""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
from timm.data import resolve_data_config
from torch import Tensor, nn

from mae_deploy.errors import CheckFailed, ConfigError
from mae_deploy.models.name_report import check_names
from mae_deploy.models.weight_files import Source, find_weights, read_source
from mae_deploy.preprocess import Preprocess, default_preprocess
from mae_deploy.pretrain.evaluation_config import FeatureConfig
from mae_deploy.pretrain.features import ModuleFeatures
from mae_deploy.training.config import Device

_SPARE = ("mask_token",)
"""Tensors of a pretraining that the features do not depend on."""


class TimmFeatures(ModuleFeatures):
    """`timm.create_model(architecture)` with the weights of a file, under timm's own preprocessing; nothing is downloaded.

    The feature is the CLS token after the last norm, or with `avg` the mean of the patch tokens; for networks without tokens, what their head reads.
    """

    def __init__(self, path: Path, architecture: str, config: FeatureConfig, device: Device) -> None:
        model = _build(architecture, config.image_size)
        licence = _load(model, path, architecture)
        spec = _preprocess(model)
        pool, pooled = _pooling(model, config.pool)
        description = f"timm {architecture} at {spec.image_size[0]}x{spec.image_size[1]}, {pool}"
        super().__init__(model, pooled, spec, description, licence, config.precision, device)


def _build(architecture: str, image_size: tuple[int, int] | None) -> Any:
    name, _, _ = architecture.partition(".")
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=1)
        raise ConfigError(f"timm {timm.__version__} has no model '{name}'", hint=f"did you mean '{near[0]}'?" if near else "see timm.list_models()")
    size: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
    try:
        return timm.create_model(architecture, pretrained=False, num_classes=0, **size)
    except Exception as error:  # timm asserts and raises whatever its arguments lead to
        raise ConfigError(f"timm {timm.__version__} cannot build {architecture}: {' '.join(str(error).split())}") from error


def _load(model: Any, path: Path, architecture: str) -> str | None:
    """Put the file's weights into the model: every tensor of the model, and none that it does not know but a head's; returns the licence that timm states."""
    source = read_source(find_weights(path), average=True)
    tensors: dict[str, Tensor] = source.tensors
    convert: Callable[..., dict[str, Tensor]] | None = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is not None:
        _check_patches(model, source)
        try:
            tensors = convert(dict(tensors), model)  # renames those of other releases, and resizes position embeddings
        except Exception as error:  # a file of another network: whatever it lacks
            raise CheckFailed(f"{source.file} is not of {architecture}: {' '.join(str(error).split())}") from error
    heads = model.pretrained_cfg.get("classifier") or "head"
    spare = (*_SPARE, *((heads,) if isinstance(heads, str) else heads))
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tensors = {name: tensor.float() for name, tensor in tensors.items() if name in expected or not name.startswith(spare)}
    check_names(tensors, expected, source.file, model=architecture)
    model.load_state_dict(tensors)
    licence: str | None = model.pretrained_cfg.get("license")
    return licence if "." in architecture else None


def _check_patches(model: Any, source: Source) -> None:
    """timm would resample patch embeddings of another size and go on."""
    own, given = getattr(getattr(model, "patch_embed", None), "proj", None), source.tensors.get("patch_embed.proj.weight")
    if own is not None and given is not None and given.ndim == 4 and given.shape != own.weight.shape:
        raise CheckFailed(f"{source.file}: patch_embed.proj.weight has the shape {tuple(given.shape)}, not {tuple(own.weight.shape)}")


def _preprocess(model: Any) -> Preprocess:
    """timm's evaluation transform in our terms, at the size that the model was built for."""
    config = resolve_data_config({}, model=model)
    _, height, width = config["input_size"]
    built: Any = getattr(getattr(model, "patch_embed", None), "img_size", None)
    size = (height, width) if built is None else (built[0], built[1])
    channels = config["input_size"][0]
    settings: dict[str, Any] = {"crop_pct": config["crop_pct"], "interpolation": config["interpolation"]}
    if len(config["mean"]) == channels:
        settings |= {"mean": tuple(config["mean"]), "std": tuple(config["std"])}
    return dataclasses.replace(default_preprocess(size, channels), **settings)


def _pooling(model: Any, asked: str) -> tuple[str, Callable[[Tensor], Tensor]]:
    """What the feature is called, and how it is had."""
    prefix = getattr(model, "num_prefix_tokens", None)
    by_tokens = prefix is not None and hasattr(model, "blocks")
    # Without a norm after the blocks, what the head reads is the only feature that the network was trained to give.
    headed = isinstance(getattr(model, "norm", None), nn.Identity)
    offered = ("head",) if not by_tokens else ("avg",) if headed or not prefix else ("cls", "avg")
    pool = offered[0] if asked == "auto" else asked
    if pool not in offered:
        raise ConfigError(f"--pool {asked}, but {type(model).__name__} offers {' and '.join(offered)}", hint="leave --pool away")
    if offered == ("head",) or headed:
        return "what its head reads" if pool == "head" else pool, lambda images: model.forward_head(model.forward_features(images), pre_logits=True)

    def pooled(images: Tensor) -> Tensor:
        tokens: Tensor = model.forward_features(images)
        return tokens[:, 0] if pool == "cls" else tokens[:, prefix:].mean(dim=1)

    return pool, pooled
