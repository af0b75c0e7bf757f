"""Training augmentation on Pillow images (torchvision, timm), evaluation by the deployed preprocessing; all give uint8."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor, nn
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from mae_deploy.data.config import CropConfig
from mae_deploy.preprocess import Preprocess

Transform = Callable[[Image.Image], Tensor]
"""A Pillow image in the right mode to uint8 `(C, H, W)`."""


def train_transform(spec: Preprocess, crop: CropConfig, *, auto_augment: str | None = None) -> Transform:
    """Random resized crop (bicubic) or shift, flip, and RandAugment in timm's notation, such as `rand-m9-mstd0.5-inc1`."""
    steps: list[Callable[[Image.Image], Image.Image]] = []
    fill = tuple(round(255 * value) for value in spec.mean)
    if crop.translate > 0:
        shift = transforms.RandomAffine(0, translate=(crop.translate, crop.translate), interpolation=InterpolationMode.BILINEAR)
        steps += [transforms.Resize(spec.image_size, InterpolationMode.BICUBIC), shift]
    else:
        steps.append(transforms.RandomResizedCrop(spec.image_size, (crop.min_scale, crop.max_scale), interpolation=InterpolationMode.BICUBIC))
    if crop.hflip > 0:
        steps.append(transforms.RandomHorizontalFlip(crop.hflip))
    if auto_augment is not None:
        options = {"translate_const": int(min(spec.image_size) * 0.45), "img_mean": fill, "interpolation": Image.Resampling.BICUBIC}
        steps.append(rand_augment_transform(auto_augment, options))

    def apply(image: Image.Image) -> Tensor:
        for step in steps:
            image = step(image)
        return _to_tensor(image)

    return apply


def eval_transform(spec: Preprocess) -> Transform:
    """Resize and centre crop exactly as the exported bundle does."""
    return lambda image: torch.from_numpy(spec.crop(image).transpose(2, 0, 1).copy())


class Normalise(nn.Module):
    """uint8 `(B, C, H, W)` on any device to float32, `(x / 255 - mean) / std`."""

    mean: Tensor
    std: Tensor

    def __init__(self, spec: Preprocess) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(spec.mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """`(B, C, H, W)` uint8 to float32."""
        return (images.float() / 255 - self.mean) / self.std


def _to_tensor(image: Image.Image) -> Tensor:
    pixels = np.array(image)
    return torch.from_numpy(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1).copy())
