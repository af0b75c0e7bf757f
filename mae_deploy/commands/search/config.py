"""Settings of `mae-deploy search`. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mae_deploy.config import Settings, setting
from mae_deploy.errors import ConfigError, MaeDeployError
from mae_deploy.training.config import Device


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchConfig(Settings, resume="never"):
    """Settings of `mae-deploy search`."""

    features: Path = setting(argument=True)
    """Folder that embed has written."""
    image: Path | None = setting(None, basic=True)
    """Image file whose neighbours are wanted."""
    duplicates: bool = setting(False, basic=True)
    """List images that are nearly the same as an earlier one."""
    outliers: bool = setting(False, basic=True)
    """List the images that are least like their nearest others."""
    out: Path | None = setting(None, basic=True)
    """Folder to write to: a table (.csv), a picture (.png) and a page (.html) of each."""
    k: int = setting(10, at_least=1, basic=True)
    """Neighbours to list, and by which outliers are told."""
    threshold: float = setting(0.9, above=0, at_most=1, basic=True)
    """Cosine of whitened features from which an image is a duplicate."""
    count: int = setting(100, at_least=1, basic=True)
    """Outliers to list."""
    method: Literal["auto", "exact", "approximate"] = setting("auto", basic=True)
    """exact: all products; approximate: an index, which is kept beside the features and whose recall is printed; auto:
    exact up to 100,000 images."""
    output: str | None = setting(None, metavar="NAME", basic=True)
    """Output to compare by; default: pooled, else cls, else the first vector."""
    data: str | None = setting(None, basic=True)
    """Where the images are now, for pictures; default: where they were embedded from."""
    bundle: Path | None = setting(None, metavar="BUNDLE", basic=True)
    """Bundle that computes --image, which must be the features' own; default: where that was."""
    engine: str = setting("auto", metavar="ENGINE")
    """onnxruntime (onnx), openvino (ov), tensorrt (trt) or tensorrt-rtx (trt-rtx); auto: the one that computed the
    features."""
    threads: int | None = setting(None, at_least=1, at_most=4096)
    """CPU threads of the engine; default: one for each granted core."""
    max_pixels: int | None = setting(None, at_least=1)
    """Pixels of the largest image that is read, such as 300000000 for photos of 300 megapixels; default: 178956970."""
    seed: int = 0
    """Seed of the images by which the recall is measured."""
    device: Device = setting("cpu", basic=True)
    """Where to compute; auto takes the GPU where there is one."""

    def faults(self) -> Iterator[MaeDeployError]:
        if self.image is None and not (self.duplicates or self.outliers):
            yield ConfigError("nothing to search for", hint="give --image FILE, --duplicates or --outliers")
