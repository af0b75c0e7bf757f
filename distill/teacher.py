"""The frozen teacher: only the blocks that the loss needs are run, without gradients."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

from mae_deploy.errors import ConfigError
from mae_deploy.models.load import Loaded, encoder_tensors, load_strict
from mae_deploy.models.vit import Classifier, Encoder, run_blocks


def resize_images(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Bicubic resizing of a normalised batch: `(B, C, H, W) -> (B, C, *size)`."""
    if tuple(images.shape[2:]) == size:
        return images
    return F.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False)


class FeatureTeacher:
    """Tokens after one block of a pretrained or fine-tuned encoder, on the visible patches."""

    def __init__(self, loaded: Loaded, grid_size: tuple[int, int], block: int | None) -> None:
        self.loaded = loaded
        stored = loaded.encoder_config
        # At this size the teacher's grid is the student's, so both are given the same patch indices.
        self.config = dataclasses.replace(stored, image_size=(grid_size[0] * stored.patch, grid_size[1] * stored.patch))
        self.block = resolve_block(block, stored.blocks, "--teacher-block")
        self.model = Encoder(self.config)
        tensors = encoder_tensors(loaded, self.config)
        for name, tensor in self.model.norm.state_dict().items():
            tensors.setdefault(f"norm.{name}", tensor)  # a mean-pooled classifier has none; no tap lies behind it
        load_strict(self.model, tensors)
        self.model.requires_grad_(False).eval()
        # What lies behind the tap is never run.
        del self.model.blocks[self.block :]

    def to(self, device: torch.device) -> None:
        """Move the encoder."""
        self.model.to(device)

    @torch.no_grad()
    def __call__(self, images: Tensor, ids_keep: Tensor) -> Tensor:
        """Normalised tokens (LayerNorm without affine), CLS first: `(B, C, H, W), (B, K) -> (B, 1 + K, D)`."""
        tokens = run_blocks(self.model.blocks, self.model.embed(resize_images(images, self.config.image_size), ids_keep))
        return F.layer_norm(tokens.float(), tokens.shape[-1:])


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
