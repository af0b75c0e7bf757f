"""What a network computes on its way, by name: tokens after a block, queries, keys and values, the decoder's tokens,
latent, pooled, logits.

A student is compared with its teacher in these. Only the blocks that are needed are run.
Shapes: B images, N patches, K kept patches, D width, T numbers predicted for a patch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from mae_deploy.models.mae import MaskedAutoencoder
from mae_deploy.models.masking import Masking
from mae_deploy.models.rotary import Turn
from mae_deploy.models.vit import Classifier, Encoder, run_block

TapKind = Literal["tokens", "qkv", "decoder", "latent", "pixels", "cls", "pooled", "logits"]


class Tap(NamedTuple):
    """A place in a network."""

    kind: TapKind
    """What is read there:

    - tokens `(B, 1 + K, D)` after a block, CLS first;
    - qkv `(B, 3, heads, 1 + K, D / heads)` as a block's attention multiplies them (rotary: as they were turned);
    - decoder `(B, N, D')` after a block of the decoder, in the image's order, without CLS;
    - latent `(B, 1 + K, D)` after the final norm;
    - pixels `(B, N, T)`, the decoder's prediction;
    - cls `(B, D)`, the CLS token of the latent;
    - pooled `(B, D)`, what a classifier's head reads, else what attention pools, or the mean of the latent's patches;
    - logits `(B, classes)`.

    Registers are left out, and where there is no CLS, the mean of the patches stands for it (qkv: zeros).
    """
    block: int = 0
    """The block of tokens, qkv and decoder, counted from 1; else 0."""


Taps = dict[Tap, Tensor]

BLOCK_KINDS: tuple[TapKind, ...] = ("tokens", "qkv")
"""What a block of the encoder gives; everything else needs all of its blocks."""

DECODER_KINDS: tuple[TapKind, ...] = ("decoder", "pixels")
"""What a decoder gives."""


def deepest(wanted: Iterable[Tap], *kinds: TapKind) -> int:
    """The highest block of these kinds; 0 where there is none."""
    return max((tap.block for tap in wanted if tap.kind in kinds), default=0)


def encoder_depth(wanted: Collection[Tap], depth: int) -> int:
    """How many of the encoder's blocks have to be run: up to the deepest tap, all for what lies behind the blocks."""
    return depth if any(tap.kind not in BLOCK_KINDS for tap in wanted) else deepest(wanted, *BLOCK_KINDS)


def tapped(model: Encoder, images: Tensor, wanted: Collection[Tap], masking: Masking | None = None) -> Taps:
    """Run the network as far as `wanted` needs it.

    Args:
        images: `(B, C, H, W)`.
        masking: which patches the encoder sees; None: all, in order. An autoencoder with mask tokens in its encoder
            sees all patches either way.

    Raises:
        ValueError: the network has no such place, or a decoder is tapped without a masking.
    """
    taps: Taps = {}
    tokens = _run_encoder(model, images, masking, wanted, taps)
    behind = [tap for tap in wanted if tap.kind not in BLOCK_KINDS]
    if not behind:
        return taps
    latent: Tensor = model.norm(tokens)
    read = {
        "latent": lambda: model.rows(latent),
        "cls": lambda: model.rows(latent)[:, 0],
        "pooled": lambda: model.pool_latent(latent),
        "logits": lambda: logits(model, latent),
    }
    taps.update({tap: read[tap.kind]() for tap in behind if tap.kind not in DECODER_KINDS})
    if decoded := [tap for tap in behind if tap.kind in DECODER_KINDS]:
        _run_decoder(model, latent, masking, decoded, taps)
    return taps


def logits(model: Encoder, latent: Tensor) -> Tensor:
    """`(B, P + K, D) -> (B, classes)`.

    Raises:
        ValueError: the network is not a classifier.
    """
    if not isinstance(model, Classifier):
        raise ValueError("logits of a network without a head")
    return model.head(model.pool_latent(latent))  # type: ignore[no-any-return]


def unreached(model: Encoder, wanted: Collection[Tap]) -> Iterator[nn.Module | nn.Parameter]:
    """The parts that `wanted` does not depend on: without a gradient from anywhere else they have none, for which
    distributed training would wait.
    """
    depth = encoder_depth(wanted, len(model.blocks))
    kinds = {tap.kind for tap in wanted}
    yield from model.blocks[depth:]
    if only_qkv(wanted, depth):
        last: Any = model.blocks[depth - 1]
        yield from (last.attn.proj, last.norm2, last.mlp)
    if kinds <= set(BLOCK_KINDS):
        yield model.norm
    if kinds.isdisjoint(("pooled", "logits")):
        yield from (model.fc_norm, *([] if model.attn_pool is None else [model.attn_pool]))
    if isinstance(model, Classifier) and "logits" not in kinds:
        yield model.head
    if isinstance(model, MaskedAutoencoder):
        yield from _unreached_decoder(model, wanted)


def only_qkv(wanted: Collection[Tap], depth: int) -> bool:
    """Whether the last block that is run serves its queries, keys and values alone."""
    return (
        Tap("qkv", depth) in wanted
        and Tap("tokens", depth) not in wanted
        and all(tap.kind in BLOCK_KINDS for tap in wanted)
    )


def _embedded(model: Encoder, images: Tensor, masking: Masking | None) -> tuple[Tensor, list[Turn] | None]:
    """What the first block reads, and its rotary positions."""
    if masking is None:
        return model.embed(images), model.turns()
    if isinstance(model, MaskedAutoencoder) and model.objective.encoder_mask_tokens:
        return model.embed_masked(images, masking.mask), model.turns()
    return model.embed(images, masking.ids_keep), model.turns(masking.ids_keep)


def _run_encoder(
    model: Encoder, images: Tensor, masking: Masking | None, wanted: Collection[Tap], taps: Taps
) -> Tensor:
    """Run the blocks that are needed, and note what is wanted of them; returns the tokens after the last whole one."""
    depth = encoder_depth(wanted, len(model.blocks))
    if depth > len(model.blocks):
        raise ValueError(f"a tap at block {depth} of {len(model.blocks)}")
    tokens, turns = _embedded(model, images, masking)
    for number, block in enumerate(model.blocks[:depth], start=1):
        after, inside = Tap("tokens", number), Tap("qkv", number)
        turn = turns[number - 1] if turns else None
        if inside not in wanted:
            tokens = run_block(block, tokens, turn=turn)
        elif number == depth and only_qkv(wanted, depth):
            taps[inside] = _heads_rows(model, run_block(block, tokens, turn=turn, inner="only_qkv"))
        else:
            tokens, qkv = run_block(block, tokens, turn=turn, inner="with_qkv")
            taps[inside] = _heads_rows(model, qkv)
        if after in wanted:
            taps[after] = model.rows(tokens)
    return tokens


def _heads_rows(model: Encoder, qkv: Tensor) -> Tensor:
    """As `Encoder.rows`, of `(B, 3, heads, P + K, d)`: where there is no CLS, zeros stand for its queries, keys and
    values.
    """
    prefix = model.config.num_prefix
    if prefix == 1 and model.config.class_token:
        return qkv
    cls = qkv[:, :, :, :1] if model.config.class_token else torch.zeros_like(qkv[:, :, :, :1])
    return torch.cat([cls, qkv[:, :, :, prefix:]], dim=3)


def _run_decoder(model: Encoder, latent: Tensor, masking: Masking | None, wanted: Collection[Tap], taps: Taps) -> None:
    if not isinstance(model, MaskedAutoencoder) or masking is None:
        raise ValueError("only an autoencoder has a decoder, which predicts what a masking hides")
    depth = _decoder_depth(model, wanted)
    if depth > len(model.decoder_blocks):
        raise ValueError(f"a tap at block {depth} of the decoder's {len(model.decoder_blocks)}")
    tokens = model.embed_decoder(latent, masking.ids_restore) if model.decoder_config.decoder_depth else latent
    for number, block in enumerate(model.decoder_blocks[:depth], start=1):
        tokens = run_block(block, tokens)
        if (tap := Tap("decoder", number)) in wanted:
            taps[tap] = tokens[:, 1:]
    if (pixels := Tap("pixels")) in wanted:
        taps[pixels] = model.predict(model.decoder_norm(tokens) if model.decoder_config.decoder_depth else tokens)


def _decoder_depth(model: MaskedAutoencoder, wanted: Collection[Tap]) -> int:
    return len(model.decoder_blocks) if Tap("pixels") in wanted else deepest(wanted, "decoder")


def _unreached_decoder(model: MaskedAutoencoder, wanted: Collection[Tap]) -> Iterator[nn.Module | nn.Parameter]:
    kinds = {tap.kind for tap in wanted}
    yield from model.decoder_blocks[_decoder_depth(model, wanted) :]
    if "pixels" not in kinds:
        yield model.decoder_pred
        if model.decoder_config.decoder_depth:
            yield model.decoder_norm
    if kinds.isdisjoint(DECODER_KINDS):
        if not model.objective.encoder_mask_tokens:
            yield model.mask_token
        if model.decoder_config.decoder_depth:
            yield model.decoder_embed
