"""Hugging Face's `vit_mae`, `vit`, `dinov2`, `dinov3_vit` and SigLIP's vision towers: tensors under the original's
names, and the facts of config.json and preprocessor_config.json.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mae_deploy.errors import CheckFailed, ConfigError
from mae_deploy.weights.read.files import Source, check_values, count_blocks, read_settings, tensor_of
from mae_deploy.weights.read.fold import add_zero_biases, fold_layer_scale
from mae_deploy.weights.read.image_processor import FILE, pair, read_image_processor

_SIGLIP = ("siglip_vision_model", "siglip")

_MODEL_TYPES = ("vit_mae", "vit", "dinov2", "dinov2_with_registers", "dinov3_vit", *_SIGLIP)

_NAMES = [
    (r"^(vit|dinov2|dinov2_with_registers|vision_model)\.", ""),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.position_embedding\.weight$", "pos_embed"),
    (r"^embeddings\.(patch_embeddings\.projection|patch_embeddings|patch_embedding)\.", "patch_embed.proj."),
    (r"^(layernorm|post_layernorm)\.", "norm."),
    (r"^(encoder\.layers?|model\.layer|layers?)\.", "blocks."),
    (r"^classifier\.", "head."),
    (r"^decoder\.(mask_token|decoder_pos_embed)$", r"\1"),
    (r"^decoder\.(decoder_embed|decoder_norm|decoder_pred)\.", r"\1."),
    (r"^decoder\.(decoder_layers|decoder_encoder\.layer)\.", "decoder_blocks."),
    (r"^head\.probe$", "attn_pool.latent"),
    (r"^head\.attention\.in_proj_(weight|bias)$", r"attn_pool.in_proj.\1"),
    (r"^head\.attention\.out_proj\.", "attn_pool.proj."),
    (r"^head\.layernorm\.", "attn_pool.norm."),
    (r"^head\.mlp\.", "attn_pool.mlp."),
    (r"\.(layernorm_before|layer_norm1)\.", ".norm1."),
    (r"\.(layernorm_after|layer_norm2)\.", ".norm2."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.(weights_in)\.", ".mlp.fc1."),
    (r"\.mlp\.(weights_out|down_proj)\.", ".mlp.fc2."),
    (r"\.(intermediate\.dense|mlp\.fc1)\.", ".mlp.fc1."),
    (r"\.(attention|self_attn)\.(output\.dense|o_proj|out_proj)\.", ".attn.proj."),
    (r"\.(output\.dense|mlp\.fc2)\.", ".mlp.fc2."),
    (r"\.(attention|self_attn)\.(attention\.)?(query|q_proj)\.", ".attn.q."),
    (r"\.(attention|self_attn)\.(attention\.)?(key|k_proj)\.", ".attn.k."),
    (r"\.(attention|self_attn)\.(attention\.)?(value|v_proj)\.", ".attn.v."),
]
"""Names as transformers 4 and 5 write them, to the original's; query, key and value, and the two halves of SwiGLU, are
joined afterwards.
"""

_KINDS = {
    "text": ("model_type", "hidden_act"),
    "count": (
        *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
        *("decoder_hidden_size", "decoder_intermediate_size", "decoder_num_attention_heads"),
    ),
    "positive number": ("layer_norm_eps", "rope_theta"),
    "true or false": (
        *("qkv_bias", "query_bias", "key_bias", "value_bias", "mlp_bias", "proj_bias"),
        *("use_gated_mlp", "use_swiglu_ffn", "norm_pix_loss"),
    ),
}
"""What config.json may have under the names that are read."""

_SPARE = re.compile(r"^((vit|dinov2)\.)?pooler\.|^(\w+\.)?embeddings\.(mask_token|position_ids)$")
"""A layer on top of the CLS token that `ViTModel` has, and what only pretraining uses: the tokens do not depend on
it."""

_TEXT = re.compile(r"^(text_model\.|logit_scale$|logit_bias$)")
"""Of SigLIP: what is not of its vision tower."""

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}


def is_hugging_face(source: Source) -> bool:
    """Whether the tensors have Hugging Face's names."""
    return any("embeddings.patch_embedding" in name for name in source.tensors)


def drop_text_tower(source: Source) -> None:
    """Of a whole SigLIP model, its vision tower is left.

    Raises:
        ConfigError: config.json does not tell of it.
    """
    if source.settings.get("model_type") == "siglip":
        text = [name for name in source.tensors if _TEXT.match(name)]
        source.tensors = {name: tensor for name, tensor in source.tensors.items() if name not in text}
        source.notes.append(f"SigLIP's vision tower is taken: {len(text)} tensors of its text tower are left out")
        vision = source.settings.get("vision_config")
        if not isinstance(vision, dict):
            raise ConfigError("config.json of a whole SigLIP has no vision_config, which tells of its vision tower")
        source.settings = {**vision, "model_type": _SIGLIP[0]}


def from_hugging_face(source: Source, *, with_preprocessing: bool = True) -> Source:
    """The same weights under the original's names.

    Args:
        with_preprocessing: read preprocessor_config.json, where it is there.

    Raises:
        ConfigError: config.json tells of something that our encoder does not have, preprocessor_config.json of
            something that our preprocessing does not do.
        CheckFailed: a query without its key or value.
    """
    config, decoder = source.settings, any(name.startswith("decoder.") for name in source.tensors)
    refuse_other_types(config)
    check_values(config, _KINDS, "config.json")
    _refuse_other_models(source, decoder=decoder)
    dropped = [name for name in source.tensors if _SPARE.match(name)]
    kept = {name: tensor.float() for name, tensor in source.tensors.items() if name not in dropped and tensor.numel()}
    names = {_renamed(name, config): name for name in source.tensors}
    source = replace(
        source,
        tensors={_renamed(name, config): tensor for name, tensor in kept.items()},
        names=names,
        layout="Hugging Face",
        renamed=len(kept),
        dropped=source.dropped + dropped,
    )
    tensors = source.tensors
    depth = count_blocks(tensors, "blocks")
    if absent := _join(tensors, _without_bias(config)):
        source.folded.append(f"{absent} absent biases of query, key and value: zeros")
    if not (config.get("mlp_bias", True) and config.get("proj_bias", True)):
        source.folded.append(f"{add_zero_biases(tensors, depth)} absent biases: zeros")
    if scales := fold_layer_scale(tensors, depth):
        source.folded.append(f"{scales} LayerScales: into attn.proj and mlp.fc2")
    source.num_heads, source.decoder_num_heads = (
        config.get("num_attention_heads"),
        config.get("decoder_num_attention_heads"),
    )
    if config.get("model_type") in _SIGLIP and "head.weight" in tensors:  # which reads the mean
        source.pool, unread = "mean", [name for name in tensors if name.startswith("attn_pool.")]
        source.dropped += [names[name] for name in unread]
        source.tensors = tensors = {name: tensor for name, tensor in tensors.items() if name not in unread}
    D, _, P, _ = tensor_of(source, "patch_embed.proj.weight", 4).shape
    for name, told, found in (
        ("hidden_size", config.get("hidden_size", D), D),
        ("num_hidden_layers", config.get("num_hidden_layers", depth), depth),
        ("patch_size", pair(config.get("patch_size", P)), (P, P)),
    ):
        if told != found:
            raise ConfigError(f"config.json is of another model: {name} {told}, and the weights have {found}")
    source.name = f"{config.get('model_type', 'vit')}_{D}x{depth}_patch{P}"
    source.beyond_plain = _settings(config, tensors)
    if config.get("model_type") in _SIGLIP:
        _place_siglip(source)
    if config.get("model_type") == "dinov2_with_registers":
        source.positions = "timm"  # bicubic with antialiasing
    if "image_size" in config:
        source.image_size = pair(config["image_size"])
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
            hint=f"models of type {', '.join(_MODEL_TYPES)} are read; of others, timm's files by --model NAME",
        )


def _refuse_other_models(source: Source, *, decoder: bool) -> None:
    """Nothing in the tensors would show these, and every output would be wrong."""
    config, kind = source.settings, source.settings.get("model_type", "vit")
    width, hidden = config.get("decoder_hidden_size", 512), config.get("decoder_intermediate_size", 2048)
    eps, head = config.get("layer_norm_eps", 1e-12), any(name.startswith("classifier.") for name in source.tensors)
    if not config and any(re.search(r"lambda1$|register_tokens$|patch_embedding\.", name) for name in source.tensors):
        raise ConfigError(
            f"{source.file} is of Hugging Face's DINOv2, DINOv3 or SigLIP, and no config.json is beside it",
            hint="put the model's config.json into the same folder: it tells heads, norms and positions",
        )
    problems = {
        f"hidden_act {config.get('hidden_act')}": config.get("hidden_act", "gelu")
        not in (("gelu",) if decoder else ("silu",) if config.get("use_gated_mlp") else tuple(_ACTIVATIONS)),
        # A smaller one, such as transformers' default, changes nothing that shows: the released weights were trained
        # with 1e-6.
        f"layer_norm_eps {eps}, more than 1e-6": decoder and eps > 1e-6,
        f"decoder_intermediate_size {hidden}, not four times decoder_hidden_size {width}": (
            decoder and "decoder_hidden_size" in config and hidden != 4 * width
        ),
        "a head on the class token and the mean of the patches": head and kind.startswith("dinov2"),
    }
    if found := [problem for problem, there in problems.items() if there]:
        raise ConfigError(
            f"config.json has {', '.join(found)}, which our encoder and decoder do not have",
            hint=f"models of type {', '.join(_MODEL_TYPES)} are read; docs/import.md says which of them are not",
        )


def _settings(config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """In what the family differs from the original's encoder."""
    kind = config.get("model_type", "vit")
    gated = tensor_is_gated(tensors)
    found: dict[str, Any] = {
        "norm_eps": max(1e-6, float(config.get("layer_norm_eps", 1e-12))),
        "activation": "swiglu" if gated else _ACTIVATIONS[config.get("hidden_act", "gelu")],
    }
    if "reg_token" in tensors:
        found["num_registers"] = tensors["reg_token"].shape[1]
    if kind == "dinov3_vit":
        found |= {"rotary": "dinov3", "rotary_base": float(config.get("rope_theta", 100.0))}
    if kind in _SIGLIP:
        found["class_token"] = False
        if "attn_pool.latent" in tensors:
            hidden, width = tensors["attn_pool.mlp.fc1.weight"].shape
            found |= {"pool_heads": config.get("num_attention_heads", 12), "pool_mlp_ratio": hidden / width}
    return found


def tensor_is_gated(tensors: dict[str, Tensor]) -> bool:
    """Whether the MLP's first layer is twice as wide as what its second reads, as SwiGLU's."""
    first, second = (tensors.get(f"blocks.0.mlp.{layer}.weight") for layer in ("fc1", "fc2"))
    return first is not None and second is not None and first.shape[0] == 2 * second.shape[1]


def _place_siglip(source: Source) -> None:
    """Its table has no row for a class token, and the pooling's query, key and value stand in one layer."""
    tensors = source.tensors
    if (table := tensors.get("pos_embed")) is not None:
        tensors["pos_embed"] = torch.cat([torch.zeros_like(table[:1]), table])[None]
    for part in ("weight", "bias"):
        if (joined := tensors.pop(f"attn_pool.in_proj.{part}", None)) is not None:
            tensors[f"attn_pool.q.{part}"], tensors[f"attn_pool.kv.{part}"] = joined.tensor_split([len(joined) // 3])


def _renamed(name: str, config: dict[str, Any]) -> str:
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    if not config.get("use_gated_mlp", config.get("use_swiglu_ffn")):  # DINOv3 calls a plain MLP's first layer so
        name = name.replace(".mlp.up_proj.", ".mlp.fc1.")
    return name


def _without_bias(config: dict[str, Any]) -> str:
    """Which of q, k and v have no bias, by config.json."""
    if config.get("model_type") == "dinov3_vit":
        given = (config.get("query_bias", True), config.get("key_bias", False), config.get("value_bias", True))
        return "".join(part for part, there in zip("qkv", given, strict=True) if not there)
    return "" if config.get("qkv_bias", True) else "qkv"


def _join(tensors: dict[str, Tensor], without_bias: str) -> int:
    """Query, key and value in one tensor, as timm and the original have them, and the halves of SwiGLU, the gate first;
    says of how many layers biases were absent.
    """
    absent: set[str] = set()
    for name in [name for name in tensors if ".attn.q." in name or ".attn.v." in name]:
        parts = [name.replace(f".attn.{name.rsplit('.', 2)[1]}.", f".attn.{part}.") for part in "qkv"]
        if name not in tensors:  # joined already
            continue
        found = {part: tensors.pop(part, None) for part in parts}
        width = next(tensor for tensor in found.values() if tensor is not None).shape[0]
        for kind, part in zip("qkv", parts, strict=True):
            if found[part] is None and name.endswith("bias") and kind in without_bias:
                found[part] = torch.zeros(width)
                absent.add(part)
        if any(tensor is None for tensor in found.values()):
            raise CheckFailed(f"{name} lacks its key or value")
        joined = torch.cat([tensor for tensor in found.values() if tensor is not None])
        tensors[parts[0].replace(".attn.q.", ".attn.qkv.")] = joined
    for layer in [name.removesuffix(".weight") for name in tensors if name.endswith(".attn.qkv.weight")]:
        if without_bias == "qkv" and f"{layer}.bias" not in tensors:
            tensors[f"{layer}.bias"] = torch.zeros(tensors[f"{layer}.weight"].shape[0])
            absent.add(layer)
    for name in [name for name in tensors if ".mlp.gate_proj." in name]:
        up = tensors.pop(name.replace("gate_proj", "up_proj"), None)
        if up is None:
            raise CheckFailed(f"{name} lacks its up_proj")
        tensors[name.replace("gate_proj", "fc1")] = torch.cat([tensors.pop(name), up])
    return len(absent)
