"""A frozen encoder whose tokens somebody else learns: only the blocks that are needed are run, without gradients."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

from mae_deploy.errors import ConfigError
from mae_deploy.models.load import Loaded, encoder_tensors, load_strict
from mae_deploy.models.vit import Encoder, run_blocks


def resize_images(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Bicubic resizing of a normalised batch: `(B, C, H, W) -> (B, C, *size)`."""
    if tuple(images.shape[2:]) == size:
        return images
    return F.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False)


class FeatureTeacher:
    """Tokens after one block of a pretrained or fine-tuned encoder, of all patches or of some."""

    def __init__(self, loaded: Loaded, grid_size: tuple[int, int], block: int) -> None:
        self.loaded = loaded
        stored = loaded.encoder_config
        if stored.band_groups is not None:
            raise ConfigError("the teacher has groups of bands, and so several tokens at each place", hint="fine-tune it, and distil its logits")
        # At this size the teacher's grid is the student's, so both are given the same patch indices.
        self.config = dataclasses.replace(stored, image_size=(grid_size[0] * stored.patch, grid_size[1] * stored.patch))
        self.model = Encoder(self.config)
        tensors = encoder_tensors(loaded, self.config)
        for name, tensor in self.model.norm.state_dict().items():
            tensors.setdefault(f"norm.{name}", tensor)  # a mean-pooled classifier has none; no tap lies behind it
        load_strict(self.model, tensors)
        self.model.requires_grad_(False).eval()
        # What lies behind the tap is never run.
        del self.model.blocks[block:]

    def to(self, device: torch.device) -> None:
        """Move the encoder."""
        self.model.to(device)

    @torch.no_grad()
    def __call__(self, images: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """Normalised tokens (LayerNorm without affine), CLS first: `(B, C, H, W), (B, K) -> (B, 1 + K, D)`."""
        tokens = run_blocks(self.model.blocks, self.model.embed(resize_images(images, self.config.image_size), ids_keep))
        return F.layer_norm(tokens.float(), tokens.shape[-1:])
