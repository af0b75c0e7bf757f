"""Training augmentation on Pillow images (torchvision, timm), evaluation by the deployed preprocessing; all give uint8."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor, nn
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from mae_deploy.data.config import CropConfig
from mae_deploy.errors import ConfigError
from mae_deploy.preprocess import Preprocess

Transform = Callable[[Image.Image], Tensor]
"""A Pillow image in the right mode to uint8 `(C, H, W)`; can be pickled, as worker processes that are not forked need it."""

_GEOMETRIC = ("Rotate", "Shear", "Translate")
"""First words of the names of RandAugment's operations that move pixels; the others change colours."""


def train_transform(spec: Preprocess, crop: CropConfig, *, auto_augment: str | None = None) -> Transform:
    """Random resized crop (bicubic) or shift, flip, and RandAugment in timm's notation, such as `rand-m9-mstd0.5-inc1`.

    Raises:
        ConfigError: `auto_augment` is not in that notation.
    """
    steps: list[Callable[[Image.Image], Image.Image]] = []
    if crop.translate > 0:
        shift = transforms.RandomAffine(0, translate=(crop.translate, crop.translate), interpolation=InterpolationMode.BILINEAR)
        steps += [transforms.Resize(spec.image_size, InterpolationMode.BICUBIC), shift]
    else:
        steps.append(transforms.RandomResizedCrop(spec.image_size, (crop.min_scale, crop.max_scale), interpolation=InterpolationMode.BICUBIC))
    if crop.hflip > 0:
        steps.append(transforms.RandomHorizontalFlip(crop.hflip))
    if auto_augment is not None:
        steps.append(_rand_augment(auto_augment, spec))
    return partial(_train, steps)


def eval_transform(spec: Preprocess) -> Transform:
    """Resize and centre crop exactly as the exported bundle does."""
    return partial(_evaluate, spec)


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


def _train(steps: Sequence[Callable[[Image.Image], Image.Image]], image: Image.Image) -> Tensor:
    for step in steps:
        image = step(image)
    pixels = np.array(image)
    return torch.from_numpy(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1).copy())


def _evaluate(spec: Preprocess, image: Image.Image) -> Tensor:
    return torch.from_numpy(spec.crop(image).transpose(2, 0, 1).copy())


def _rand_augment(notation: str, spec: Preprocess) -> Callable[[Image.Image], Image.Image]:
    fill = tuple(round(255 * value) for value in spec.mean)
    options = {"translate_const": int(min(spec.image_size) * 0.45), "img_mean": fill, "interpolation": Image.Resampling.BICUBIC}
    try:
        augment = rand_augment_transform(notation, options)
    except (AssertionError, ValueError, KeyError) as error:
        raise ConfigError(f"--auto-augment {notation} is no RandAugment in timm's notation", hint="such as rand-m9-mstd0.5-inc1, or none") from error
    for operation in augment.ops:
        if operation.name.startswith("Posterize"):
            operation.aug_fn = _posterize
        if not operation.name.startswith(_GEOMETRIC):
            operation.aug_fn = partial(_beside_alpha, operation.aug_fn)
    return augment  # type: ignore[no-any-return]


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    # timm's strongest level keeps 0 bits, at which Pillow 13 raises.
    return ImageOps.posterize(image, max(1, bits))


def _beside_alpha(change: Callable[..., Image.Image], image: Image.Image, *arguments: Any, **options: Any) -> Image.Image:
    """Change colours, which Pillow does to grey and RGB only, and leave a fourth channel as it is."""
    if image.mode != "RGBA":
        return change(image, *arguments, **options)
    changed = change(image.convert("RGB"), *arguments, **options)
    changed.putalpha(image.getchannel("A"))
    return changed
