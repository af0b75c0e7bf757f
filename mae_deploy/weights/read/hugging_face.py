"""Hugging Face's `vit_mae` and `vit`: tensors under the original's names, and the facts of config.json
and preprocessor_config.json.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mae_deploy.errors import CheckFailed, ConfigError
from mae_deploy.weights.read.files import Source, read_settings, tensor_of
from mae_deploy.weights.read.image_processor import FILE, pair, read_image_processor

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


def is_hugging_face(source: Source) -> bool:
    """Whether the tensors have Hugging Face's names."""
    return any("embeddings.patch_embeddings" in name for name in source.tensors)


def from_hugging_face(source: Source, *, with_preprocessing: bool = True) -> Source:
    """The same weights under the original's names.

    Args:
        with_preprocessing: read preprocessor_config.json, where it is there.

    Raises:
        ConfigError: config.json tells of something that our encoder does not have, preprocessor_config.json of
            something that our preprocessing does not do.
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
        source.image_size = pair(config["image_size"])
    if config.get("qkv_bias") is False:
        source.folded.append(_add_zero_biases(tensors))
    if with_preprocessing and (settings := read_settings(source.file.with_name(FILE))):
        channels = tensor_of(source, "patch_embed.proj.weight", 4).shape[1]
        source.preprocess = read_image_processor(settings, source.image_size or (224, 224), channels)
        source.preprocess_from = FILE
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
