"""Every kind of graph that the exporter writes for TensorRT, of small encoders with random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch

from mae_deploy.checkpoint import Metadata
from mae_deploy.config import to_dict
from mae_deploy.export.graph.encoder import build_graph
from mae_deploy.export.graph.spec import GraphSpec
from mae_deploy.images.preprocess import Preprocess, default_preprocess
from mae_deploy.models.config import DecoderConfig, EncoderConfig, ObjectiveConfig
from mae_deploy.models.mae import MaskedAutoencoder
from mae_deploy.models.quantization.rounding import eligible_linears
from mae_deploy.models.vit import Classifier, Encoder
from mae_deploy.weights.pyramid import random_pyramid

SIZE = (64, 96)
N = 24
"""Patches of an image; of the encoder of groups of bands, twice as many tokens."""

_CONFIG = EncoderConfig(name="mini", image_size=SIZE, patch_size=16, embed_dim=128, depth=3, num_heads=2)
_BANDS = EncoderConfig(
    name="bands",
    image_size=SIZE,
    patch_size=16,
    in_chans=4,
    embed_dim=128,
    depth=2,
    num_heads=2,
    band_groups=((0, 1, 2), (3,)),
)
_FAMILIES = {
    "rotary": replace(
        _CONFIG, rotary="dinov3", position_table=False, num_registers=4, activation="swiglu", norm_eps=1e-5
    ),
    "normed": replace(_CONFIG, rotary="dinov3", position_table=False, qk_norm=True, attn_norm=True),
    "mixed": replace(_CONFIG, rotary="mixed", position_table=False, class_token=False, qk_norm=True, mlp_norm=True),
    "pooling": replace(_CONFIG, rotary="index", pre_norm=True, activation="gelu_tanh", pool_heads=4),
}
"""What today's families are made of."""
_DECODER = DecoderConfig(decoder_embed_dim=64, decoder_depth=2, decoder_num_heads=2)
_ISLANDS = {"bf16": ("gelu", "norm", "residual")}
"""What a strongly typed graph of the exporter keeps in FP32 by default."""


@dataclass(frozen=True)
class Kind:
    """A graph: of which model, and how written."""

    name: str
    model: str
    typing: str
    precision: str
    given: Mapping[str, Any] = field(default_factory=dict)
    attention: bool = False
    """Attention in INT8 or FP8 as well."""

    @property
    def tokens(self) -> int:
        """The most that K can be."""
        return 2 * N if self.model == "bands" else N

    def write(self, path: Path) -> Path:
        """Write the ONNX file."""
        metadata, module = _models()[self.model]
        quantized = self.precision in ("int8", "fp8")
        strong = self.typing == "strong"
        given = dict(self.given)
        if given.pop("pyramid", False):
            given["pyramid"] = {
                name: tensor.detach().numpy() for name, tensor in random_pyramid(128, 0).module.state_dict().items()
            }
        spec = GraphSpec(
            **{
                "precision": self.precision if strong or quantized else "fp32",
                "typing": self.typing,
                "fp32_ops": _ISLANDS.get(self.precision, ()) if strong else (),
                "stores_rounded": strong,
                "quantized": dict.fromkeys(eligible_linears(module), 0.05) if quantized else {},
                "attention_scales": (
                    {f"blocks.{index}.attn": (0.05, 0.05, 0.05) for index in range(_CONFIG.blocks)}
                    if self.attention
                    else {}
                ),
                **given,
            }
        )
        build_graph(metadata, dict(module.state_dict()), spec).save(path)
        return path


def kinds() -> Iterator[Kind]:
    """All of them."""
    for typing, precision in _arithmetics():

        def kind(
            name: str,
            model: str = "encoder",
            attention: bool = False,
            typing: str = typing,
            precision: str = precision,
            **given: Any,
        ) -> Kind:
            return Kind(f"{typing}-{precision}-{name}", model, typing, precision, given, attention)

        yield from _token_modes(kind)
        maps = ("cls", "tokens", "pooled", "feature_map")
        yield kind("visible-uint8", token_mode="visible", keep=6, images="uint8")
        yield kind("full-uint8", token_mode="full", images="uint8")
        yield kind("full-maps", token_mode="full", outputs=("cls", "feature_map", "block_1", "pooled"))
        yield kind("visible-map", token_mode="visible", outputs=("cls", "feature_map", "block_1"))
        yield kind("ragged-map", token_mode="ragged", outputs=maps)
        yield kind("full-pyramid", token_mode="full", pyramid=True, outputs=("cls", "p2", "p3", "p4", "p5"))
        yield kind("classifier", "classifier", token_mode="full", outputs=("logits",))
        yield kind("reconstruct", "mae", token_mode="reconstruct", pixels="image")
        yield kind("reconstruct-uint8", "mae", token_mode="reconstruct", pixels="image", images="uint8", keep=6)
        yield kind("bands", "bands", token_mode="ragged", outputs=maps)
        yield kind("rotary-full", "rotary", token_mode="full", outputs=maps)
        yield kind("rotary-ragged", "rotary", token_mode="ragged", outputs=maps)
        yield kind("rotary-cached", "rotary", token_mode="cached", fixed_rows=True)
        yield kind("mixed-visible", "mixed", token_mode="visible", outputs=maps[1:])
        yield kind("pooling-ragged", "pooling", token_mode="ragged", outputs=maps)
        if precision in ("int8", "fp8"):
            yield kind("full-attention", attention=True, token_mode="full")
            yield kind("visible-attention", attention=True, token_mode="visible", keep=6)
            yield kind("rotary-attention", "rotary", attention=True, token_mode="full")
            yield kind("normed-attention", "normed", attention=True, token_mode="full")
        if (typing, precision) == ("strong", "fp16"):
            yield kind("softmax32", token_mode="full", fp32_ops=("softmax",))
            yield kind("half-io", token_mode="visible", images="float16", features="float16")


def _arithmetics() -> Iterator[tuple[str, str]]:
    yield from (("strong", precision) for precision in ("fp32", "fp16", "bf16", "int8", "fp8"))
    yield from (("weak", precision) for precision in ("fp32", "fp16", "int8"))


def _token_modes(kind: Callable[..., Kind]) -> Iterator[Kind]:
    yield kind("cached-Kopen-Bopen", token_mode="cached", fixed_rows=True)
    yield kind("cached-K6-B2", token_mode="cached", keep=6, batch=2, cache="float16")
    for mode in ("full", "visible", "ragged"):
        for keep in (None,) if mode == "full" else (None, 6):
            for batch in (None, 2):
                yield kind(f"{mode}-K{keep or 'open'}-B{batch or 'open'}", token_mode=mode, keep=keep, batch=batch)


@cache
def _models() -> dict[str, tuple[Metadata, torch.nn.Module]]:
    torch.manual_seed(0)
    preprocess = to_dict(default_preprocess(SIZE))
    encoder = to_dict(_CONFIG)
    four = Preprocess(image_size=SIZE, channels=4, mean=(0.5,) * 4, std=(0.25,) * 4)
    return {
        "encoder": (Metadata(kind="encoder", encoder=encoder, preprocess=preprocess), Encoder(_CONFIG).eval()),
        **{
            name: (Metadata(kind="encoder", encoder=to_dict(config), preprocess=preprocess), Encoder(config).eval())
            for name, config in _FAMILIES.items()
        },
        "bands": (Metadata(kind="encoder", encoder=to_dict(_BANDS), preprocess=to_dict(four)), Encoder(_BANDS).eval()),
        "classifier": (
            Metadata(kind="classifier", encoder=encoder, preprocess=preprocess, num_classes=10, pool="avg"),
            cast("torch.nn.Module", Classifier(_CONFIG, num_classes=10, pool="avg").eval()),
        ),
        "mae": (
            Metadata(
                kind="mae",
                encoder=encoder,
                decoder=to_dict(_DECODER),
                objective=to_dict(ObjectiveConfig()),
                preprocess=preprocess,
            ),
            MaskedAutoencoder(_CONFIG, _DECODER).eval(),
        ),
    }
