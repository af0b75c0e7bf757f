"""The preprocessing of an imported model: what the user says, what the file says, else as the original evaluates."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from mae_deploy.images.geometry import CropMode, Interpolation
from mae_deploy.images.preprocess import Preprocess, default_preprocess
from mae_deploy.models.config import EncoderConfig
from mae_deploy.progress import notice
from mae_deploy.weights.read.files import GUESSED, Source

_AS_ORIGINAL = "as the original MAE evaluates"


@dataclass(frozen=True, kw_only=True, slots=True)
class PreprocessOptions:
    """What the user says of the preprocessing."""

    crop_mode: CropMode | None = None
    """How images of another form are fitted; default, as of all that follow: what the file or its name tells, else as
    the original evaluates."""
    crop_pct: float | None = None
    """The crop's side as a share of the resized image's."""
    interpolation: Interpolation | None = None
    """The filter of the resize."""
    mean: tuple[float, ...] | None = None
    """Of each channel, for pixels in [0, 1]."""
    std: tuple[float, ...] | None = None
    """Standard deviation of each channel."""

    @property
    def given(self) -> dict[str, Any]:
        """What is set."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def whole(self) -> bool:
        """Whether all of it is set, so that nothing else need tell it."""
        return len(self.given) == len(fields(self))


def find_preprocess(
    source: Source, encoder: EncoderConfig, release: str | None, options: PreprocessOptions
) -> tuple[Preprocess, str]:
    """The preprocessing, and what tells it.

    Args:
        release: whose release the file is, where it is a known one.

    Raises:
        ConfigError: values that do not fit the model.
    """
    given = options.given
    known = source.preprocess or default_preprocess(encoder.image_size, encoder.in_chans)
    spec = replace(known, image_size=encoder.image_size).altered(**given)
    if options.whole:
        return spec, "the options of import"
    told = _AS_ORIGINAL if release else f"{GUESSED}, {_AS_ORIGINAL}: nothing in the file tells it"
    if source.preprocess is not None and source.preprocess_from is not None:
        told = source.preprocess_from
    flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
    told = f"{told}; but {flags} of import" if given else told
    return spec, told


def say_if_guessed(told: str) -> None:
    """A line where nothing tells the preprocessing."""
    if GUESSED in told:
        notice(
            "preprocessing:",
            f"{told}. Predictions depend on it: 'mae-deploy import' takes --mean, --std, --crop-mode, --crop-pct and"
            " --interpolation, and timm's of a --model NAME",
        )
