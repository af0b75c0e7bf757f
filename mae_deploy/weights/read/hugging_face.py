"""Hugging Face's `vit_mae` and `vit`: tensors under the original's names, the facts of config.json, and
preprocessor_config.json.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mae_deploy.errors import CheckFailed, ConfigError
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.weights.read.files import Source, read_settings, tensor_of

_MODEL_TYPES = ("vit_mae", "vit")

_NAMES = [
    (r"^(vit\.)?embeddings\.cls_token$", "cls_token"),
    (r"^(vit\.)?embeddings\.position_embeddings$", "pos_embed"),
    (r"^(vit\.)?embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^(vit\.)?layernorm\.", "norm."),
    (r"^(vit\.)?(encoder\.layer|layers)\.", "blocks."),
    (r"^classifier\.", "head."),
    (r"^decoder\.(mask_token|decoder_pos_embed)$", r"\1"),
    (r"^decoder\.(decoder_embed|decoder_norm|decoder_pred)\.", r"\1."),
    (r"^decoder\.(decoder_layers|decoder_encoder\.layer)\.", "decoder_blocks."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.(intermediate\.dense|mlp\.fc1)\.", ".mlp.fc1."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.(output\.dense|mlp\.fc2)\.", ".mlp.fc2."),
    (r"\.attention\.(attention\.)?(query|q_proj)\.", ".attn.q."),
    (r"\.attention\.(attention\.)?(key|k_proj)\.", ".attn.k."),
    (r"\.attention\.(attention\.)?(value|v_proj)\.", ".attn.v."),
]
"""Names as transformers 4 and 5 write them, to the original's; query, key and value are joined afterwards."""

_POOLER = re.compile(r"^(vit\.)?pooler\.")
"""A layer on top of the CLS token that `ViTModel` has; the tokens do not depend on it."""

_RESAMPLING = {0: "nearest", 2: "bilinear", 3: "bicubic"}
"""Pillow's numbers, as preprocessor_config.json has them."""

_DEFAULT_PREPROCESSING = "without preprocessor_config.json, images are prepared as the original MAE evaluates"


def is_hugging_face(source: Source) -> bool:
    """Whether the tensors have Hugging Face's names."""
    return any("embeddings.patch_embeddings" in name for name in source.tensors)


def from_hugging_face(source: Source) -> Source:
    """The same weights under the original's names.

    Raises:
        ConfigError: config.json tells of something that our encoder does not have.
        CheckFailed: a query without its key or value.
    """
    config = source.settings
    refuse_other_types(config)
    _refuse_other_models(config, decoder=any(name.startswith("decoder.") for name in source.tensors))
    dropped = [name for name in source.tensors if _POOLER.match(name)]
    tensors = _joined({_renamed(name): tensor for name, tensor in source.tensors.items() if name not in dropped})
    names = {_renamed(name): name for name in source.tensors}
    source = replace(
        source,
        tensors=tensors,
        names=names,
        layout="Hugging Face",
        renamed=len(source.tensors) - len(dropped),
        dropped=source.dropped + dropped,
    )
    source.num_heads, source.decoder_num_heads = (
        config.get("num_attention_heads"),
        config.get("decoder_num_attention_heads"),
    )
    if "image_size" in config:
        source.image_size = _pair(config["image_size"])
    if config.get("qkv_bias") is False:
        source.folded.append(_add_zero_biases(tensors))
    if settings := read_settings(source.file.with_name("preprocessor_config.json")):
        channels = tensor_of(source, "patch_embed.proj.weight", 4).shape[1]
        source.preprocess = _preprocess(settings, source.image_size or (224, 224), channels, source.notes)
    return source


def refuse_other_types(config: dict[str, Any]) -> None:
    """Other models have tensors of the same names.

    Raises:
        ConfigError: config.json names a model_type that is not read.
    """
    if (kind := config.get("model_type", "vit")) not in _MODEL_TYPES:
        raise ConfigError(
            f"config.json has model_type {kind}, which our encoder and decoder do not have",
            hint=f"models of type {' and '.join(_MODEL_TYPES)} are read; of others, timm's files by --model NAME",
        )


def _refuse_other_models(config: dict[str, Any], *, decoder: bool) -> None:
    """Nothing in the tensors would show these, and every output would be wrong."""
    width, hidden = config.get("decoder_hidden_size", 512), config.get("decoder_intermediate_size", 2048)
    eps = config.get("layer_norm_eps", 1e-12)
    problems = {
        f"hidden_act {config.get('hidden_act')}": config.get("hidden_act", "gelu") != "gelu",
        # A smaller one, such as transformers' default, changes nothing that shows: the released weights were trained
        # with 1e-6.
        f"layer_norm_eps {eps}, more than 1e-6": eps > 1e-6,
        f"decoder_intermediate_size {hidden}, not four times decoder_hidden_size {width}": (
            decoder and "decoder_hidden_size" in config and hidden != 4 * width
        ),
    }
    if found := [problem for problem, there in problems.items() if there]:
        raise ConfigError(
            f"config.json has {', '.join(found)}, which our encoder and decoder do not have",
            hint=f"models of type {' and '.join(_MODEL_TYPES)} are read, with gelu",
        )


def _renamed(name: str) -> str:
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _joined(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Query, key and value in one tensor, as timm and the original have them."""
    for name in [name for name in tensors if ".attn.q." in name]:
        parts = [tensors.pop(name.replace(".attn.q.", f".attn.{part}."), None) for part in "qkv"]
        if any(part is None for part in parts):
            raise CheckFailed(f"{name} lacks its key or value")
        tensors[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat([part for part in parts if part is not None])
    return tensors


def _add_zero_biases(tensors: dict[str, Tensor]) -> str:
    weights = [name for name in tensors if name.endswith(".attn.qkv.weight")]
    for name in weights:
        tensors[name.replace(".weight", ".bias")] = torch.zeros(tensors[name].shape[0])
    return f"{len(weights)} absent biases of query, key and value: zeros"


# --- preprocessing ---------------------------------------------------------------------------------------------------


def _preprocess(config: dict[str, Any], image_size: tuple[int, int], channels: int, notes: list[str]) -> Preprocess:
    """What the image processor does before the model, in our terms; `notes` says where ours differs."""
    # (x * rescale_factor - mean) / std, where ours is (x / 255 - mean) / std.
    scale = 255 * config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 255
    normalised = config.get("do_normalize", True)
    mean, std = (
        config.get(f"image_{name}", 0.5) if normalised else plain for name, plain in (("mean", 0.0), ("std", 1.0))
    )
    resample = config.get("resample", 2)
    if resample not in _RESAMPLING:
        raise ConfigError(
            f"preprocessor_config.json resizes with Pillow's filter {resample}, not with one of"
            f" {', '.join(_RESAMPLING.values())}",
            hint=_DEFAULT_PREPROCESSING,
        )
    return Preprocess(
        image_size=image_size,
        channels=channels,
        crop_pct=_crop_pct(config, notes),
        interpolation=_RESAMPLING[resample],
        mean=tuple(value / scale for value in _per_channel(mean, channels)),
        std=tuple(value / scale for value in _per_channel(std, channels)),
    )


def _crop_pct(config: dict[str, Any], notes: list[str]) -> float:
    """The crop's height as a share of the resized image's."""
    size, cropped = config.get("size", 224), bool(config.get("do_center_crop"))
    if not config.get("do_resize", True):
        if cropped:
            raise ConfigError(
                "preprocessor_config.json crops without resizing, which ours does not", hint=_DEFAULT_PREPROCESSING
            )
        return 1.0
    if isinstance(size, dict) and "shortest_edge" in size:
        resized = int(size["shortest_edge"])
    else:
        resized, _ = _pair(size)
        notes.append(
            "Hugging Face's preprocessing squeezes images into the input's form, ours cuts out the middle: the same for"
            " images of that form"
        )
    if not cropped:
        return 1.0
    crop, _ = _pair(config.get("crop_size", 224))
    if crop > resized:
        raise ConfigError(f"preprocessor_config.json crops {crop} pixels out of {resized}", hint=_DEFAULT_PREPROCESSING)
    share = crop / resized
    # Rounding must not take the resized side to one pixel less.
    return share if int(crop / share) == resized else math.nextafter(share, 0)


def _pair(size: Any) -> tuple[int, int]:
    """Height and width of a number, a pair, or a `{"height": …, "width": …}`."""
    if isinstance(size, dict) and {"height", "width"} <= set(size):
        return int(size["height"]), int(size["width"])
    if isinstance(size, int):
        return size, size
    if isinstance(size, list) and len(size) == 2:
        return int(size[0]), int(size[1])
    raise ConfigError(f"{size} is not a height and width")


def _per_channel(value: Any, channels: int) -> list[float]:
    values = [float(each) for each in value] if isinstance(value, list) else [float(value)]
    return values * channels if len(values) == 1 else values
