"""Make a checkpoint of weights made elsewhere: the original MAE implementation, timm, Hugging Face, torchvision,
mmpretrain, MAE-Lite.

Target names are the original's. The tensors must be exactly those of the model: nothing is guessed to fit.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mae_deploy.checkpoint import CheckpointKind, Metadata, Positions
from mae_deploy.config import to_dict
from mae_deploy.data.class_order import natural_order, numbered, orders_differ
from mae_deploy.errors import ConfigError
from mae_deploy.models.config import PRESETS, DecoderConfig, EncoderConfig, Preset
from mae_deploy.models.position import interpolate_position_embedding, sincos_position_embedding
from mae_deploy.reporting.preprocess import PREPROCESS_FROM
from mae_deploy.weights.read.check_names import check_names
from mae_deploy.weights.read.check_numbers import check_numbers
from mae_deploy.weights.read.files import Source, count_blocks, find_weights, read_source, tensor_of
from mae_deploy.weights.read.hugging_face import (
    drop_text_tower,
    from_hugging_face,
    is_hugging_face,
    refuse_other_types,
)
from mae_deploy.weights.read.linear_probe import fold_batch_norm
from mae_deploy.weights.read.mae_lite import from_mae_lite, is_mae_lite
from mae_deploy.weights.read.openmmlab import from_openmmlab, is_openmmlab
from mae_deploy.weights.read.own import own_record, refuse_without_record, take_record, take_words
from mae_deploy.weights.read.preprocessing import PreprocessOptions, find_preprocess, say_if_guessed
from mae_deploy.weights.read.releases import licence_of, release_of, trained_on_normalised_pixels
from mae_deploy.weights.read.shapes import expected_shapes
from mae_deploy.weights.read.state_dict import strip_prefix
from mae_deploy.weights.read.timm_vit import from_timm, has_timm_config
from mae_deploy.weights.read.torchvision_vit import from_torchvision, is_torchvision

_FOREIGN = [
    (r"^decoder\.0\.(weight|bias)$", "the parts of SimMIM (encoder, decoder)"),
    (
        r"relative_position_(bias_table|index)|rel_pos_bias|\.rpe",
        "relative positions in its attention, as BEiT, SimMIM, Swin and MAE-Lite's RPE have",
    ),
    (r"\.attn\.[qv]_bias$", "an attention without a bias of the keys, as BEiT has"),
    (r"^lm_head\.", "a head over visual words, as BEiT has"),
    (r"^(dist_token|dist_norm\.|head_dist\.)|embeddings\.distillation_token$", "a distillation token and its head"),
    (r"(^|\.)(reg_token|register_tokens|storage_tokens)$", "register tokens"),
    (r"(^|\.)transformer\.resblocks\.", "the blocks of CLIP's ViT: a norm before them, QuickGELU"),
    (r"\.layer_scale1\.lambda1$", "LayerScale under transformers' names"),
    (r"\.lora_(A|B|embedding_A)\.", "adapters that were not merged into the weights (LoRA)"),
    (r"(^|\.)(layers\.\d+\.blocks\.|stages\.\d+\.)", "stages of different resolution (Swin, Hiera)"),
    (r"^(backbone\.)?pre_norm\.", "a norm before the blocks (pre_norm)"),
]
"""Tensors by which other families are told, and what they are."""

_TOLD = ("register tokens", "LayerScale under transformers' names")
"""Of these, what is read where a config.json of Hugging Face's tells the rest of the family."""

_GIVE_SIZE = "import it with 'mae-deploy import SRC --out CKPT --image-size H,W'"

_NO_ENTRY = (
    "or, if each patch has an entry and the class token none, as in timm's DeiT-III, say which model: --model NAME"
)

_HEADS = {preset.embed_dim: preset.num_heads for preset in PRESETS.values()}


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportOptions:
    """What a weights file does not say about itself."""

    model: str | None = None
    """timm's name of the model, with or without a tag; default: the one in config.json, else a plain ViT is read from
    the tensors."""
    image_size: tuple[int, int] | None = None
    """Height and width; needed where the patches form no square, or to interpolate the position embeddings."""
    num_heads: int | None = None
    """The encoder's attention heads; default: those of the preset with this width, or head dim 64."""
    decoder_num_heads: int | None = None
    """The decoder's attention heads; default: head dim 32, as the original's 512 wide and 16 heads."""
    norm_pix_loss: bool | None = None
    """Whether the decoder was trained on normalised pixels; default: what the file says, else yes."""
    positions: Positions | None = None
    """How position embeddings are taken to another image size; default: as the layout's library does."""
    class_names: tuple[str, ...] | None = None
    """Names of the classes in the order of the logits; default: those that the file has."""
    key: str | None = None
    """Under which of the file's keys the weights are; default: the usual ones."""
    prefix: str | None = None
    """How the names of the ViT's tensors begin in the file; default: the only prefix there is."""
    licence: str | None = None
    """The licence of the weights; default: CC-BY-NC-4.0 for the known releases, else unspecified."""
    preprocess: PreprocessOptions = field(default_factory=PreprocessOptions)
    """What the user says of the preprocessing."""


@dataclass(frozen=True, slots=True)
class Imported:
    """Tensors under the original's names, and the report of how they got there."""

    metadata: Metadata
    tensors: dict[str, Tensor]
    report: dict[str, Any]


def import_weights(path: Path, options: ImportOptions) -> Imported:
    """Convert foreign weights.

    Raises:
        ConfigError: no such file, a needed option is missing, or the model computes something that ours does not.
        CheckFailed: the file is damaged, carries code, or its tensors are not exactly those of a ViT that we know.
    """
    file = find_weights(path)
    source = _convert(read_source(file, average=options.model is not None, key=options.key), options)
    _fold_linear_probe(source)
    _check_class_token(source)
    source.positions = options.positions or source.positions
    kind = _kind(source.tensors)
    made_for = _made_for(source, options.image_size)
    encoder = _encoder_config(source, options.image_size or made_for, options.num_heads)
    decoder = _decoder_config(source, options) if kind == "mae" else None
    reshaped = _fit_positions(source, made_for, encoder, decoder)
    pool = _pool(source) if kind == "classifier" else None
    num_classes = tensor_of(source, "head.weight", 2).shape[0] if kind == "classifier" else None
    class_names = _class_names(source, num_classes, options.class_names)
    release = release_of(source, kind)
    preprocess, preprocess_from = find_preprocess(source, encoder, release, options.preprocess)
    provenance = {
        "stage": "import",
        "source": source.file.name,
        "source_sha256": source.sha256,
        "layout": source.layout,
        PREPROCESS_FROM: preprocess_from,
    }
    metadata = Metadata(
        kind=kind,
        encoder=to_dict(encoder),
        decoder=to_dict(decoder) if decoder else None,
        norm_pix_loss=_norm_pix_loss(source, options.norm_pix_loss),
        pool=pool,
        num_classes=num_classes,
        class_names=class_names,
        preprocess=to_dict(preprocess),
        positions=source.positions,
        licence=options.licence or licence_of(source, release),
        provenance={
            **provenance,
            **({"architecture": source.architecture} if source.architecture else {}),
            **({"parent": source.parent} if source.parent else {}),
        },
    )
    hint = "if it is a timm model, say which: --model NAME" if source.layout == "original or timm" else None
    expected = expected_shapes(encoder, decoder, pool=pool, num_classes=num_classes)
    check_names(source.tensors, expected, source.file, hint=hint, names=source.names)
    check_numbers(source.tensors, source.file, source.names)
    say_if_guessed(preprocess_from)
    return Imported(
        metadata,
        {name: tensor.float() for name, tensor in source.tensors.items()},
        _report(source, metadata, encoder, reshaped),
    )


def _convert(source: Source, options: ImportOptions) -> Source:
    """The weights under the original's names, by whichever layout they have."""
    take_words(source)
    refuse_without_record(source, known=options.num_heads is not None or options.model is not None)
    if options.model is None and options.prefix is None and is_mae_lite(source):
        source = from_mae_lite(source)
        _refuse_other_families(source)
        return source
    named = options.model is not None or has_timm_config(source)
    if not named:
        if is_hugging_face(source):
            refuse_other_types(source.settings)
            drop_text_tower(source)
        _refuse_other_families(source)
    stripped = strip_prefix(source.tensors, source.file, options.prefix)
    source.tensors = stripped.tensors
    if not named:
        _refuse_other_families(source)  # that begin with the prefix
    source.dropped += stripped.dropped
    source.notes += stripped.notes
    if named:
        return from_timm(source, options.model)
    if is_hugging_face(source):
        record = None if source.settings else own_record(source)
        source = from_hugging_face(source, with_preprocessing=not options.preprocess.whole)
        return source if record is None else take_record(source, record)
    if is_torchvision(source):
        return from_torchvision(source)
    if (record := own_record(source)) is not None:
        return take_record(source, record)
    if is_openmmlab(source):
        return from_openmmlab(source)
    return _from_original(source)


def _from_original(source: Source) -> Source:
    """The original's names already."""
    stated = source.settings.get("image_size") or source.settings.get("input_size")
    source.image_size = (stated, stated) if isinstance(stated, int) else None
    return source


def _refuse_other_families(source: Source) -> None:
    """Nothing of these fits by renaming, and a list of their tensors would not say why."""
    known = is_hugging_face(source)  # whose config.json tells what these are
    found = [
        words
        for pattern, words in _FOREIGN
        if any(re.search(pattern, name) for name in source.tensors) and not (known and words in _TOLD)
    ]
    if found:
        raise ConfigError(
            f"{source.file} has {', '.join(found)}, which our encoder does not have",
            hint="if it is timm's, say which: --model NAME; docs/import.md lists what is read and what is refused",
        )


def _fold_linear_probe(source: Source) -> None:
    """The BatchNorm before the head of a linear probe: `head.0` and `head.1` in the original, a neck in mmpretrain."""
    if "head.0.running_mean" in source.tensors:
        fold_batch_norm(source.tensors, "head.0", "head.1" if "head.1.weight" in source.tensors else "head")
        source.folded.append("the BatchNorm of a linear probe: into the head")


def _report(source: Source, metadata: Metadata, encoder: EncoderConfig, reshaped: list[str]) -> dict[str, Any]:
    return {
        "source": str(source.file),
        "layout": source.layout,
        "architecture": source.architecture,
        "kind": metadata.kind,
        "classes": numbered(metadata.class_names) if metadata.class_names else metadata.num_classes,
        "model": encoder.name,
        "image_size": list(encoder.image_size),
        "tensors": len(source.tensors),
        "parameters": sum(tensor.numel() for tensor in source.tensors.values()),
        "renamed": source.renamed,
        "folded": source.folded,
        "dropped": source.dropped,
        "reshaped": reshaped,
        "missing": [],
        "unexpected": [],
        "preprocess": metadata.preprocess,
        PREPROCESS_FROM: metadata.provenance[PREPROCESS_FROM],
        "notes": source.notes,
        "licence": metadata.licence,
    }


# --- what the file says ----------------------------------------------------------------------------------------------


def _norm_pix_loss(source: Source, asked: bool | None) -> bool:
    """What the user says, else the release's name, else the file, else yes."""
    known = (asked, trained_on_normalised_pixels(source), source.norm_pix_loss)
    return next((value for value in known if value is not None), bool(source.settings.get("norm_pix_loss", True)))


def _kind(tensors: dict[str, Tensor]) -> CheckpointKind:
    if "decoder_pred.weight" in tensors:
        return "mae"
    return "classifier" if "head.weight" in tensors else "encoder"


def _pool(source: Source) -> str:
    return source.pool or ("avg" if "fc_norm.weight" in source.tensors else "cls")


def _patch_size(source: Source) -> int:
    rows, columns = tensor_of(source, "patch_embed.proj.weight", 4).shape[2:]
    if rows != columns or rows < 1:
        raise ConfigError(f"the patches are {rows}x{columns} pixels, those of our encoder are square")
    return int(rows)


def _made_for(source: Source, asked: tuple[int, int] | None) -> tuple[int, int]:
    """The image size of the position embeddings: the stated one or the asked one where the number of patches fits, else
    a square.
    """
    P = _patch_size(source)
    table = next((name for name in ("pos_embed", "decoder_pos_embed") if name in source.tensors), None)
    if table is None:
        size = asked or source.image_size
        if size is None:
            raise ConfigError("the file has no pos_embed, so the image size is unknown", hint=_GIVE_SIZE)
        return size
    N = tensor_of(source, table, 3).shape[1] - 1
    square = math.isqrt(max(N, 0)) * P
    for size in (source.image_size, asked, (square, square)):
        if size is not None and (size[0] // P) * (size[1] // P) == N:
            return size
    raise ConfigError(
        f"{table} holds {N} patches, which form no square{f' and not {asked[0]}x{asked[1]} pixels' if asked else ''}",
        hint=_GIVE_SIZE if math.isqrt(N + 1) ** 2 != N + 1 else f"{_GIVE_SIZE}, {_NO_ENTRY}",
    )


def _check_class_token(source: Source) -> None:
    """Our encoder has one, with an entry in the table of positions, unless the family has none."""
    tensor_of(source, "patch_embed.proj.weight", 4)
    if "cls_token" not in source.tensors and source.beyond_plain.get("class_token", True):
        raise ConfigError(
            f"{source.file} has no class token, and nothing tells which family it is of",
            hint="if it is a timm model, say which: --model NAME",
        )


def _encoder_config(source: Source, image_size: tuple[int, int], num_heads: int | None) -> EncoderConfig:
    D, C, P, _ = tensor_of(source, "patch_embed.proj.weight", 4).shape
    depth = count_blocks(source.tensors, "blocks")
    halves = 2 if source.beyond_plain.get("activation") == "swiglu" else 1
    hidden = tensor_of(source, "blocks.0.mlp.fc1.weight", 2).shape[0] // halves
    if source.architecture and num_heads not in (None, source.num_heads):
        raise ConfigError(
            f"{source.architecture} has {source.num_heads} heads, not {num_heads}", hint="leave --num-heads out"
        )
    heads = num_heads or source.num_heads or _HEADS.get(D) or max(1, D // 64)
    if not num_heads and not source.num_heads:
        source.notes.append(f"the heads are not in the file: {heads}, as is usual for a width of {D} (--num-heads)")
    shape = Preset(P, D, depth, heads)
    name = next((name for name, preset in PRESETS.items() if preset == shape), f"vit_{D}x{depth}_patch{P}")
    ratio = hidden / D
    if int(D * ratio) != hidden:  # rounding, as with 5 / 3 * 3
        ratio = math.nextafter(ratio, math.inf)
    config = EncoderConfig(
        name=name,
        image_size=image_size,
        patch_size=P,
        in_chans=C,
        embed_dim=D,
        depth=depth,
        num_heads=heads,
        mlp_ratio=ratio,
        **source.beyond_plain,
    )
    # A preset's name says that it is the original's ViT.
    return replace(config, name=source.name or name) if config.beyond_plain() else config


def _decoder_config(source: Source, options: ImportOptions) -> DecoderConfig:
    width = tensor_of(source, "decoder_embed.weight", 2).shape[0]
    heads = options.decoder_num_heads or source.decoder_num_heads  # else one for every 32 of the width
    return DecoderConfig(
        decoder_depth=count_blocks(source.tensors, "decoder_blocks"), decoder_embed_dim=width, decoder_num_heads=heads
    )


def _fit_positions(
    source: Source, made_for: tuple[int, int], encoder: EncoderConfig, decoder: DecoderConfig | None
) -> list[str]:
    """Rebuild absent sine-cosine tables, interpolate those of another grid; says what it did."""
    done = []
    old, new = (made_for[0] // encoder.patch, made_for[1] // encoder.patch), encoder.grid_size
    tables = [("pos_embed", encoder.width)] if encoder.position_table else []
    tables += [("decoder_pos_embed", decoder.decoder_embed_dim)] if decoder else []
    for name, width in tables:
        if name not in source.tensors:
            source.tensors[name] = sincos_position_embedding(width, new)
            done.append(f"{name}: absent, rebuilt as the fixed sine-cosine table")
        elif (table := tensor_of(source, name, 3)).shape[1] == 1 + old[0] * old[1] and old != new:
            source.tensors[name] = interpolate_position_embedding(table.float(), old, new, source.positions)
            done.append(
                f"{name}: interpolated from {old[0]}x{old[1]} to {new[0]}x{new[1]} patches ({source.positions})"
            )
    return done


def _class_names(source: Source, num_classes: int | None, asked: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """The classes in the order of the logits, where they are known; the report's notes say what is assumed."""
    if asked is not None and len(asked) != num_classes:
        have = f"has {num_classes}" if num_classes is not None else "has no head"
        raise ConfigError(f"--class-names has {len(asked)} names, and the model in {source.file} {have}")
    labels = source.settings.get("id2label")
    names = asked or source.class_names
    if names is None and isinstance(labels, dict):
        names = tuple(str(labels[key]) for key in sorted(labels, key=int))
    if names is not None and len(names) != num_classes:
        if num_classes is not None:
            source.notes.append(f"{len(names)} class names for {num_classes} classes are left aside (--class-names)")
        names = None
    if names is not None and orders_differ(names):
        orders = {natural_order(names): "natural, as timm's", tuple(sorted(names)): "alphabetical, as torchvision's"}
        order = orders.get(names, "neither natural nor alphabetical")
        source.notes.append(f"the order of the classes is {order}: {numbered(names)}")
    if names is None and num_classes is not None:
        source.notes.append(
            "the file has no class names (--class-names FILE): eval takes folders in alphabetical order, where timm's"
            " natural order (2 before 10) is the same"
        )
    return names
