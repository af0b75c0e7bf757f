"""Weights for elsewhere: the tensors and settings under which the original implementation, timm and transformers know a
model of ours.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from mae_deploy.checkpoint import OWN_RECORD, Metadata, record_words
from mae_deploy.config import from_dict, to_dict
from mae_deploy.errors import ConfigError
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.models.config import DecoderConfig, EncoderConfig, ObjectiveConfig
from mae_deploy.reporting.card import LICENCE_IDS
from mae_deploy.weights.load import LoadedWeights, encoder_of
from mae_deploy.weights.read.image_processor import FILTERS
from mae_deploy.weights.read.own import is_plain

Library = Literal["original", "timm", "huggingface"]

_TIMM = {(16, 192): "tiny", (16, 384): "small", (16, 768): "base", (16, 1024): "large", (14, 1280): "huge"}
"""timm's names of the ViTs, by patch and width; it builds any other shape with arguments to one of them."""

_HUGGING_FACE = [
    (r"^blocks\.", "vit.encoder.layer."),
    (r"^(cls_token)$", r"vit.embeddings.\1"),
    (r"^pos_embed$", "vit.embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "vit.embeddings.patch_embeddings.projection."),
    (r"^norm\.", "vit.layernorm."),
    (r"^head\.", "classifier."),
    (r"^decoder_blocks\.", "decoder.decoder_layers."),
    (r"^(mask_token|decoder_.*)$", r"decoder.\1"),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
]
"""The original's names to those that every transformers reads; query, key and value part before."""


@dataclass(frozen=True, slots=True)
class ForeignModel:
    """A model as another library stores it."""

    loaded: LoadedWeights
    """The part of ours that it holds."""
    tensors: dict[str, Tensor]
    configs: dict[str, dict[str, Any]]
    """JSON files by name."""
    left_out: list[str]
    """What of ours the other library has no place for."""


def foreign_model(loaded: LoadedWeights, library: Library) -> ForeignModel:
    """The model in another library's terms.

    Raises:
        ConfigError: that library's models do not compute what ours does.
    """
    if loaded.encoder_config.band_groups is not None:
        raise ConfigError(f"{library} has no groups of bands", hint="deploy this model with 'mae-deploy export'")
    beyond = loaded.encoder_config.beyond_plain()
    if beyond or loaded.metadata.pool in ("mean", "map"):
        what = ", ".join(f"{name} {value}" for name, value in beyond.items()) or f"pooling {loaded.metadata.pool}"
        raise ConfigError(
            f"weights are written for {library}'s plain ViTs, and this model has {what}",
            hint="deploy it with 'mae-deploy export'",
        )
    if library == "timm":
        return _timm(loaded)
    _refuse_other_objectives(loaded.metadata, library)
    return _hugging_face(loaded) if library == "huggingface" else ForeignModel(loaded, dict(loaded.tensors), {}, [])


def original_content(model: ForeignModel) -> dict[str, Any]:
    """What a `.pth` of the original holds: `model`, and beside it our record of it, plain values that any safe load
    reads.
    """
    return {"model": plain_tensors(model), OWN_RECORD: to_dict(model.loaded.metadata)}


def _refuse_other_objectives(metadata: Metadata, library: str) -> None:
    """Decoders of the paper predict pixels for masked patches that the encoder has not seen."""
    if not is_plain(metadata):
        objective = from_dict(ObjectiveConfig, metadata.objective or {})
        raise ConfigError(
            f"{library} has no decoder for target"
            f" {objective.target}{' with mask tokens in the encoder' if objective.encoder_mask_tokens else ''}",
            hint="--to timm takes the encoder alone",
        )


# --- timm ------------------------------------------------------------------------------------------------------------


def _timm(loaded: LoadedWeights) -> ForeignModel:
    """timm has no decoder: the encoder, or the classifier with its pooling."""
    names = list(loaded.tensors)
    if loaded.metadata.kind == "mae":
        loaded = _without_decoder(loaded)
    left_out = [name for name in names if name not in loaded.tensors]
    metadata, encoder = loaded.metadata, loaded.encoder_config
    preprocess = from_dict(Preprocess, metadata.preprocess)
    # timm pads with the mean only: the picture is the same, beside it is another colour.
    letterbox = preprocess.crop_mode == "letterbox"
    classes = metadata.num_classes or 0
    pooling = "avg" if metadata.pool == "avg" else "token"
    arguments = {
        "img_size": list(encoder.image_size),
        "patch_size": encoder.patch,
        "embed_dim": encoder.width,
        "depth": encoder.blocks,
        "num_heads": encoder.heads,
        "mlp_ratio": encoder.mlp_ratio,
        "in_chans": encoder.in_chans,
        "global_pool": pooling,
    }
    stated = {
        "input_size": [encoder.in_chans, *encoder.image_size],
        "fixed_input_size": True,
        "interpolation": preprocess.interpolation,
        "crop_pct": 1.0 if letterbox else preprocess.crop_pct,
        "crop_mode": "border" if letterbox else preprocess.crop_mode,
        "mean": list(preprocess.mean),
        "std": list(preprocess.std),
        "num_classes": classes,
        "pool_size": None,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": LICENCE_IDS.get(metadata.licence, metadata.licence),
    }
    config: dict[str, Any] = {
        "architecture": _timm_name(encoder),
        "num_classes": classes,
        "num_features": encoder.width,
        "global_pool": pooling,
    }
    if metadata.class_names:
        config["label_names"] = list(metadata.class_names)
    return ForeignModel(
        loaded,
        dict(loaded.tensors),
        {"config.json": {**config, "model_args": arguments, "pretrained_cfg": stated}},
        [*left_out, *(["preprocessing"] if letterbox else [])],
    )


def _timm_name(encoder: EncoderConfig) -> str:
    size = _TIMM.get((encoder.patch, encoder.width), "tiny")
    return f"vit_{size}_patch{14 if size == 'huge' else 16}_224"


def _without_decoder(loaded: LoadedWeights) -> LoadedWeights:
    encoder = encoder_of(loaded)
    return LoadedWeights(
        replace(loaded.metadata, kind="encoder", decoder=None, objective=None),
        dict(encoder.state_dict()),
        loaded.record,
    )


# --- transformers ----------------------------------------------------------------------------------------------------


def _hugging_face(loaded: LoadedWeights) -> ForeignModel:
    metadata, encoder = loaded.metadata, loaded.encoder_config
    if metadata.pool == "avg":
        raise ConfigError(
            "transformers' ViTForImageClassification reads the class token after the last norm, this classifier the"
            " patches' average before fc_norm",
            hint="--to timm takes it as it is; or fine-tune with --pool cls",
        )
    if metadata.kind == "mae" and encoder.image_size[0] != encoder.image_size[1]:
        raise ConfigError(
            "transformers' ViTMAEForPreTraining wants square images, not"
            f" {encoder.image_size[0]}x{encoder.image_size[1]}"
        )
    tensors = _renamed(_parted(loaded.tensors))
    if metadata.kind == "encoder":  # ViTModel is the whole model, not the part `vit` of one
        tensors = {name.removeprefix("vit."): tensor for name, tensor in tensors.items()}
    configs = {"config.json": _config(loaded)}
    if (processor := _processor(from_dict(Preprocess, metadata.preprocess))) is not None:
        configs["preprocessor_config.json"] = processor
    left_out = [] if processor is not None else ["preprocessing"]
    return ForeignModel(loaded, tensors, configs, left_out)


def _parted(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Query, key and value each in a tensor of its own."""
    parted: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if ".attn.qkv." in name:
            for part, piece in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                parted[name.replace(".attn.qkv.", f".attention.attention.{part}.")] = piece.clone()
        else:
            parted[name] = tensor
    return parted


def _renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for pattern, replacement in _HUGGING_FACE:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def _config(loaded: LoadedWeights) -> dict[str, Any]:
    metadata, encoder = loaded.metadata, loaded.encoder_config
    rows, columns = encoder.image_size
    config: dict[str, Any] = {
        "model_type": "vit_mae" if metadata.kind == "mae" else "vit",
        "architectures": [architecture_of(metadata.kind)],
        "hidden_size": encoder.width,
        "num_hidden_layers": encoder.blocks,
        "num_attention_heads": encoder.heads,
        "intermediate_size": int(encoder.width * encoder.mlp_ratio),
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "image_size": rows if rows == columns else [rows, columns],
        "patch_size": encoder.patch,
        "num_channels": encoder.in_chans,
        "qkv_bias": True,
        "dtype": "float32",
    }
    if metadata.kind == "mae":
        decoder = from_dict(DecoderConfig, metadata.decoder or {})
        config |= {
            "decoder_hidden_size": decoder.decoder_embed_dim,
            "decoder_num_hidden_layers": decoder.decoder_depth,
            "decoder_num_attention_heads": decoder.decoder_num_heads,
            "decoder_intermediate_size": 4 * decoder.decoder_embed_dim,
            "norm_pix_loss": metadata.norm_pix_loss,
            "mask_ratio": _mask_ratio(metadata.provenance),
        }
    elif metadata.num_classes is not None:
        config["num_labels"] = metadata.num_classes
        if (names := metadata.class_names) is not None:
            config |= {
                "id2label": {str(index): name for index, name in enumerate(names)},
                "label2id": {name: index for index, name in enumerate(names)},
            }
    return config


def architecture_of(kind: str) -> str:
    """transformers' class for a kind of checkpoint."""
    return {"mae": "ViTMAEForPreTraining", "classifier": "ViTForImageClassification"}.get(kind, "ViTModel")


def _mask_ratio(provenance: dict[str, Any]) -> float:
    """What it was pretrained with, else the paper's."""
    config = provenance.get("config")
    ratio = config.get("mask_ratio") if isinstance(config, dict) else None
    return float(ratio) if isinstance(ratio, int | float) else 0.75


def _processor(preprocess: Preprocess) -> dict[str, Any] | None:
    """The image processor that squashes, or resizes the shorter side, and cuts out the middle, as ours does; None where
    transformers has none that does the same.
    """
    rows, columns = preprocess.image_size
    squash = preprocess.crop_mode == "squash"
    if preprocess.takes_arrays or not (squash or (preprocess.crop_mode == "center" and rows == columns)):
        return None
    height, width = (int(side / preprocess.crop_pct) for side in (rows, columns))
    return {
        "image_processor_type": "DeiTImageProcessor" if squash else "BitImageProcessor",
        "do_convert_rgb": preprocess.channels == 3,
        "do_resize": True,
        "size": {"height": height, "width": width} if squash else {"shortest_edge": height},
        "resample": FILTERS.index(preprocess.interpolation),
        "do_center_crop": True,
        "crop_size": {"height": rows, "width": columns},
        "do_rescale": True,
        "rescale_factor": 1 / preprocess.divisor,
        "do_normalize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
    }


# --- the record ------------------------------------------------------------------------------------------------------


def header(model: ForeignModel) -> dict[str, str]:
    """The words of a .safetensors header: PyTorch's format mark, licence and provenance, and our record."""
    metadata = model.loaded.metadata
    return {**record_words(metadata), "provenance": json.dumps(metadata.provenance, default=str)}


def plain_tensors(model: ForeignModel) -> dict[str, Tensor]:
    """On the CPU, each with memory of its own."""
    return {name: tensor.detach().to(torch.float32).cpu().contiguous() for name, tensor in model.tensors.items()}
