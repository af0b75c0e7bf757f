"""timm's ViTs by name: what the name says of a weights file, what folds exactly into our encoder, and what is refused.

timm builds the named model without memory (`torch.device("meta")`) and without weights; nothing is downloaded.
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

import timm
import torch
from timm import models
from timm.data import resolve_data_config
from timm.models import eva
from torch import Tensor

from mae_deploy.checkpoint import NON_COMMERCIAL, timm_positions
from mae_deploy.errors import CheckFailed, ConfigError
from mae_deploy.images.preprocess import Preprocess, default_preprocess
from mae_deploy.weights.read.check_names import check_names
from mae_deploy.weights.read.files import GUESSED, Source, check_values, count_blocks, tensor_of
from mae_deploy.weights.read.fold import add_zero_biases, fold_layer_scale
from mae_deploy.weights.read.rotary_pairs import channel_order, reorder
from mae_deploy.weights.read.timm_features import foreign_features, pool_of, settings_of

SPDX = {"apache-2.0": "Apache-2.0", "mit": "MIT", "cc-by-nc-4.0": NON_COMMERCIAL}
"""timm's names of licences, to SPDX's; others stay as timm writes them."""


def has_timm_config(source: Source) -> bool:
    """Whether config.json is that of a timm model folder, as timm's hub repositories are."""
    return isinstance(source.settings.get("architecture"), str)


def from_timm(source: Source, name: str | None) -> Source:
    """The same weights as tensors of our encoder or classifier.

    Args:
        name: timm's name of the model, with or without a tag; None reads the folder's config.json.

    Raises:
        ConfigError: timm has no such model, or it computes something that our encoder does not.
        CheckFailed: the tensors are not exactly those of the model.
    """
    if any("embeddings.patch_embedding" in key for key in source.tensors):
        raise ConfigError(
            f"--model names a timm model, and {source.file} holds Hugging Face's names", hint="leave --model out"
        )
    source = dataclasses.replace(source, tensors={key: value.float() for key, value in source.tensors.items()})
    source.layout = "timm"
    model = _build(source, name) if name else _build_from_config(source)
    architecture = name or source.settings["architecture"]
    source.tensors = tensors = _renamed(source, model, architecture)
    if features := foreign_features(model, classifier="head.weight" in tensors):
        raise ConfigError(
            f"{architecture} has {', '.join(features)}, which our encoder does not have",
            hint="docs/import.md lists what folds and what is refused",
        )
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    if "pos_embed" in expected:  # the table of positions may be that of another image size
        expected["pos_embed"] = (1, *tensor_of(source, "pos_embed", 3).shape[1:2], model.embed_dim)
    check_names(tensors, expected, source.file, model=architecture)
    source.beyond_plain = settings_of(model)
    _fold(source, model)
    source.architecture, source.name = architecture, architecture.partition(".")[0]
    source.image_size, source.num_heads = tuple(model.patch_embed.img_size), model.blocks[0].attn.num_heads
    source.pool = pool_of(model)
    source.positions = timm_positions(architecture)
    _take_preprocessing(source, model.pretrained_cfg, name)
    if isinstance(names := source.settings.get("label_names"), list):
        source.class_names = tuple(map(str, names))
    if not name or "." in name:
        if (licence := model.pretrained_cfg.get("license")) is not None:
            check_values({"license": licence}, {"text": ["license"]}, "config.json")
        source.licence = None if licence is None else SPDX.get(licence, licence)
    return source


def _renamed(source: Source, model: Any, architecture: str) -> dict[str, Tensor]:
    """As timm's model of today calls the tensors. Original DeiT-III files call LayerScale gamma_1 and gamma_2; DINOv2's
    carry a mask token of their pretraining; those of Eva's families have names of their own, which timm's conversion
    knows.
    """
    tensors = source.tensors
    if isinstance(model, eva.Eva):
        renamed = _eva_names(source, model, architecture)
    else:
        renamed = {
            key.replace(".gamma_1", ".ls1.gamma").replace(".gamma_2", ".ls2.gamma"): tensor
            for key, tensor in tensors.items()
        }
        source.dropped += [key for key in ("mask_token",) if renamed.pop(key, None) is not None]
    source.renamed = len(set(renamed) - set(tensors))
    return renamed


def _eva_names(source: Source, model: Any, architecture: str) -> dict[str, Tensor]:
    """By timm's own conversion, but for the table of positions, which we interpolate ourselves where that is wanted."""
    tensors = dict(source.tensors)
    table = tensors.pop("pos_embed", None)
    # DINOv3's releases have biases that are zero where timm's model has none; its keys have none in either.
    biases = [key for key in tensors if key.endswith("attn.qkv.bias") and key not in model.state_dict()]
    without = "storage_tokens" in tensors and "blocks.0.attn.q_bias" not in model.state_dict()
    if without and (lost := [key for key in biases if tensors.pop(key).any()]):
        raise CheckFailed(
            f"{source.file} has biases of query, key and value, {lost[0]} among them, and {architecture} none",
            hint=f"pass --model {architecture.partition('.')[0]}_qkvb",
        )
    renamed: dict[str, Tensor] = eva.checkpoint_filter_fn(tensors, model)
    if table is not None:
        renamed["pos_embed"] = table
    source.dropped += [key for key in ("mask_token",) if key in tensors]
    return {key: tensor.float() for key, tensor in renamed.items()}


# --- timm's model ----------------------------------------------------------------------------------------------------


def _build(source: Source, name: str) -> Any:
    architecture, tag = models.split_model_name_tag(name)
    if not models.is_model(architecture):
        near = difflib.get_close_matches(architecture, models.list_models(), n=1)
        raise ConfigError(
            f"timm {timm.__version__} has no model '{name}'",
            hint=f"did you mean '{near[0]}'?" if near else "see timm.list_models('vit*')",
        )
    if tag and name not in (tagged := models.get_arch_pretrained_cfgs(architecture)):
        raise ConfigError(
            f"timm has no tag '{tag}' for {architecture}",
            hint=f"known: {', '.join(key.partition('.')[2] for key in tagged)}",
        )
    # Fine-tuning with average pooling shows in the tensors, whatever the name says.
    pooling = {"global_pool": "avg"} if "fc_norm.weight" in source.tensors else {}
    return _on_meta(source, architecture, {"pretrained_cfg": tag or None, **pooling})


def _build_from_config(source: Source) -> Any:
    """timm's own folders: the architecture, its arguments, and the preprocessing (older files have that at the top)."""
    config = source.settings
    stated, arguments = config.get("pretrained_cfg", config), config.get("model_args", {})
    if not isinstance(stated, dict) or not isinstance(arguments, dict):
        raise ConfigError(f"config.json beside {source.file} is not as timm writes it")
    depth = arguments.get("depth")
    if depth is not None and (type(depth) is not int or depth != count_blocks(source.tensors, "blocks")):
        raise ConfigError(f"config.json beside {source.file} has depth {depth!r:.80}, which its weights have not")
    known = {field.name for field in dataclasses.fields(models.PretrainedCfg)}
    architecture, _ = models.split_model_name_tag(config["architecture"])
    return _on_meta(
        source,
        architecture,
        {**arguments, "pretrained_cfg": {key: value for key, value in stated.items() if key in known}},
    )


def _on_meta(source: Source, architecture: str, arguments: dict[str, Any]) -> Any:
    """The model without memory, with as many channels and classes as the tensors show."""
    patches, head = source.tensors.get("patch_embed.proj.weight"), source.tensors.get("head.weight")
    if patches is not None and patches.ndim == 4:
        arguments["in_chans"] = patches.shape[1]
    arguments["num_classes"] = head.shape[0] if head is not None and head.ndim == 2 else 0
    try:
        with torch.device("meta"):
            return models.model_entrypoint(architecture)(pretrained=False, **arguments)
    except Exception as error:  # timm asserts and raises whatever its arguments lead to
        raise ConfigError(
            f"timm {timm.__version__} cannot build {architecture}: {' '.join(str(error).split())}"
        ) from error


# --- tensors ---------------------------------------------------------------------------------------------------------


def _fold(source: Source, model: Any) -> None:
    """Bring what our encoder computes without into the tensors that it has; the outputs stay the same but for
    rounding.
    """
    tensors, depth = source.tensors, len(model.blocks)
    if joined := sum(_join(tensors, f"blocks.{index}") for index in range(depth)):
        source.folded.append(f"{joined} layers in parts: one qkv or fc1 each")
    if absent := add_zero_biases(tensors, depth):
        source.folded.append(f"{absent} absent biases: zeros")
    if scales := fold_layer_scale(tensors, depth):
        source.folded.append(f"{scales} LayerScales: into attn.proj and mlp.fc2")
    if (rope := getattr(model, "rope", None)) is not None:
        _fold_rotary(source, rope, depth, model.blocks[0].attn)
    if "pos_embed" in tensors:
        _fold_prefix_positions(source, model)
    if model.global_pool == "token" and "fc_norm.weight" in tensors:
        # A norm of each token by itself: the same before and after one of them is taken.
        tensors |= {f"norm.{part}": tensors.pop(f"fc_norm.{part}") for part in ("weight", "bias")}
        source.folded.append("fc_norm of the class token: norm")


def _join(tensors: dict[str, Tensor], block: str) -> int:
    """Queries, keys and values in one layer, their biases beside them, and the halves of SwiGLU in one, the gate first;
    says how many layers were in parts.
    """
    parts = [f"{block}.attn.{part}_proj" for part in "qkv"]
    biases = {f"{block}.attn.{part}_bias" for part in "qkv"} | {f"{part}.bias" for part in parts}
    apart = parts[0] + ".weight" in tensors
    if apart:
        tensors[f"{block}.attn.qkv.weight"] = torch.cat([tensors.pop(f"{part}.weight") for part in parts])
    if biases & tensors.keys():
        width = tensors[f"{block}.attn.qkv.weight"].shape[0] // 3
        own = [tensors.pop(f"{part}.bias", None) for part in parts]
        own = [tensors.pop(f"{block}.attn.{part}_bias", bias) for part, bias in zip("qkv", own, strict=True)]
        tensors[f"{block}.attn.qkv.bias"] = torch.cat([torch.zeros(width) if bias is None else bias for bias in own])
    gated = f"{block}.mlp.fc1_g.weight" in tensors
    if gated:
        for kind in ("weight", "bias"):
            tensors[f"{block}.mlp.fc1.{kind}"] = torch.cat(
                [tensors.pop(f"{block}.mlp.fc1_{half}.{kind}") for half in "gx"]
            )
    return apart + gated


def _fold_rotary(source: Source, rope: Any, depth: int, attention: Any) -> None:
    """Pairs of channels, rows and columns in our order (`models.rotary`)."""
    mixed, columns_first = "rope.freqs" in source.tensors, rope.grid_indexing == "xy"
    if mixed and columns_first:
        source.tensors["rope.freqs"] = source.tensors["rope.freqs"].flip(0)
    order = channel_order(
        attention.head_dim, halves=bool(attention.rotate_half), columns_first=columns_first and not mixed
    )
    if not torch.equal(order, torch.arange(len(order))):
        reorder(source.tensors, depth, attention.num_heads, order)
        source.folded.append("rotary channels: into the order of DINOv3's pairs, rows before columns")


def _fold_prefix_positions(source: Source, model: Any) -> None:
    """Our table has a row for the class token, and none for registers."""
    tensors, registers = source.tensors, 0 if model.reg_token is None else model.reg_token.shape[1]
    table = tensors["pos_embed"]
    first = torch.zeros_like(table[:, :1])
    if model.no_embed_class:
        tensors["pos_embed"] = torch.cat([first, table], dim=1)
        source.folded.append("position embeddings without an entry for the class token: a zero")
        return
    classes = int(model.cls_token is not None)
    if registers:
        tensors["reg_token"] = tensors["reg_token"] + table[:, classes : classes + registers]
        source.folded.append(f"position embeddings of {registers} registers: into these")
    tensors["pos_embed"] = torch.cat([table[:, :1] if classes else first, table[:, classes + registers :]], dim=1)


def timm_evaluation(pretrained_cfg: dict[str, Any], image_size: tuple[int, int], channels: int) -> Preprocess:
    """timm's evaluation transform in our terms; mean and deviation of RGB are not those of other channels."""
    config = resolve_data_config(pretrained_cfg=pretrained_cfg)
    check_values(config, {"positive number": ["crop_pct"], "numbers": ["mean", "std"], "text": ["crop_mode"]}, "timm")
    statistics: dict[str, Any] = {
        name: tuple(config[name]) for name in ("mean", "std") if len(config["mean"]) == channels
    }
    plain = default_preprocess(image_size, channels)
    settings = {name: config[name] for name in ("crop_mode", "crop_pct", "interpolation")}
    return dataclasses.replace(plain, **settings, **statistics)


def _take_preprocessing(source: Source, pretrained_cfg: dict[str, Any], name: str | None) -> None:
    channels = tensor_of(source, "patch_embed.proj.weight", 4).shape[1]
    source.preprocess = timm_evaluation(pretrained_cfg, source.image_size or (224, 224), channels)
    tag = pretrained_cfg.get("tag")
    first = f", which names no tag: that of timm's first, {tag}" if name and "." not in name and tag else ""
    source.preprocess_from = f"timm's {name}{first}" if name else "config.json"
    if len(source.preprocess.mean) != len(resolve_data_config(pretrained_cfg=pretrained_cfg)["mean"]):
        source.preprocess_from += f"; mean and std of {channels} channels are {GUESSED}"
