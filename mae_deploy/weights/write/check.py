"""Check that what was written for another library computes there, or reads back here, as the model that it came
from.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mae_deploy.checkpoint import Metadata
from mae_deploy.config import from_dict
from mae_deploy.errors import CheckFailed
from mae_deploy.models.config import DecoderConfig, EncoderConfig
from mae_deploy.models.mae import MaskedAutoencoder
from mae_deploy.models.masking import random_masking
from mae_deploy.models.vit import Classifier, Encoder
from mae_deploy.weights.load import LoadedWeights, model_of
from mae_deploy.weights.read.convert import ImportOptions, import_weights
from mae_deploy.weights.write.foreign import ForeignModel, Library, architecture_of

LIMIT = 2e-5
"""Largest difference between two libraries' outputs as a share of the largest number; float32 sums in another order
gave 7e-7 for ViT-B."""

_IMAGES = 2
_MASK_RATIO = 0.5
"""Not the model's own: it must leave a patch of the smallest images."""


def check_round_trip(path: Path, model: ForeignModel, library: Library, seed: int) -> dict[str, Any]:
    """Read a written file or folder back, and run it in its library where that is installed; returns what was found.

    Raises:
        CheckFailed: tensors, settings or outputs differ.
    """
    _check_values(path, model.loaded)
    found: dict[str, Any] = {"round_trip": "same tensors and settings"}
    package = {"timm": "timm", "huggingface": "transformers"}.get(library)
    if package is None:
        return found
    if importlib.util.find_spec(package) is None:
        return {**found, package: "not installed: its outputs were not compared"}
    generator = torch.Generator().manual_seed(seed)
    encoder = model.loaded.encoder_config
    images = torch.randn((_IMAGES, encoder.in_chans, *encoder.image_size), generator=generator)
    noise = torch.rand((_IMAGES, encoder.num_patches), generator=generator)
    with torch.inference_mode():
        ours = _ours(model_of(model.loaded), images, noise)
        theirs = (
            _timm(path, model.loaded.metadata.kind, images)
            if library == "timm"
            else _hugging_face(path, model.loaded.metadata.kind, images, noise)
        )
    error = max(_difference(ours[name], theirs[name]) for name in ours)
    if not error <= LIMIT:
        raise CheckFailed(
            f"{package} computes something else from what was written: outputs differ by {error:.1e} of the largest,"
            f" the limit is {LIMIT:g}"
        )
    return {**found, package: f"{', '.join(ours)} agree within {error:.1e} of the largest"}


def _check_values(path: Path, loaded: LoadedWeights) -> None:
    """Our own importer gets the same tensors and settings back."""
    imported = import_weights(path, ImportOptions())
    different = [
        name
        for name, tensor in loaded.tensors.items()
        if name not in imported.tensors or not torch.equal(tensor.float(), imported.tensors[name])
    ]
    if different or set(imported.tensors) != set(loaded.tensors):
        raise CheckFailed(
            f"what was written reads back with {len(different) or 'more'} other tensors {', '.join(different[:4])}"
        )
    wrote, read = (_settings(metadata) for metadata in (loaded.metadata, imported.metadata))
    for name, value in wrote.items():
        if read[name] != value:
            raise CheckFailed(f"what was written reads back with {name} {read[name]} instead of {value}")


def _settings(metadata: Metadata) -> dict[str, Any]:
    """What must come back; a name of ours and the fraction that the MLP's width is of the tokens' need not."""
    encoder = from_dict(EncoderConfig, metadata.encoder)
    settings = {
        name: getattr(encoder, name) for name in ("image_size", "patch", "in_chans", "width", "blocks", "heads")
    }
    settings |= {name: getattr(metadata, name) for name in ("kind", "pool", "num_classes", "class_names", "licence")}
    if metadata.kind == "mae":
        settings |= {
            "decoder": from_dict(DecoderConfig, metadata.decoder or {}),
            "norm_pix_loss": metadata.norm_pix_loss,
        }
    return settings


def _difference(ours: Tensor, theirs: Tensor) -> float:
    if ours.shape != theirs.shape:
        return float("inf")
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12)).item()


def _ours(model: Encoder, images: Tensor, noise: Tensor) -> dict[str, Tensor]:
    if isinstance(model, MaskedAutoencoder):
        output = model(images, random_masking(noise, _MASK_RATIO))
        return {"predictions": output.pixels, "loss": output.loss}
    return {"logits" if isinstance(model, Classifier) else "tokens": model(images)}


def _timm(folder: Path, kind: str, images: Tensor) -> dict[str, Tensor]:
    import timm

    model: Any = timm.create_model(f"local-dir:{folder.absolute()}", pretrained=True).eval()
    return {"logits": model(images)} if kind == "classifier" else {"tokens": model.forward_features(images)}


def _hugging_face(folder: Path, kind: str, images: Tensor, noise: Tensor) -> dict[str, Tensor]:
    import transformers

    # ViTModel's pooler is a layer of its own on top, which no ViT of ours has.
    settings = (
        {"add_pooling_layer": False} if kind == "encoder" else {"mask_ratio": _MASK_RATIO} if kind == "mae" else {}
    )
    with _quiet(transformers):
        model, loading = getattr(transformers, architecture_of(kind)).from_pretrained(
            folder, local_files_only=True, output_loading_info=True, **settings
        )
    if wrong := [f"{sort} {sorted(map(str, names))[:4]}" for sort, names in loading.items() if names]:
        raise CheckFailed(f"transformers reads what was written with {'; '.join(wrong)}")
    model.eval()
    if kind == "mae":
        output = model(images, noise=noise)
        return {"predictions": output.logits, "loss": output.loss}
    return {"logits": model(images).logits} if kind == "classifier" else {"tokens": model(images).last_hidden_state}


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without progress bars and warnings, which are for people who load a model."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
