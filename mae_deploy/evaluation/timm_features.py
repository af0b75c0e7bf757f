"""Features of any timm model from a weights file: also of those whose arithmetic our own encoder does not have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mae_deploy.errors import ConfigError
from mae_deploy.evaluation.config import FeaturesConfig
from mae_deploy.evaluation.features import ModuleFeatures
from mae_deploy.training.config import Device
from mae_deploy.weights.timm_network import build_timm, load_timm, read_timm, timm_licence, timm_preprocess


class TimmFeatures(ModuleFeatures):
    """`timm.create_model(architecture)` with the weights of a file, under timm's own preprocessing; nothing is
    downloaded.

    The feature is the CLS token after the last norm, or with `avg` the mean of the patch tokens; for networks without
    tokens, what their head reads.
    """

    def __init__(self, path: Path, architecture: str, config: FeaturesConfig, device: Device) -> None:
        model = build_timm(architecture, image_size=config.image_size)
        load_timm(model, read_timm(path, architecture), architecture)
        spec, licence = timm_preprocess(model), timm_licence(model, architecture)
        pool, pooled = _pooling(model, config.pool)
        description = f"timm {architecture} at {spec.image_size[0]}x{spec.image_size[1]}, {pool}"
        super().__init__(model, pooled, spec, description, licence, config.precision, device)


def _pooling(model: Any, asked: str) -> tuple[str, Callable[[Tensor], Tensor]]:
    """What the feature is called, and how it is had."""
    prefix = getattr(model, "num_prefix_tokens", None)
    by_tokens = prefix is not None and hasattr(model, "blocks")
    # Without a norm after the blocks, what the head reads is the only feature that the network was trained to give.
    headed = isinstance(getattr(model, "norm", None), nn.Identity)
    offered = ("head",) if not by_tokens else ("avg",) if headed or not prefix else ("cls", "avg")
    pool = offered[0] if asked == "auto" else asked
    if pool not in offered:
        raise ConfigError(
            f"--pool {asked}, but {type(model).__name__} offers {' and '.join(offered)}", hint="leave --pool out"
        )
    if offered == ("head",) or headed:
        return "what its head reads" if pool == "head" else pool, lambda images: model.forward_head(
            model.forward_features(images), pre_logits=True
        )

    def pooled(images: Tensor) -> Tensor:
        tokens: Tensor = model.forward_features(images)
        return tokens[:, 0] if pool == "cls" else tokens[:, prefix:].mean(dim=1)

    return pool, pooled
