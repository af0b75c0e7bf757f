"""How many floating-point operations an image costs: those of the matrix products, two for each multiply-add.

Norms, softmax, GELU and residual additions are left out, as is usual: together they are below one per cent of a ViT-B.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from mae_deploy.runtime.manifest import CLASS_OUTPUTS, Manifest, ModelEntry, TensorEntry, num_prefix


def flops_per_image(manifest: Manifest, num_keep: int) -> int | None:
    """Operations for one image of which the graph sees `num_keep` patches, K; None where the manifest does not have the
    decoder's numbers.
    """
    model = manifest["model"]
    outputs = {entry["name"]: entry for entry in manifest["graph"]["outputs"]}
    seen = num_prefix(model) + (manifest["num_patches"] if manifest["token_mode"] == "cached" else num_keep)
    operations = _encoder(model, num_keep, _depth(model, list(outputs)), seen)
    if "pixels" in outputs:
        decoder = manifest.get("decoder")
        if not isinstance(decoder, Mapping):
            return None
        operations += _decoder(model, decoder, num_keep, manifest["num_patches"])
    if classes := next((outputs[name]["shape"][-1] for name in CLASS_OUTPUTS if name in outputs), None):
        operations += 2 * model["embed_dim"] * int(classes)
    return operations + sum(
        _pyramid_level(model, entry) for name, entry in outputs.items() if name in ("p2", "p3", "p4", "p5")
    )


def autoencoder_flops(model: ModelEntry, decoder: Mapping[str, int], num_keep: int, num_patches: int) -> int:
    """Operations of a masked autoencoder's forward pass for one image: the encoder on `num_keep` patches, the decoder
    on all.
    """
    seen = num_prefix(model) + num_keep
    return _encoder(model, num_keep, model["depth"], seen) + _decoder(model, decoder, num_keep, num_patches)


def _encoder(model: ModelEntry, num_keep: int, depth: int, seen: int) -> int:
    """Patch embedding and blocks, whose attention sees `seen` tokens; with groups of bands, every patch of every group
    is embedded.
    """
    D = model["embed_dim"]
    rows, columns = (side // model["patch_size"] for side in model["image_size"])
    embedded = num_keep if model.get("band_groups") is None else rows * columns
    maps = 3 if model.get("activation") == "swiglu" else 2
    block = _block(num_prefix(model) + num_keep, seen, D, model["mlp_ratio"], maps)
    return 2 * embedded * _patch_dim(model) * D + depth * block


def _block(num_tokens: int, seen: int, dim: int, mlp_ratio: float, maps: int = 2) -> int:
    """qkv, q kᵀ, its product with v, proj, and the maps of the MLP, for T tokens of width D that attend to `seen`.

    Args:
        maps: of the MLP: SwiGLU has three.
    """
    T, D = num_tokens, dim
    linear = T * D * (3 * D + D + maps * int(D * mlp_ratio))
    attention = 2 * T * seen * D
    return 2 * (linear + attention)


def _decoder(model: ModelEntry, decoder: Mapping[str, int], num_keep: int, num_patches: int) -> int:
    """Embedding of the visible tokens, blocks over all patches, prediction of their pixels; its MLP has ratio 4."""
    D, depth = decoder["decoder_embed_dim"], decoder["decoder_depth"]
    embed = 2 * (1 + num_keep) * model["embed_dim"] * D
    return embed + depth * _block(1 + num_patches, 1 + num_patches, D, 4) + 2 * num_patches * D * _patch_dim(model)


def _pyramid_level(model: ModelEntry, entry: TensorEntry) -> int:
    """One map `(B, E, h, w)`: the transposed convolutions that double its sides, then convolutions of 1 x 1 and 3 x
    3.
    """
    D, E = model["embed_dim"], int(entry["shape"][1])
    pixels = int(entry["shape"][2]) * int(entry["shape"][3])
    width, doubled = {
        "p2": (D // 4, pixels * (D // 2) * (D // 4) + pixels // 4 * D * (D // 2)),
        "p3": (D // 2, pixels * D * (D // 2)),
    }.get(entry["name"], (D, 0))
    return 2 * (doubled + pixels * (width * E + 9 * E * E))


def _depth(model: ModelEntry, outputs: list[str]) -> int:
    """The blocks that the outputs need: those after the last one asked for are never run."""
    inner = [re.fullmatch(r"block_(\d+)", name) for name in outputs]
    return max(int(match[1]) + 1 for match in inner if match) if all(inner) else model["depth"]


def _patch_dim(model: ModelEntry) -> int:
    return model["patch_size"] ** 2 * model["in_chans"]
