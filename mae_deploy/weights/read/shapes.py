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


def _affine(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _linear(name: str, source: int, target: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (target, source), f"{name}.bias": (target,)}


def _block_shapes(prefix: str, depth: int, width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for index in range(depth):
        block = f"{prefix}.{index}"
        shapes |= {
            **_affine(f"{block}.norm1", width),
            **_linear(f"{block}.attn.qkv", width, 3 * width),
            **_linear(f"{block}.attn.proj", width, width),
        }
        shapes |= {
            **_affine(f"{block}.norm2", width),
            **_linear(f"{block}.mlp.fc1", width, hidden),
            **_linear(f"{block}.mlp.fc2", hidden, width),
        }
    return shapes
