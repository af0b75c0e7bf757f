"""The frozen teacher of logits, and which of a teacher's blocks a student follows."""

from __future__ import annotations

import torch
from torch import Tensor

from mae_deploy.errors import ConfigError
from mae_deploy.models.load import Loaded, load_strict
from mae_deploy.models.teacher import resize_images
from mae_deploy.models.vit import Classifier


class LogitsTeacher:
    """Logits of a fine-tuned classifier at its own image size."""

    def __init__(self, loaded: Loaded) -> None:
        if loaded.metadata.kind != "classifier":
            raise ConfigError(f"logits need a fine-tuned teacher, this one is a {loaded.metadata.kind}", hint="finetune it first, or use --objective features")
        metadata = loaded.metadata
        self.loaded = loaded
        self.config = loaded.encoder_config
        self.model = Classifier(self.config, num_classes=metadata.num_classes or 0, pool="cls" if metadata.pool == "cls" else "avg")
        load_strict(self.model, loaded.tensors)
        self.model.requires_grad_(False).eval()

    def to(self, device: torch.device) -> None:
        """Move the classifier."""
        self.model.to(device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """`(B, C, H, W) -> (B, classes)`."""
        return self.model(resize_images(images, self.config.image_size)).float()  # type: ignore[no-any-return]


def resolve_block(block: int | None, depth: int, flag: str) -> int:
    """The block to tap, counted from 1; three quarters up by default (DMAE, section 3)."""
    if block is None:
        return max(1, round(0.75 * depth))
    if not 1 <= block <= depth:
        raise ConfigError(f"{flag} {block} must be within 1 and {depth}")
    return block
