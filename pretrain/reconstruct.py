"""Pictures of what the autoencoder sees and predicts: original, masked, reconstructed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mae_deploy.config import from_dict
from mae_deploy.errors import ConfigError
from mae_deploy.files import atomic_path
from mae_deploy.models.load import load_model
from mae_deploy.models.mae import MaskedAutoencoder
from mae_deploy.models.masking import random_masking
from mae_deploy.models.vit import patchify, unpatchify
from mae_deploy.preprocess import Array, Preprocess, UnreadableImage, find_images, read_image
from mae_deploy.pretrain.config import ReconstructConfig
from mae_deploy.progress import notice

_GAP = 4
_MIN_SIDE = 96
"""Small images are enlarged by a whole factor to at least this many pixels."""


def run(config: ReconstructConfig) -> dict[str, Any]:
    """Draw the grid for given images and a checkpoint.

    Raises:
        ConfigError: the checkpoint has no decoder, or no image can be read.
    """
    model, loaded = load_model(config.checkpoint)
    if not isinstance(model, MaskedAutoencoder):
        raise ConfigError(f"{config.checkpoint} is a {loaded.metadata.kind} without a decoder", hint="give a pretraining run or a checkpoint with its decoder")
    if int(model.config.num_patches * (1 - config.mask_ratio)) in (0, model.config.num_patches):
        raise ConfigError(f"--mask-ratio {config.mask_ratio} of {model.config.num_patches} patches leaves nothing to see or nothing to predict")
    spec = from_dict(Preprocess, loaded.metadata.preprocess)
    images: list[Image.Image] = []
    skipped = []
    for path in find_images(config.images):
        if len(images) == config.num_images:
            break
        try:
            images.append(read_image(path, spec.channels))
        except UnreadableImage as error:
            skipped.append(str(error))
            notice("skipped", str(error))
    if not images:
        raise ConfigError(f"no readable image at {config.images}")
    device = "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"
    loss = draw_reconstructions(model.to(device), images, spec, config.out, mask_ratio=config.mask_ratio, seed=config.seed, paste_visible=config.paste_visible)
    return {"out": str(config.out), "images": len(images), "skipped": skipped, "loss": loss}


@torch.no_grad()
def draw_reconstructions(
    model: MaskedAutoencoder, images: Sequence[Image.Image], spec: Preprocess, out: Path, *, mask_ratio: float, seed: int, paste_visible: bool = True
) -> float:
    """Write a PNG with a row an image: original | masked | reconstructed. Returns the loss on these masks."""
    device = model.cls_token.device
    inputs = torch.from_numpy(spec(list(images))).to(device)
    noise = torch.rand(len(inputs), model.config.num_patches, generator=torch.Generator().manual_seed(seed)).to(device)
    masking = random_masking(noise, mask_ratio)
    was_training = model.training
    output = model.eval()(inputs, masking)
    model.train(was_training)
    target = patchify(inputs, model.config.patch)
    predicted = output.pixels.float()
    if model.norm_pix_loss:
        # The prediction is in units of each patch's own mean and deviation: only the true patch can undo that.
        variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
        predicted = predicted * (variance + 1e-6).sqrt() + mean
    hidden = masking.mask.unsqueeze(-1).bool()
    grey = torch.zeros_like(target)
    columns = [target, torch.where(hidden, grey, target), torch.where(hidden, predicted, target) if paste_visible else predicted]
    rows = torch.stack([unpatchify(column, model.config.patch, model.config.grid_size) for column in columns], dim=1)
    with atomic_path(out) as aside:
        _grid(_to_pixels(rows, spec)).save(aside, format="PNG")
    return float(output.loss)


def _to_pixels(images: Tensor, spec: Preprocess) -> Array:
    """Normalised `(B, 3, C, H, W)` to uint8 `(B, 3, H, W, C)`."""
    values = images.permute(0, 1, 3, 4, 2).cpu().numpy() * np.asarray(spec.std) + np.asarray(spec.mean)
    pixels: Array = (values.clip(0, 1) * 255 + 0.5).astype(np.uint8)
    return pixels


def _grid(pixels: Array) -> Image.Image:
    """`(rows, columns, H, W, C)` as one picture with gaps."""
    rows, columns, H, W, C = pixels.shape
    factor = max(1, -(-_MIN_SIDE // min(H, W)))
    pixels = pixels.repeat(factor, axis=2).repeat(factor, axis=3)
    H, W = H * factor, W * factor
    canvas = np.full((rows * (H + _GAP) - _GAP, columns * (W + _GAP) - _GAP, C), 255, np.uint8)
    for row in range(rows):
        for column in range(columns):
            canvas[row * (H + _GAP) :, column * (W + _GAP) :][:H, :W] = pixels[row, column]
    return Image.fromarray(canvas[:, :, 0] if C == 1 else canvas)
