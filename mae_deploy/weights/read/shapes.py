"""The name and shape of every tensor of a model, without building it."""

from __future__ import annotations

from mae_deploy.models.config import DecoderConfig, EncoderConfig


def expected_shapes(
    encoder: EncoderConfig, decoder: DecoderConfig | None, *, pool: str | None = None, num_classes: int | None = None
) -> dict[str, tuple[int, ...]]:
    """The state dict's names and shapes: of an autoencoder where there is a decoder, else of an encoder or a
    classifier.
    """
    D, N, pixels = encoder.width, encoder.num_patches, encoder.patch**2 * encoder.in_chans
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.weight": (D, encoder.in_chans, encoder.patch, encoder.patch),
        "patch_embed.proj.bias": (D,),
        **_block_shapes("blocks", encoder.blocks, D, int(D * encoder.mlp_ratio), encoder),
    }
    present = {
        "cls_token": (encoder.class_token, (1, 1, D)),
        "reg_token": (encoder.num_registers > 0, (1, encoder.num_registers, D)),
        "pos_embed": (bool(encoder.position_table), (1, 1 + N, D)),
        "rope.freqs": (encoder.rotary == "mixed", (2, encoder.blocks, encoder.heads, D // encoder.heads // 2)),
    }
    shapes |= {name: shape for name, (there, shape) in present.items() if there}
    if encoder.pre_norm:
        shapes |= _affine("norm_pre", D)
    if pool == "avg" or (pool is None and encoder.pool_norm):
        shapes |= _affine("fc_norm", D)
    if pool != "avg" and encoder.final_norm:
        shapes |= _affine("norm", D)
    if encoder.pool_heads and pool in (None, "map"):
        hidden = int(D * encoder.pool_mlp_ratio)
        shapes |= {"attn_pool.latent": (1, 1, D), **_linear("attn_pool.q", D, D), **_linear("attn_pool.kv", D, 2 * D)}
        shapes |= {**_linear("attn_pool.proj", D, D), **_affine("attn_pool.norm", D)}
        shapes |= {**_linear("attn_pool.mlp.fc1", D, hidden), **_linear("attn_pool.mlp.fc2", hidden, D)}
    if num_classes is not None:
        shapes |= _linear("head", D, num_classes)
    if decoder is not None:
        E = decoder.decoder_embed_dim
        shapes |= {"mask_token": (1, 1, E), "decoder_pos_embed": (1, 1 + N, E), **_linear("decoder_embed", D, E)}
        shapes |= _block_shapes("decoder_blocks", decoder.decoder_depth, E, 4 * E)
        shapes |= {**_affine("decoder_norm", E), **_linear("decoder_pred", E, pixels)}
    return shapes


def _affine(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _linear(name: str, source: int, target: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (target, source), f"{name}.bias": (target,)}


def _block_shapes(
    prefix: str, depth: int, width: int, hidden: int, encoder: EncoderConfig | None = None
) -> dict[str, tuple[int, ...]]:
    """Those of plain blocks, or of the encoder's."""
    shapes: dict[str, tuple[int, ...]] = {}
    gated = encoder is not None and encoder.activation == "swiglu"
    for index in range(depth):
        block = f"{prefix}.{index}"
        shapes |= {
            **_affine(f"{block}.norm1", width),
            **_linear(f"{block}.attn.qkv", width, 3 * width),
            **_linear(f"{block}.attn.proj", width, width),
        }
        shapes |= {
            **_affine(f"{block}.norm2", width),
            **_linear(f"{block}.mlp.fc1", width, 2 * hidden if gated else hidden),
            **_linear(f"{block}.mlp.fc2", hidden, width),
        }
        if encoder is not None and encoder.qk_norm:
            head = width // encoder.heads
            shapes |= {**_affine(f"{block}.attn.q_norm", head), **_affine(f"{block}.attn.k_norm", head)}
        if encoder is not None and encoder.attn_norm:
            shapes |= _affine(f"{block}.attn.norm", width)
        if encoder is not None and encoder.mlp_norm:
            shapes |= _affine(f"{block}.mlp.norm", hidden)
    return shapes
