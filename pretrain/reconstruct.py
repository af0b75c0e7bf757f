"""Pictures of what the autoencoder sees and predicts: original, masked, reconstructed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mae_deploy.config import from_dict
from mae_deploy.errors import CheckFailed, ConfigError
from mae_deploy.files import atomic_path, refuse_to_overwrite, refuse_within
from mae_deploy.images.find import find_images
from mae_deploy.images.names import described
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.images.read import Array, readable
from mae_deploy.models.bands import spread_over_bands
from mae_deploy.models.mae import MaskedAutoencoder
from mae_deploy.models.mask_config import GroupMasking, MaskSampling, check_masking, mask_unit
from mae_deploy.models.masking import masking_of
from mae_deploy.models.vit import patchify, unpatchify
from mae_deploy.pretrain.config import ReconstructConfig, check_picture_bands
from mae_deploy.progress import notice
from mae_deploy.training.device import resolve_device
from mae_deploy.weights.load import load_model

_GAP = 4
_MIN_SIDE = 96
"""Small images are enlarged by a whole factor to at least this many pixels."""


def run_reconstruct(config: ReconstructConfig) -> dict[str, Any]:
    """Draw the grid for given images and a checkpoint.

    Raises:
        CheckFailed: the weights give no numbers.
        ConfigError: the checkpoint has no decoder, no image can be read, or `out` would lie among the images.
    """
    refuse_to_overwrite(config.out, file=True)
    for name in config.images:
        refuse_within(config.out, name)
    model, loaded = load_model(config.checkpoint)
    if not isinstance(model, MaskedAutoencoder):
        raise ConfigError(
            f"{config.checkpoint} is a {loaded.metadata.kind} without a decoder",
            hint="give a pretraining run or a checkpoint with its decoder",
        )
    if model.objective.target == "features":
        raise ConfigError(
            f"{config.checkpoint} predicts a teacher's features, which are not a picture",
            hint="give a run with --target pixels or pca",
        )
    device = resolve_device(config.device)
    check_picture_bands(config.picture_bands, model.config.in_chans)
    unit = mask_unit(config.mask_patch_size, model.config.patch)
    check_masking(config.mask_sampling, config.mask_ratio, model.config.grid_size, unit=unit)
    spec = from_dict(Preprocess, loaded.metadata.preprocess)
    skipped: list[str] = []

    def skip(_: Path, reason: str) -> None:
        skipped.append(reason)
        notice("skipped", reason)

    images = [image for _, image in islice(readable(find_images(*config.images), spec.read, skip), config.num_images)]
    if not images:
        raise ConfigError(f"no readable image in {described(config.images)}")
    loss = draw_reconstructions(
        model.to(device),
        images,
        spec,
        config.out,
        mask_ratio=config.mask_ratio,
        mask_sampling=config.mask_sampling,
        mask_unit=unit,
        group_masking=config.group_masking,
        bands=config.picture_bands,
        seed=config.seed,
        paste_visible=config.paste_visible,
    )
    if not math.isfinite(loss):
        raise CheckFailed(
            f"{config.checkpoint} predicts no numbers, its loss is {loss}", hint="its weights are damaged"
        )
    return {"out": str(config.out), "images": len(images), "skipped": skipped, "loss": loss}


@torch.no_grad()
def draw_reconstructions(
    model: MaskedAutoencoder,
    images: Sequence[Image.Image | Array],
    spec: Preprocess,
    out: Path,
    *,
    mask_ratio: float,
    mask_sampling: MaskSampling = "random",
    mask_unit: int = 1,
    group_masking: GroupMasking = "independent",
    bands: tuple[int, ...] | None = None,
    seed: int,
    paste_visible: bool = True,
) -> float:
    """Write a PNG with a row an image: original | masked | reconstructed. Returns the loss on these masks; where it is
    not finite there is nothing to draw.
    """
    device = model.device
    inputs = torch.from_numpy(spec(list(images))).to(device)
    noise = torch.rand(len(inputs), model.config.num_tokens, generator=torch.Generator().manual_seed(seed)).to(device)
    masking = masking_of(
        mask_sampling, noise, mask_ratio, model.config.grid_size, unit=mask_unit, group_masking=group_masking
    )
    was_training = model.training
    output = model.eval()(inputs, masking)
    model.train(was_training)
    loss = float(output.loss)
    if not math.isfinite(loss):
        return loss
    target = patchify(inputs, model.config.patch)
    predicted = model.predicted_patches(inputs, output.pixels.float())
    groups = model.config.band_groups
    hidden = (
        masking.mask.unsqueeze(-1) if groups is None else spread_over_bands(masking.mask, groups, model.config.patch)
    ).bool()
    grey = torch.zeros_like(target)
    columns = [
        target,
        torch.where(hidden, grey, target),
        torch.where(hidden, predicted, target) if paste_visible else predicted,
    ]
    rows = torch.stack([unpatchify(column, model.config.patch, model.config.grid_size) for column in columns], dim=1)
    with atomic_path(out) as aside:
        _grid(_to_pixels(rows, spec, bands)).save(aside, format="PNG")
    return loss


def _to_pixels(images: Tensor, spec: Preprocess, bands: tuple[int, ...] | None) -> Array:
    """Normalised `(B, 3, C, H, W)` to uint8 `(B, 3, H, W, C)`.

    Of other images than ordinary ones, the chosen bands, each stretched from the 2nd to the 98th percentile of the
    originals.
    """
    values = images.permute(0, 1, 3, 4, 2).cpu().numpy() * np.asarray(spec.std) + np.asarray(spec.mean)
    if spec.takes_arrays or bands is not None:
        values = values[..., list(bands or range(3 if spec.channels >= 3 else 1))]
        low, high = np.percentile(values[:, 0], (2, 98), axis=(0, 1, 2))
        values = (values - low) / np.where(high > low, high - low, 1)
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
