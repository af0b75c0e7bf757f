"""Training augmentation on Pillow images and arrays (torchvision, timm), evaluation by the deployed preprocessing; all
give uint8, or float32 for more bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor, nn
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F
from torchvision.transforms.v2.functional import resize

from mae_deploy.data.config import CropConfig
from mae_deploy.errors import ConfigError
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.images.read import Array, is_image

Step = Callable[[Any], Any]
"""A Pillow image to a Pillow image, or a tensor `(C, H, W)` to such a tensor."""

_GEOMETRIC = ("Rotate", "Shear", "Translate")
"""First words of the names of RandAugment's operations that move pixels; the others change colours."""

_FIXED_CROP = 0.875
"""The fixed crop's side as a share of the resized image's: 224 of 256, 32 of 36."""

_PADDING = 8
"""Images that have the crop's size already are padded by this fraction of it on each side: 4 pixels of 32."""

_SQUAREST = 3 / 4
"""Ratio of the sides at which a random resized crop of an area has its shortest side."""


@dataclass(frozen=True, slots=True)
class Transform:
    """An image as a source reads it to `(C, H, W)`; can be pickled, as worker processes that are not forked need it."""

    spec: Preprocess
    steps: tuple[Step, ...] = ()
    """Random changes, the last of which leave the image at its size; none: the deployed resize and centre crop."""
    shrink: Callable[[int, int], int] | None = None
    """By what factor a JPEG of this width and height may be made smaller while it is decoded: no crop is enlarged for
    it."""

    def __call__(self, image: Image.Image | Array) -> Tensor:
        """uint8, or float32 where the specification has `pixel_max`."""
        if not self.steps:
            return torch.from_numpy(self.spec.crop(image).transpose(2, 0, 1).copy())
        changed: Any = (
            image if is_image(image) else torch.from_numpy(image.astype(self.spec.dtype, copy=False)).permute(2, 0, 1)
        )
        for step in self.steps:
            changed = step(changed)
        return _to_tensor(changed).contiguous()


def train_transform(spec: Preprocess, crop: CropConfig, *, auto_augment: str | None = None) -> Transform:
    """The crop (paper, table 1e) or shift, flip, colour jitter, and RandAugment in timm's notation, such as
    `rand-m9-mstd0.5-inc1`.

    Raises:
        ConfigError: `auto_augment` is not in that notation, or colours are to change in images of other channels than
            Pillow's.
    """
    if spec.takes_arrays and (auto_augment is not None or crop.color_jitter > 0):
        option = "--auto-augment none" if auto_augment is not None else "--color-jitter 0"
        raise ConfigError(
            f"colours of {spec.channels} channels{' with --pixel-max' if spec.pixel_max else ''} cannot be augmented",
            hint=f"use {option}",
        )
    colours: list[Step] = [_jitter(crop.color_jitter)] if crop.color_jitter > 0 else []
    if auto_augment is not None:
        colours.append(_rand_augment(auto_augment, spec))
    if crop.translate > 0:
        shift = transforms.RandomAffine(
            0, translate=(crop.translate, crop.translate), interpolation=InterpolationMode.BILINEAR
        )
        place: list[Step] = [
            partial(resize, size=list(spec.image_size), interpolation=InterpolationMode.BICUBIC),
            shift,
        ]
        shrink = partial(_shrink, max(spec.image_size), 0.0)
    elif crop.crop == "random":
        place = [partial(_random_resized_crop, spec.image_size, (crop.min_scale, crop.max_scale))]
        shrink = partial(_shrink, max(spec.image_size), max(spec.image_size) / math.sqrt(_SQUAREST * crop.min_scale))
    elif crop.crop == "fixed":
        place, shrink = (
            [partial(_fixed_crop, spec.image_size)],
            partial(_shrink, max(spec.image_size) / _FIXED_CROP, 0.0),
        )
    else:
        place, shrink = [partial(_centre_crop, spec)], partial(_shrink, max(spec.image_size) / spec.crop_pct, 0.0)
    flips = crop.hflip > 0 and (crop.crop != "none" or crop.translate > 0)
    flip: list[Step] = [transforms.RandomHorizontalFlip(crop.hflip)] if flips else []
    return Transform(spec, (*place, *flip, *([_to_pillow, *colours] if colours else [])), shrink)


def eval_transform(spec: Preprocess) -> Transform:
    """Resize and centre crop exactly as the exported bundle does."""
    return Transform(spec)


class NormaliseImages(nn.Module):
    """uint8 or float32 `(B, C, H, W)` on any device to float32, `(x / 255 - mean) / std`, with `pixel_max` for 255
    where it is given.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, spec: Preprocess) -> None:
        super().__init__()
        self.divisor = spec.divisor
        self.register_buffer("mean", torch.tensor(spec.mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """`(B, C, H, W)` to float32."""
        return (images.float() / self.divisor - self.mean) / self.std


def _random_resized_crop(image_size: tuple[int, int], scale: tuple[float, float], image: Any) -> Any:
    """torchvision's, with the resizing in PyTorch, which takes a third of Pillow's time for the same filter."""
    top, left, height, width = transforms.RandomResizedCrop.get_params(image, list(scale), [_SQUAREST, 1 / _SQUAREST])
    image = F.crop(image, top, left, height, width)
    weighs_alpha = getattr(image, "mode", None) == "RGBA"  # Pillow does, PyTorch does not
    # Of torchvision's two functions only the newer resizes in uint8; the other, by way of float32, is slower than
    # Pillow.
    return resize(image if weighs_alpha else _to_tensor(image), list(image_size), InterpolationMode.BICUBIC)


def _to_tensor(image: Any) -> Tensor:
    """`(H, W, C)` in memory, as `(C, H, W)`."""
    if isinstance(image, Tensor):
        return image
    pixels = np.array(image)
    return torch.from_numpy(pixels[:, :, None] if pixels.ndim == 2 else pixels).permute(2, 0, 1)


def _to_pillow(image: Any) -> Any:
    if not isinstance(image, Tensor):
        return image
    pixels = image.permute(1, 2, 0).numpy()
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else np.ascontiguousarray(pixels))


def _fixed_crop(image_size: tuple[int, int], image: Any) -> Any:
    """A crop of `image_size` at a random place of the image, which is first resized to cover 8/7 of it, or padded where
    it has that size already.
    """
    height, width = image_size
    _, *found = F.get_dimensions(image)
    if tuple(found) == image_size:
        image = F.pad(image, [width // _PADDING, height // _PADDING])
    else:
        factor = max(height / found[0], width / found[1]) / _FIXED_CROP
        size = [max(round(side * factor), least) for side, least in zip(found, image_size, strict=True)]
        image = resize(image, size, InterpolationMode.BICUBIC)
    return F.crop(image, *transforms.RandomCrop.get_params(image, image_size))


def _centre_crop(spec: Preprocess, image: Any) -> Any:
    """The deployed resize and centre crop."""
    if isinstance(image, Tensor):
        return torch.from_numpy(spec.crop(image.permute(1, 2, 0).numpy()).transpose(2, 0, 1).copy())
    pixels = spec.crop(image)
    return Image.fromarray(pixels[:, :, 0] if spec.channels == 1 else pixels)


def _shrink(side: float, mean_side: float, width: int, height: int) -> int:
    """The largest factor, of those that JPEG offers, that leaves both sides, and the root of the area, at least as long
    as these.
    """
    for factor in (8, 4, 2):
        if min(width, height) >= factor * side and math.sqrt(width * height) >= factor * mean_side:
            return factor
    return 1


def _jitter(strength: float) -> Step:
    return partial(_beside_alpha, transforms.ColorJitter(strength, strength, strength))


def _rand_augment(notation: str, spec: Preprocess) -> Callable[[Image.Image], Image.Image]:
    fill = tuple(round(255 * value) for value in spec.mean)
    options = {
        "translate_const": int(min(spec.image_size) * 0.45),
        "img_mean": fill,
        "interpolation": Image.Resampling.BICUBIC,
    }
    try:
        augment = rand_augment_transform(notation, options)
    except (AssertionError, ValueError, KeyError) as error:
        raise ConfigError(
            f"--auto-augment {notation} is not RandAugment in timm's notation",
            hint="such as rand-m9-mstd0.5-inc1, or none",
        ) from error
    for operation in augment.ops:
        if operation.name.startswith("Posterize"):
            operation.aug_fn = _posterize
        if not operation.name.startswith(_GEOMETRIC):
            operation.aug_fn = partial(_beside_alpha, operation.aug_fn)
    return augment  # type: ignore[no-any-return]


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    # timm's strongest level keeps 0 bits, at which Pillow 13 raises.
    return ImageOps.posterize(image, max(1, bits))


def _beside_alpha(
    change: Callable[..., Image.Image], image: Image.Image, *arguments: Any, **options: Any
) -> Image.Image:
    """Change colours, which Pillow does to grey and RGB only, and leave a fourth channel as it is."""
    if image.mode != "RGBA":
        return change(image, *arguments, **options)
    changed = change(image.convert("RGB"), *arguments, **options)
    changed.putalpha(image.getchannel("A"))
    return changed
