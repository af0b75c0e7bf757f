"""Which graph to write: token mode, sizes, precision, outputs, and what does not go together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from mae_deploy.checkpoint import Metadata
from mae_deploy.config import from_dict
from mae_deploy.errors import ConfigError
from mae_deploy.export.graph.precision import Island, Precision, Typing
from mae_deploy.images.read import Array
from mae_deploy.models.config import EncoderConfig, ObjectiveConfig
from mae_deploy.models.pyramid import LEVELS
from mae_deploy.runtime.manifest import CLASS_OUTPUTS

TokenMode = Literal["full", "visible", "ragged", "reconstruct", "cached"]
Images = Literal["float32", "float16", "uint8"]
Pixels = Literal["target", "normalised", "image"]


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphSpec:
    """Which graph to write."""

    token_mode: TokenMode
    """full: all patches; visible: those named by `ids_keep`; ragged: `num_keep` of them for each image; reconstruct:
    encoder and decoder; cached: some patches, against the keys and values of all."""
    keep: int | None = None
    """Fixed number of kept patches (ragged: length of the rows); None leaves it dynamic."""
    batch: int | None = None
    """Fixed batch; None leaves it dynamic."""
    outputs: tuple[str, ...] | None = None
    """Output names; None takes the model's own (see `default_outputs`)."""
    images: Images = "float32"
    """float32 or float16 `(B, C, H, W)`, normalised; or uint8 `(B, H, W, C)`, with the normalisation in the graph."""
    cache: Literal["float32", "float16"] = "float32"
    """Type of the keys and values of a cached graph."""
    fixed_rows: bool = False
    """Whether a cached graph takes all rows of the cache even where K is dynamic."""
    features: Images = "float32"
    """Type of the outputs: float32 or float16."""
    pixels: Pixels = "target"
    """What a reconstruction is: as the decoder predicts it, in the space of normalised images, or of images from 0 to
    1."""
    precision: Precision = "fp32"
    typing: Typing = "weak"
    """See `export.graph.precision`."""
    fp32_ops: tuple[Island, ...] = ()
    """Operators kept in FP32 in an FP16 graph."""
    quantized: Mapping[str, float | None] = field(default_factory=dict)
    """Linear maps in INT8 or FP8, such as `blocks.0.attn.qkv`, with the scale of their input, or None to find it at run
    time."""
    attention_scales: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)
    """Attention in INT8 or FP8, such as `blocks.0.attn`, with the scales of q, k and v."""
    weight_bits: int = 8
    """Of the weights of `quantized`: 8, or 7 in INT8."""
    stores_rounded: bool = True
    """Whether the weights of static INT8 are stored as integers; see `BlockWriter`."""
    emulates_bf16: bool = False
    """Whether BF16 arithmetic is written as FP32 arithmetic that is rounded; see `GraphBuilder`."""
    fuses_tanh: bool = True
    """Whether the engine has one kernel for GELU by tanh that is worth it, as ONNX Runtime, and not OpenVINO, has."""
    pyramid: Mapping[str, Array] | None = None
    """Weights of a simple feature pyramid, for the outputs p2 to p5."""


def block_tensor(index: int) -> str:
    """The graph's name of the tokens after encoder block `index`, `(B, P + K, D)` or their rows, `(B * (P + K), D)`."""
    return f"blocks.{index}/mlp_residual"


def available_outputs(metadata: Metadata, token_mode: TokenMode = "full", *, pyramid: bool = False) -> tuple[str, ...]:
    """What a model can give.

    A mean-pooled classifier (`avg`) has no norm after its last block, so its tokens are not offered; `pooled` is then
    what its head reads.
    """
    encoder = from_dict(EncoderConfig, metadata.encoder)
    blocks = tuple(f"block_{index}" for index in range(encoder.blocks))
    maps = () if token_mode == "cached" else ("feature_map", *(LEVELS if pyramid else ()))
    if metadata.kind == "classifier" and metadata.pool == "avg":
        return (*CLASS_OUTPUTS, "pooled", *maps[1:], *blocks)
    headed = CLASS_OUTPUTS if metadata.kind == "classifier" else ()
    names = (*headed, *(("cls",) if encoder.class_token else ()), "tokens", "pooled", *maps, *blocks)
    return ("pixels", *names) if token_mode == "reconstruct" else names


def default_outputs(metadata: Metadata, token_mode: TokenMode = "full") -> tuple[str, ...]:
    """What a graph gives unless other outputs are asked for."""
    if token_mode == "reconstruct":
        return ("pixels",)
    names = tuple(
        name for name in available_outputs(metadata, token_mode) if name in ("logits", "cls", "tokens", "pooled")
    )
    return with_last_tokens(names, metadata) if token_mode == "cached" else names


def with_last_tokens(names: tuple[str, ...], metadata: Metadata) -> tuple[str, ...]:
    """The outputs of a cached graph: where one of them is of the whole frame's tokens, also the new ones of these, from
    which the next frame's are summed up.
    """
    averaged = metadata.kind == "classifier" and metadata.pool == "avg"
    last = f"block_{from_dict(EncoderConfig, metadata.encoder).blocks - 1}" if averaged else "tokens"
    of_all = metadata.kind == "classifier" and metadata.pool in ("avg", "mean", "map")
    pooled = "pooled" in names or (of_all and not {"logits", "probs"}.isdisjoint(names))
    return names if not pooled or last in names else (*names, last)


def check_mode(metadata: Metadata, token_mode: TokenMode) -> None:
    """Whether there is a graph of this mode.

    Raises:
        ConfigError: a reconstruction without a decoder, of groups of bands, of anything but pixels, or by an encoder
            with mask tokens; a stream of groups of bands.
    """
    if token_mode == "cached" and metadata.encoder.get("band_groups") is not None:
        raise ConfigError(
            "--tokens cached: a model with --band-groups has several tokens a patch, which streams do not keep",
            hint="use full, visible or ragged",
        )
    if token_mode != "reconstruct":
        return
    if metadata.kind != "mae":
        raise ConfigError(
            f"--tokens reconstruct needs a decoder, and this checkpoint is of kind {metadata.kind}",
            hint="give a pretraining run",
        )
    objective = from_dict(ObjectiveConfig, metadata.objective or {})
    obstacles = {
        "a model with --band-groups": metadata.encoder.get("band_groups") is not None,
        f"a model that predicts {objective.target} instead of pixels": objective.target != "pixels",
        "a model with mask tokens in the encoder": objective.encoder_mask_tokens,
    }
    for model, found in obstacles.items():
        if found:
            raise ConfigError(
                f"--tokens reconstruct: {model} is exported without its decoder", hint="use full, visible or ragged"
            )
