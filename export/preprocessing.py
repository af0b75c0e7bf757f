"""What an export changes of a checkpoint's preprocessing, the weights with it where it must be the same function."""

from __future__ import annotations

from dataclasses import replace

import torch

from mae_deploy.config import from_dict, to_dict
from mae_deploy.images.geometry import CropMode
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.progress import notice
from mae_deploy.reporting.preprocess import PREPROCESS_FROM
from mae_deploy.weights.load import LoadedWeights
from mae_deploy.weights.read.preprocessing import say_if_guessed


def with_crop_mode(loaded: LoadedWeights, crop_mode: CropMode | None) -> tuple[LoadedWeights, str | None]:
    """Another fit of images than the checkpoint's, where it is asked for, and what tells the preprocessing; says what
    was changed, and where the checkpoint's is a guess.
    """
    spec = from_dict(Preprocess, loaded.metadata.preprocess)
    told: str | None = loaded.record.get(PREPROCESS_FROM)
    if crop_mode in (None, spec.crop_mode):
        if told is not None and "sha256" in loaded.record:  # of a file that was imported just now it has been said
            say_if_guessed(told)
        return loaded, told
    changed = f"crop mode {crop_mode} by export, {spec.crop_mode} in the checkpoint"
    notice("preprocessing:", f"{changed}; 'mae-deploy eval' compares the accuracy of both")
    metadata = replace(loaded.metadata, preprocess=to_dict(spec.altered(crop_mode=crop_mode)))
    return LoadedWeights(metadata, loaded.tensors, loaded.record), "; ".join(filter(None, (told, changed)))


def with_one_std(loaded: LoadedWeights) -> LoadedWeights:
    """The same function of an image, its channels all divided by the mean of their standard deviations:
    `W (x / std) = (W s / std) (x / s)`.
    """
    std = torch.tensor(from_dict(Preprocess, loaded.metadata.preprocess).std, dtype=torch.float64)
    shared = std.mean()
    groups = loaded.encoder_config.band_groups
    bands = (
        {"patch_embed.proj.weight": tuple(range(len(std)))}
        if groups is None
        else {f"patch_embed.{i}.proj.weight": group for i, group in enumerate(groups)}
    )
    folded = {
        name: (loaded.tensors[name].double() * (shared / std[list(own)])[:, None, None]).to(loaded.tensors[name].dtype)
        for name, own in bands.items()
    }
    metadata = replace(loaded.metadata, preprocess={**loaded.metadata.preprocess, "std": [shared.item()] * len(std)})
    return LoadedWeights(metadata, {**loaded.tensors, **folded}, loaded.record)
