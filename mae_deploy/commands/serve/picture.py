"""Pictures of what a network sees, and of what an autoencoder makes of the patches that it sees."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from mae_deploy.errors import ConfigError
from mae_deploy.images.arrays import Array
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.runtime.bundle import Bundle

_VARIANCE = 1e-6
"""What the original adds to a patch's variance before it divides by its root."""


def input_png(pixels: Array, spec: Preprocess) -> bytes:
    """What `preprocess.crop` made of an image, `(H, W, C)`."""
    return _png(pixels / np.float32(spec.divisor), spec)


def reconstruction_png(bundle: Bundle, pixels: Array, keep: Array, predicted: Array) -> bytes:
    """The kept patches as they are, the others as they were predicted.

    Args:
        pixels: what `preprocess.crop` made of the image, `(H, W, C)`.
        keep: the patches that were seen, `(K,)`.
        predicted: the output `pixels`, `(N, P * P * C)`.

    Raises:
        ConfigError: a bundle whose patches are groups of bands.
    """
    spec, P = bundle.preprocess, bundle.model["patch_size"]
    if "band_groups" in bundle.model:
        raise ConfigError("patches of groups of bands are no picture", hint="ask for the output 'pixels' of embed")
    shown = pixels / np.float32(spec.divisor)
    patches = _patches(shown, P)
    found = _as_image(bundle, patches, predicted.astype(np.float32))
    found[keep] = patches[keep]
    H, W, C = shown.shape
    rows = found.reshape(H // P, W // P, P, P, C).swapaxes(1, 2)
    return _png(rows.reshape(H, W, C), spec)


def _as_image(bundle: Bundle, patches: Array, predicted: Array) -> Array:
    """The output in the space of `patches (N, P * P * C)`, 0 to 1; which one it has stands in the provenance."""
    spec = bundle.preprocess
    space = _recorded(bundle, "export", "pixels") or "target"
    if space == "image":
        return predicted
    repeats = patches.shape[1] // spec.channels
    mean, std = (np.tile(np.asarray(values, np.float32), repeats) for values in (spec.mean, spec.std))
    if space == "target" and _recorded(bundle, "checkpoint", "config", "norm_pix_loss"):
        own = (patches - mean) / std
        variance = own.var(axis=1, ddof=1, keepdims=True)
        predicted = predicted * np.sqrt(variance + _VARIANCE) + own.mean(axis=1, keepdims=True)
    shown: Array = predicted * std + mean
    return shown


def _recorded(bundle: Bundle, *keys: str) -> Any:
    """What the provenance says; None: nothing."""
    value: Any = bundle.manifest["provenance"]
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _patches(image: Array, P: int) -> Array:
    """`(H, W, C)` to `(N, P * P * C)`, as the original's patchify has it."""
    H, W, C = image.shape
    patches: Array = image.reshape(H // P, P, W // P, P, C).swapaxes(1, 2).reshape(-1, P * P * C)
    return patches


def _png(image: Array, spec: Preprocess) -> bytes:
    """`(H, W, C)` in 0 to 1; of more than four channels or of 16 bits, the first three, each from its least to its
    most.
    """
    from PIL import Image

    if spec.takes_arrays:
        image = image[..., : 3 if image.shape[2] >= 3 else 1]
        low, high = image.min(axis=(0, 1)), image.max(axis=(0, 1))
        image = (image - low) / np.where(high > low, high - low, 1)
    pixels = (image.clip(0, 1) * 255 + 0.5).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()
