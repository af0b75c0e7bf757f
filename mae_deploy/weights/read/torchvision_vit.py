"""torchvision's `VisionTransformer`: tensors under the original's names, and what is known of its releases by the names
of their files.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from torchvision import models
from torchvision.transforms import InterpolationMode

from mae_deploy.checkpoint import NON_COMMERCIAL
from mae_deploy.errors import ConfigError
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.weights.read.files import GUESSED, Source, tensor_of

_NAMES = [
    (r"^class_token$", "cls_token"),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.ln\.", "norm."),
    (r"^heads\.head\.", "head."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(0|linear_1)\.", ".mlp.fc1."),
    (r"\.mlp\.(3|linear_2)\.", ".mlp.fc2."),
]
"""Its names, of releases before 0.14 too, to the original's."""


_MODELS = ("vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14")


def is_torchvision(source: Source) -> bool:
    """Whether the tensors have torchvision's names."""
    return {"class_token", "conv_proj.weight"} <= set(source.tensors)


def from_torchvision(source: Source) -> Source:
    """The same weights under the original's names.

    Raises:
        ConfigError: the head has a layer before it, or the patches come from several convolutions.
    """
    if found := [name for name in source.tensors if name.startswith(("heads.pre_logits.", "conv_proj.conv"))]:
        raise ConfigError(
            f"{source.file} has {found[0]}, and our encoder and classifier have neither a layer before the head"
            " (representation_size) nor a convolutional stem"
        )
    names = {_renamed(name): name for name in source.tensors}
    tensors = {name: source.tensors[own] for name, own in names.items()}
    source = replace(source, tensors=tensors, names=names, layout="torchvision", renamed=len(tensors))
    source.positions = "torchvision"
    source.pool = "cls"
    _take_release(source)
    return source


def _take_release(source: Source) -> None:
    """Preprocessing, classes and licence of a file that torchvision released; of another, the preprocessing of most."""
    shape = tensor_of(source, "patch_embed.proj.weight", 4).shape
    size = 224
    settings: dict[str, Any] = {}
    for release in _releases():
        if release.url.rsplit("/", 1)[-1] == source.file.name:
            settings = release.transforms.keywords  # what ImageClassification is made with
            size = settings["crop_size"]
            source.class_names = tuple(release.meta["categories"])
            source.licence = NON_COMMERCIAL if "SWAG" in release.meta.get("license", "") else None
            source.preprocess_from = f"torchvision's {release}"
            break
    else:
        source.preprocess_from = (
            f"{GUESSED}, that of most of torchvision's ViTs (256 pixels, of which 224 are cut out, bilinear): nothing"
            " in the file tells it"
        )
    interpolation = settings.get("interpolation", InterpolationMode.BILINEAR).value
    share = size / settings.get("resize_size", 256)
    if shape[1] == 3:
        source.preprocess = Preprocess(image_size=(size, size), crop_pct=share, interpolation=interpolation)


def _releases() -> list[Any]:
    """torchvision's weights of its ViTs; nothing is downloaded."""
    return [release for name in _MODELS for release in models.get_model_weights(name)]


def _renamed(name: str) -> str:
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    return name
