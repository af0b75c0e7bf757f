"""Hugging Face's preprocessor_config.json as our preprocessing; what it does and ours cannot is refused by name."""

from __future__ import annotations

import math
import re
from typing import Any, NoReturn

from mae_deploy.errors import ConfigError
from mae_deploy.images.geometry import CropMode, Interpolation
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.weights.read.files import check_values, is_number

FILE = "preprocessor_config.json"

FILTERS: tuple[Interpolation, ...] = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
"""By Pillow's numbers."""

_SQUASH: dict[str, Any] = {"size": {"height": 224, "width": 224}, "resample": 2}
_COVER: dict[str, Any] = {"size": {"shortest_edge": 224}, "crop_size": 224, "do_center_crop": True, "resample": 3}

_PROCESSORS: dict[str, dict[str, Any]] = {
    "ViT": _SQUASH,
    "Beit": {**_SQUASH, "crop_size": 224, "resample": 3},
    "DeiT": {"size": {"height": 256, "width": 256}, "crop_size": 224, "do_center_crop": True, "resample": 3},
    "Siglip": {**_SQUASH, "resample": 3},
    "DINOv3ViT": {**_SQUASH, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]},
    "Bit": _COVER,
    "CLIP": _COVER,
    "ViTHybrid": _COVER,
    "ConvNext": {"size": {"shortest_edge": 384}, "resample": 3, "crop_pct": 224 / 256},
}
"""Image processors of transformers, without the end of their names, and what each does where the file is silent."""

_CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
"""Mean and deviation of the processors that cover; the others have 0.5."""

_KNOWN = {
    "do_resize",
    "do_center_crop",
    "do_rescale",
    "do_normalize",
    "do_convert_rgb",
    "do_reduce_labels",  # of segmentation maps
}

_HINT = "say how its images are prepared: --crop-mode, --crop-pct, --interpolation, --mean and --std, all five"


def read_image_processor(config: dict[str, Any], image_size: tuple[int, int], channels: int) -> Preprocess:
    """What the image processor does before the model.

    Args:
        config: the file's content.
        image_size: the model's height and width.

    Raises:
        ConfigError: it does what ours cannot.
    """
    kind = str(config.get("image_processor_type") or config.get("feature_extractor_type") or "ViT")
    name = re.sub(r"(ImageProcessor(Fast|Pil)?|FeatureExtractor)$", "", kind)
    if name not in _PROCESSORS:
        raise ConfigError(f"{FILE} is of a {kind}; those of {', '.join(_PROCESSORS)} are read", hint=_HINT)
    scaled = ("rescale_factor",) if config.get("do_rescale", True) else ()
    flags = [key for key in config if key.startswith("do_")]
    check_values(config, {"true or false": flags, "positive number": scaled}, FILE)
    known = _PROCESSORS[name]
    config = {**known, **(_CLIP if known is _COVER else {}), **config}
    for key, value in config.items():
        if value and ((key.startswith("do_") and key not in _KNOWN) or key in ("rescale_offset", "offset")):
            _refuse(f"has {key}")
    resample = config["resample"]
    if type(resample) is not int or resample not in range(len(FILTERS)):
        _refuse(f"resizes with filter {resample}, which Pillow does not have")
    # (x * rescale_factor - mean) / std, where ours is (x / 255 - mean) / std.
    scale = 255 * config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 255
    normalised = config.get("do_normalize", True)
    mean, std = (
        config.get(f"image_{name}", 0.5) if normalised else plain for name, plain in (("mean", 0.0), ("std", 1.0))
    )
    crop_mode, crop_pct = _convnext(config) if name == "ConvNext" else _crop(config, known)
    return Preprocess(
        image_size=image_size,
        channels=channels,
        crop_mode=crop_mode,
        crop_pct=crop_pct,
        interpolation=FILTERS[resample],
        mean=tuple(value / scale for value in _per_channel(mean, channels)),
        std=tuple(value / scale for value in _per_channel(std, channels)),
    )


def pair(size: Any) -> tuple[int, int]:
    """Height and width of a number, a pair, or a `{"height": …, "width": …}`.

    Raises:
        ConfigError: it is none of these.
    """
    sides = [size, size]
    if isinstance(size, dict) and {"height", "width"} <= set(size):
        sides = [size["height"], size["width"]]
    elif isinstance(size, list) and len(size) == 2:
        sides = size
    if not all(type(side) is int and 1 <= side <= 1_000_000 for side in sides):
        raise ConfigError(f"{size!s:.80} is not a height and width")
    return sides[0], sides[1]


def _crop(config: dict[str, Any], known: dict[str, Any]) -> tuple[CropMode, float]:
    """How images are fitted, and the crop's side as a share of the resized image's."""
    size, cropped = config["size"], bool(config.get("do_center_crop"))
    if not config.get("do_resize", True):
        if cropped:
            _refuse("crops without resizing")
        return "center", 1.0  # images have the model's size
    if isinstance(size, int) and not config.get("default_to_square", "height" in known["size"]):
        size = {"shortest_edge": size}
    edges = size if isinstance(size, dict) else {}
    in_proportion = "shortest_edge" in edges
    if in_proportion and "longest_edge" in edges:
        _refuse("limits the longer side")
    if isinstance(size, dict) and not (in_proportion or {"height", "width"} <= set(edges)):
        _refuse(f"resizes to {size}")
    resized = pair(edges["shortest_edge"] if in_proportion else size)
    # Without a crop, a model of one size takes images in proportion only where they have its form.
    share = _share(pair(config.get("crop_size", 224)), resized) if cropped else 1.0
    return "center" if in_proportion else "squash", share


def _share(crop: tuple[int, int], resized: tuple[int, int]) -> float:
    """The crop as a share of the resized image, the same of both sides."""
    if crop[0] > resized[0] or crop[1] > resized[1]:
        _refuse(f"crops {crop[0]}x{crop[1]} pixels out of {resized[0]}x{resized[1]}")
    share = crop[0] / resized[0]
    # Rounding must not take the resized side to one pixel less.
    share = share if int(crop[0] / share) == resized[0] else math.nextafter(share, 0)
    if int(crop[1] / share) != resized[1]:
        _refuse(f"crops {crop[0]}x{crop[1]} pixels out of {resized[0]}x{resized[1]}, another share of each side")
    return share


def _convnext(config: dict[str, Any]) -> tuple[CropMode, float]:
    """Below 384 pixels the middle of a larger image, else the whole squashed."""
    size = config["size"]
    check_values(config, {"positive number": ["crop_pct"]}, FILE)
    side, _ = pair(size.get("shortest_edge") if isinstance(size, dict) else size)
    return ("center", float(config["crop_pct"])) if side < 384 else ("squash", 1.0)


def _refuse(why: str) -> NoReturn:
    raise ConfigError(f"{FILE} {why}, which ours does not", hint=_HINT)


def _per_channel(value: Any, channels: int) -> list[float]:
    values = value if isinstance(value, list) else [value]
    if not all(map(is_number, values)):
        _refuse(f"has {value!s:.80} for a mean or a deviation")
    return values * channels if len(values) == 1 else values
