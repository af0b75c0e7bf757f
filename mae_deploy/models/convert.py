"""Read weights made elsewhere: the original MAE implementation, timm, Hugging Face `vit_mae` and `vit`.

Target names are the original's. Reading is strict and never runs code that a file carries.
"""

from __future__ import annotations

import argparse
import math
import pickle
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mae_deploy.checkpoint import NON_COMMERCIAL, UNKNOWN_LICENCE, Kind, Metadata
from mae_deploy.config import to_dict
from mae_deploy.errors import CheckFailed, ConfigError
from mae_deploy.files import read_json, sha256
from mae_deploy.models.config import PRESETS, DecoderConfig, EncoderConfig, Preset
from mae_deploy.models.position import interpolate_position_embedding, sincos_position_embedding
from mae_deploy.preprocess import default_preprocess

_RELEASED = re.compile(r"mae_(pretrain|visualize|finetuned?)_vit_(base|large|huge)|vit-mae-(base|large|huge)|vit_(base|large|huge)_patch1[46]_224[._]mae")
"""File and repository names of the released, non-commercial weights and their re-uploads."""

_MODEL_FILES = ("model.safetensors", "pytorch_model.bin")
"""What the weights in a Hugging Face model folder are called; the folder has the model's name."""

_HEADS = {preset.embed_dim: preset.num_heads for preset in PRESETS.values()}


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportOptions:
    """What a weights file does not say about itself."""

    image_size: tuple[int, int] | None = None
    """Height and width; needed where the patches form no square, or to interpolate the position embeddings."""
    num_heads: int | None = None
    """The encoder's attention heads; default: those of the preset with this width, or head dim 64."""
    decoder_num_heads: int | None = None
    """The decoder's attention heads; default: head dim 32, as the original's 512 wide and 16 heads."""
    norm_pix_loss: bool | None = None
    """Whether the decoder was trained on normalised pixels; default: what the file says, else yes."""
    licence: str | None = None
    """The licence of the weights; default: CC-BY-NC-4.0 for the known releases, else unspecified."""


@dataclass(frozen=True, slots=True)
class Imported:
    """Tensors under the original's names, and the report of how they got there."""

    metadata: Metadata
    tensors: dict[str, Tensor]
    report: dict[str, Any]


@dataclass(slots=True)
class _Source:
    """A weights file as it was found."""

    tensors: dict[str, Tensor]
    layout: str
    settings: dict[str, Any] = field(default_factory=dict)
    """The training arguments or config that came with it."""
    renamed: int = 0


def import_weights(path: Path, options: ImportOptions) -> Imported:
    """Convert foreign weights.

    Raises:
        ConfigError: no such file, or a needed option is missing.
        CheckFailed: the file is damaged, carries code, or its tensors are not exactly those of a ViT that we know.
    """
    file = _weights_file(path)
    source = _read(file)
    licence = options.licence or (NON_COMMERCIAL if _RELEASED.search(_published_names(file, source)) else UNKNOWN_LICENCE)
    kind = _kind(source.tensors)
    encoder = _encoder_config(source, options)
    decoder = _decoder_config(source, options) if kind == "mae" else None
    reshaped = _fit_positions(source, encoder, decoder)
    pool = ("avg" if "fc_norm.weight" in source.tensors else "cls") if kind == "classifier" else None
    num_classes = _tensor(source, "head.weight", 2).shape[0] if kind == "classifier" else None
    metadata = Metadata(
        kind=kind,
        encoder=to_dict(encoder),
        decoder=to_dict(decoder) if decoder else None,
        norm_pix_loss=options.norm_pix_loss if options.norm_pix_loss is not None else bool(source.settings.get("norm_pix_loss", True)),
        pool=pool,
        num_classes=num_classes,
        class_names=_class_names(source.settings, num_classes),
        preprocess=to_dict(default_preprocess(encoder.image_size, encoder.in_chans)),
        licence=licence,
        provenance={"stage": "import", "source": file.name, "source_sha256": sha256(file), "layout": source.layout},
    )
    _check_names(source.tensors, expected_shapes(encoder, decoder, pool=pool, num_classes=num_classes), file)
    report = {
        "source": str(file),
        "layout": source.layout,
        "kind": kind,
        "model": encoder.name,
        "image_size": list(encoder.image_size),
        "tensors": len(source.tensors),
        "parameters": sum(tensor.numel() for tensor in source.tensors.values()),
        "renamed": source.renamed,
        "reshaped": reshaped,
        "missing": [],
        "unexpected": [],
        "licence": licence,
    }
    return Imported(metadata, {name: tensor.float() for name, tensor in source.tensors.items()}, report)


def expected_shapes(
    encoder: EncoderConfig, decoder: DecoderConfig | None, *, pool: str | None = None, num_classes: int | None = None
) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor of a model, without building it."""
    D, N, pixels = encoder.width, encoder.num_patches, encoder.patch**2 * encoder.in_chans
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, D),
        "pos_embed": (1, 1 + N, D),
        "patch_embed.proj.weight": (D, encoder.in_chans, encoder.patch, encoder.patch),
        "patch_embed.proj.bias": (D,),
        **_block_shapes("blocks", encoder.blocks, D, int(D * encoder.mlp_ratio)),
    }
    if pool == "avg":
        shapes |= _affine("fc_norm", D)
    else:
        shapes |= _affine("norm", D)
    if num_classes is not None:
        shapes |= _linear("head", D, num_classes)
    if decoder is not None:
        E = decoder.decoder_embed_dim
        shapes |= {"mask_token": (1, 1, E), "decoder_pos_embed": (1, 1 + N, E), **_linear("decoder_embed", D, E)}
        shapes |= _block_shapes("decoder_blocks", decoder.decoder_depth, E, 4 * E)
        shapes |= {**_affine("decoder_norm", E), **_linear("decoder_pred", E, pixels)}
    return shapes


# --- reading files ---------------------------------------------------------------------------------------------------


def _weights_file(path: Path) -> Path:
    if path.is_dir():
        for name in _MODEL_FILES:
            if (path / name).is_file():
                return path / name
    if not path.is_file():
        raise ConfigError(f"no weights at {path}", hint="give a .pth, .pt, .bin or .safetensors file, or a Hugging Face model folder")
    return path


def _published_names(file: Path, source: _Source) -> str:
    """What the weights may be known by: the file's name, or its model folder's, the hub's cache folder and the config's."""
    folders = file.absolute().parts[:-1]
    own = folders[-1] if file.name in _MODEL_FILES else file.name
    return " ".join([own, *(name for name in folders if name.startswith("models--")), str(source.settings.get("_name_or_path", ""))])


def _read(file: Path) -> _Source:
    settings: dict[str, Any] = {}
    config = file.with_name("config.json")
    if config.is_file():
        settings = read_json(config)
    if file.suffix == ".safetensors":
        content: Any = _read_safetensors(file)
    else:
        content = _read_pickle(file)
        if isinstance(content, dict) and isinstance(content.get("args"), argparse.Namespace):
            settings = {**vars(content["args"]), **settings}
    for key in ("model", "state_dict", "model_state"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckFailed(f"{file} holds no state dict of tensors")
    tensors = {re.sub(r"^(module\.|_orig_mod\.)+", "", name): tensor for name, tensor in content.items()}
    if any("embeddings.patch_embeddings" in name for name in tensors):
        return _from_hugging_face(tensors, settings)
    return _Source(tensors, "original or timm", settings)


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise CheckFailed(f"cannot read {file}: {error}") from error


def _read_pickle(file: Path) -> Any:
    # The original's checkpoints carry their argparse.Namespace; nothing else but tensors and plain values is let in.
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|global) ([\w.]+)", str(error))
        reason = f"it wants to run {found.group(1)}" if found else "it is damaged, or holds more than tensors and plain values"
        raise CheckFailed(f"refused to unpickle {file}: {reason}", hint="convert it to .safetensors where you trust it") from error
    except Exception as error:  # a damaged file makes torch raise whatever its bytes lead to: struct.error, IndexError, AssertionError, …
        raise CheckFailed(f"cannot read {file}: {' '.join(str(error).split())}") from error


# --- Hugging Face ----------------------------------------------------------------------------------------------------

_HF_NAMES = [
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


def _from_hugging_face(tensors: dict[str, Tensor], config: dict[str, Any]) -> _Source:
    if (activation := config.get("hidden_act", "gelu")) != "gelu":
        raise CheckFailed(f"the model's activation is {activation}, a ViT of ours has gelu")
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        target = name
        for pattern, replacement in _HF_NAMES:
            target = re.sub(pattern, replacement, target)
        renamed[target] = tensor
    for name in [name for name in renamed if ".attn.q." in name]:
        parts = [renamed.pop(name.replace(".attn.q.", f".attn.{part}."), None) for part in "qkv"]
        if any(part is None for part in parts):
            raise CheckFailed(f"{name} lacks its key or value")
        renamed[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat([part for part in parts if part is not None])
    return _Source(renamed, "Hugging Face", config, renamed=len(tensors))


# --- shapes ----------------------------------------------------------------------------------------------------------

_GIVE_SIZE = "import it with 'mae-deploy import SRC --out CKPT --image-size H,W'"


def _kind(tensors: dict[str, Tensor]) -> Kind:
    if "decoder_pred.weight" in tensors:
        return "mae"
    return "classifier" if "head.weight" in tensors else "encoder"


def _encoder_config(source: _Source, options: ImportOptions) -> EncoderConfig:
    weight = _tensor(source, "patch_embed.proj.weight", 4)
    D, C, P, _ = weight.shape
    depth = _count(source.tensors, "blocks")
    hidden = _tensor(source, "blocks.0.mlp.fc1.weight", 2).shape[0]
    heads = options.num_heads or source.settings.get("num_attention_heads") or _HEADS.get(D) or max(1, D // 64)
    size = options.image_size or _image_size(source, P)
    shape = Preset(P, D, depth, heads)
    name = next((name for name, preset in PRESETS.items() if preset == shape), f"vit_{D}x{depth}_patch{P}")
    return EncoderConfig(name=name, image_size=size, patch_size=P, in_chans=C, embed_dim=D, depth=depth, num_heads=heads, mlp_ratio=hidden / D)


def _image_size(source: _Source, patch_size: int) -> tuple[int, int]:
    """The size that the position embeddings were made for, a square."""
    if "pos_embed" not in source.tensors:
        stated = source.settings.get("image_size") or source.settings.get("input_size")
        if not isinstance(stated, int):
            raise ConfigError("the file has no pos_embed, so the image size is unknown", hint=_GIVE_SIZE)
        return stated, stated
    N = _tensor(source, "pos_embed", 3).shape[1] - 1
    side = math.isqrt(N)
    if side * side != N:
        raise ConfigError(f"pos_embed holds {N} patches, which form no square", hint=_GIVE_SIZE)
    return side * patch_size, side * patch_size


def _decoder_config(source: _Source, options: ImportOptions) -> DecoderConfig:
    width = _tensor(source, "decoder_embed.weight", 2).shape[0]
    heads = options.decoder_num_heads or source.settings.get("decoder_num_attention_heads") or max(1, width // 32)
    return DecoderConfig(decoder_depth=_count(source.tensors, "decoder_blocks"), decoder_embed_dim=width, decoder_num_heads=heads)


def _fit_positions(source: _Source, encoder: EncoderConfig, decoder: DecoderConfig | None) -> list[str]:
    """Rebuild absent sine-cosine tables, interpolate those of another grid; says what it did."""
    done = []
    tables = [("pos_embed", encoder.width)] + ([("decoder_pos_embed", decoder.decoder_embed_dim)] if decoder else [])
    for name, width in tables:
        if name not in source.tensors:
            source.tensors[name] = sincos_position_embedding(width, encoder.grid_size)
            done.append(f"{name}: absent, rebuilt as the fixed sine-cosine table")
        elif (N := _tensor(source, name, 3).shape[1] - 1) != encoder.num_patches:
            side = math.isqrt(N)
            if side * side != N:
                raise ConfigError(f"{name} holds {N} patches, {encoder.image_size} needs {encoder.num_patches}")
            source.tensors[name] = interpolate_position_embedding(source.tensors[name].float(), (side, side), encoder.grid_size)
            done.append(f"{name}: interpolated from {side}x{side} to {encoder.grid_size[0]}x{encoder.grid_size[1]} patches")
    return done


def _check_names(tensors: dict[str, Tensor], expected: dict[str, tuple[int, ...]], file: Path) -> None:
    missing = [name for name in expected if name not in tensors]
    unexpected = [name for name in tensors if name not in expected]
    misshapen = [
        f"{name} {tuple(tensors[name].shape)} instead of {shape}" for name, shape in expected.items() if name in tensors and tuple(tensors[name].shape) != shape
    ]
    problems = [
        f"{len(names)} {what}: {', '.join(names[:4])}{' …' if len(names) > 4 else ''}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
        if names
    ]
    if problems:
        raise CheckFailed(f"{file} does not fit: {'; '.join(problems)}")


def _tensor(source: _Source, name: str, dims: int) -> Tensor:
    tensor = source.tensors.get(name)
    if tensor is None or tensor.ndim != dims:
        found = ", ".join(list(source.tensors)[:4])
        raise CheckFailed(f"not a ViT: no tensor '{name}' with {dims} dimensions (found {found} …)")
    return tensor


def _count(tensors: dict[str, Tensor], prefix: str) -> int:
    return len({match.group(1) for name in tensors if (match := re.match(rf"{prefix}\.(\d+)\.", name))})


def _class_names(settings: dict[str, Any], num_classes: int | None) -> tuple[str, ...] | None:
    labels = settings.get("id2label")
    if num_classes is None or not isinstance(labels, dict) or len(labels) != num_classes:
        return None
    return tuple(str(labels[key]) for key in sorted(labels, key=int))


def _affine(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _linear(name: str, source: int, target: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (target, source), f"{name}.bias": (target,)}


def _block_shapes(prefix: str, depth: int, width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for index in range(depth):
        block = f"{prefix}.{index}"
        shapes |= {**_affine(f"{block}.norm1", width), **_linear(f"{block}.attn.qkv", width, 3 * width), **_linear(f"{block}.attn.proj", width, width)}
        shapes |= {**_affine(f"{block}.norm2", width), **_linear(f"{block}.mlp.fc1", width, hidden), **_linear(f"{block}.mlp.fc2", hidden, width)}
    return shapes
