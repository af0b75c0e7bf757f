"""A smaller encoder out of a larger one's own layers, heads and channels.

Xu et al., Initializing Models with Larger Ones (weight selection): https://arxiv.org/abs/2311.18823. Channels are
chosen evenly spaced, and the same ones wherever a tensor touches the residual stream, so that what one layer writes,
the next one reads; a head is chosen as a whole. Shapes: D width, H heads, C channels of an image, P patch side.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from timm.layers import resample_patch_embed
from torch import Tensor

from mae_deploy.errors import ConfigError
from mae_deploy.models.config import EncoderConfig, SliceBlocks
from mae_deploy.models.position import interpolate_position_embedding, sincos_position_embedding
from mae_deploy.models.vit import Classifier, Encoder
from mae_deploy.weights.load import LoadedWeights

E = TypeVar("E", bound=Encoder)


def start_from_slice(model: E, larger: LoadedWeights, *, blocks: SliceBlocks = "even") -> E:
    """Put a slice of a larger encoder into a model; its decoder stays as it is.

    The head goes along where both are classifiers of as many classes that pool alike. A model of the larger one's shape
    computes what that does.

    Args:
        blocks: which ones: evenly spaced, the first and the last among them, or the first ones.

    Raises:
        ConfigError: a side of the model is larger than the other's, or they read different images.
    """
    tensors = slice_encoder(larger, model.config, blocks)
    if isinstance(model, Classifier) and _heads_alike(model, larger):
        tensors |= _slice_head(larger, model.config)
    own = model.state_dict()
    model.load_state_dict({name: tensor for name, tensor in tensors.items() if name in own}, strict=False)
    return model


def slice_encoder(larger: LoadedWeights, target: EncoderConfig, blocks: SliceBlocks = "even") -> dict[str, Tensor]:
    """The tensors of a target encoder, with a norm behind the blocks where the larger one has it.

    Raises:
        ConfigError: as above.
    """
    source, tensors = larger.encoder_config, larger.tensors
    _check(source, target)
    channels = evenly(target.width, source.width)
    sliced = {
        "cls_token": _take(tensors["cls_token"], None, None, channels),
        "pos_embed": _positions(larger, target),
        "patch_embed.proj.weight": resample_patch_embed(
            _take(tensors["patch_embed.proj.weight"], channels), [target.patch, target.patch]
        ),
        "patch_embed.proj.bias": _take(tensors["patch_embed.proj.bias"], channels),
    }
    axes = _block_axes(source, target)
    for block, chosen in enumerate(choose_blocks(target.blocks, source.blocks, blocks)):
        sliced |= {
            f"blocks.{block}.{name}": _take(tensors[f"blocks.{chosen}.{name}"], *picked)
            for name, picked in axes.items()
        }
    return sliced | {name: _take(tensors[name], channels) for name in ("norm.weight", "norm.bias") if name in tensors}


def evenly(count: int, total: int) -> Tensor:
    """`count` of `total` indices, evenly spaced from the first on. Of sin-cos positions, these channels have the
    frequencies of the smaller table.
    """
    return torch.arange(count) * total // count


def choose_blocks(count: int, total: int, blocks: SliceBlocks) -> list[int]:
    """Which of a larger encoder's blocks, counted from 0."""
    if blocks == "first" or count == 1:
        return list(range(count))
    return [round(block * (total - 1) / (count - 1)) for block in range(count)]


def _block_axes(source: EncoderConfig, target: EncoderConfig) -> dict[str, tuple[Tensor, ...]]:
    """A block's tensors and the indices to take along their first axes."""
    channels = evenly(target.width, source.width)
    hidden = evenly(_hidden(target), _hidden(source))
    head_dim = source.width // source.heads
    inner = (
        evenly(target.heads, source.heads)[:, None] * head_dim + evenly(target.width // target.heads, head_dim)
    ).flatten()
    qkv = torch.cat([part * source.width + inner for part in range(3)])
    axes: dict[str, tuple[Tensor, ...]] = {
        f"{norm}.{part}": (channels,) for norm in ("norm1", "norm2") for part in ("weight", "bias")
    }
    for layer, rows, columns in (
        ("attn.qkv", qkv, channels),
        ("attn.proj", channels, inner),
        ("mlp.fc1", hidden, channels),
        ("mlp.fc2", channels, hidden),
    ):
        axes |= {f"{layer}.weight": (rows, columns), f"{layer}.bias": (rows,)}
    return axes


def _positions(larger: LoadedWeights, target: EncoderConfig) -> Tensor:
    """The target's own sin-cos table, plus what the larger one has learned on top of its:
    `(1, 1 + N, D) -> (1, 1 + N', D')`.
    """
    source = larger.encoder_config
    learned = interpolate_position_embedding(
        larger.tensors["pos_embed"] - sincos_position_embedding(source.width, source.grid_size),
        source.grid_size,
        target.grid_size,
        larger.metadata.positions,
    )
    return sincos_position_embedding(target.width, target.grid_size) + _take(
        learned, None, None, evenly(target.width, source.width)
    )


def _heads_alike(model: Classifier, larger: LoadedWeights) -> bool:
    metadata = larger.metadata
    return (
        metadata.kind == "classifier"
        and metadata.pool == model.pool
        and metadata.num_classes == model.head.out_features
    )


def _slice_head(larger: LoadedWeights, target: EncoderConfig) -> dict[str, Tensor]:
    channels = evenly(target.width, larger.encoder_config.width)
    head = {
        "head.weight": _take(larger.tensors["head.weight"], None, channels),
        "head.bias": larger.tensors["head.bias"],
    }
    return head | {
        name: _take(larger.tensors[name], channels)
        for name in ("fc_norm.weight", "fc_norm.bias")
        if name in larger.tensors
    }


def _take(tensor: Tensor, *axes: Tensor | None) -> Tensor:
    """Index the first axes; None leaves one whole."""
    for axis, indices in enumerate(axes):
        if indices is not None:
            tensor = tensor.index_select(axis, indices)
    return tensor


def _hidden(config: EncoderConfig) -> int:
    return int(config.width * config.mlp_ratio)


def _check(source: EncoderConfig, target: EncoderConfig) -> None:
    if source.band_groups is not None or target.band_groups is not None:
        raise ConfigError("an encoder with groups of bands cannot be sliced", hint="start the student at random")
    for config, whose in ((source, "the larger encoder"), (target, "the student")):
        if given := config.beyond_plain():
            differing = ", ".join(f"{name} {value}" for name, value in given.items())
            raise ConfigError(
                f"{whose} has {differing}: only plain ViTs are sliced",
                hint="start the student at random",
            )
    if source.in_chans != target.in_chans:
        raise ConfigError(f"the larger encoder reads {source.in_chans} channels, the student {target.in_chans}")
    sides = {
        "width": (target.width, source.width),
        "blocks": (target.blocks, source.blocks),
        "heads": (target.heads, source.heads),
        "channels a head": (target.width // target.heads, source.width // source.heads),
        "channels in its MLP": (_hidden(target), _hidden(source)),
    }
    for side, (wanted, there) in sides.items():
        if wanted > there:
            what = (
                f"a width of {wanted}, and the larger encoder has {there}"
                if side == "width"
                else f"{wanted} {side}, and the larger encoder has {there}"
            )
            raise ConfigError(
                f"the student has {what}: it cannot be a slice of it",
                hint="start it at random, or choose its shape within the other's",
            )
