"""Calibration: what a model's activations are on real images, in one streamed pass, kept in a cache for the next export
of the same model.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.layers import Attention
from torch import Tensor

from mae_deploy.config import to_dict
from mae_deploy.export.job import ExportJob
from mae_deploy.export.reference import restoring
from mae_deploy.export.samples import CalibrationImages, _digest
from mae_deploy.files import atomic_path, sha256
from mae_deploy.images.npz_file import read_npz
from mae_deploy.images.read import Array
from mae_deploy.machine import cache_folder
from mae_deploy.models.mae import MaskedAutoencoder
from mae_deploy.models.quantization.activations import ActivationStats, Observer
from mae_deploy.models.vit import Encoder
from mae_deploy.progress import notice, progress
from mae_deploy.seeding import derive_seed

_FORMAT = 2
"""Of the cache files; another number makes older ones unused. It changes with whatever changes the figures in them."""


_FIELDS = ("absmax", "mean", "mean_square", "counts", "divisor")


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """What one pass found."""

    stats: dict[str, ActivationStats]
    """Of the input of each Linear, by its name."""
    attention_absmax: dict[str, Array]
    """Largest magnitudes that each qkv gave, float64 `(3 * D,)`, by the name of its attention."""
    num_images: int
    images_sha256: str
    """Of the contents of the files read, in order."""
    cached: bool
    """Whether it comes from an earlier run."""

    def record(self, scales: Mapping[str, Any]) -> dict[str, Any]:
        """For a manifest.

        Args:
            scales: all that was derived from it, by name.
        """
        derived = hashlib.sha256(json.dumps(scales, sort_keys=True).encode()).hexdigest()
        return {
            "num_images": self.num_images,
            "images_sha256": self.images_sha256,
            "scales_sha256": derived,
            "cached": self.cached,
        }


def calibrate(
    model: Encoder,
    images: CalibrationImages,
    names: Sequence[str],
    *,
    token_sizes: Sequence[int] = (),
    seed: int = 0,
    device: str = "cpu",
    cache: Path | None = None,
) -> Calibration:
    """Run the model over the images and keep statistics of the inputs of the named Linears; from the cache where the
    same was done before.

    Args:
        names: Linears of the encoder, and of the decoder if it is an autoencoder that reconstructs.
        token_sizes: numbers of visible patches, batch by batch in turn, chosen at random; empty: all patches.
        cache: folder of the cache; default: the user's.

    Raises:
        ConfigError: too few readable images.
        CheckFailed: NaN or infinite activations.
    """
    file = (cache or cache_folder("calibration")) / f"{_key(model, images, names, token_sizes, seed)}.npz"
    found = _load(file, names)
    if found is None:
        found = _observe(model.to(device).eval(), images, names, token_sizes, seed)
        if (
            images.sha256 == found.images_sha256 or not images.has_spare
        ):  # else others stood in, whose contents are not in the key
            _save(file, found)
    return found


def calibrate_job(job: ExportJob, names: list[str]) -> Calibration | None:
    """On the calibration images of an export; None where it has none."""
    if job.calib_images is None:
        return None
    # Of a stream the context is that of the whole frame, so its activations are those of all patches.
    sizes = sorted({*job.ranges["K"][1:]}) if "K" in job.ranges and job.config.token_mode != "cached" else []
    return calibrate(
        job.reference.model,
        job.calib_images,
        names,
        token_sizes=sizes,
        seed=job.config.seed,
        device=job.reference.device,
    )


@torch.no_grad()
def _observe(
    model: Encoder, images: CalibrationImages, names: Sequence[str], token_sizes: Sequence[int], seed: int
) -> Calibration:
    observer = Observer(model, names)
    read: list[Path] = []
    decode = any(name.startswith("decoder_") for name in names)
    started = time.monotonic()
    with progress("calibrate", len(images)) as bar, observer.watching():
        for index, (paths, pixels) in enumerate(images.batches()):
            ids = _visible(model, len(paths), token_sizes, seed, index)
            _forward(model, torch.from_numpy(images.spec.normalise(pixels)), ids, decode=decode)
            read += paths
            bar.advance(len(paths), f"{len(read) / (time.monotonic() - started):.1f} images/s")
    return Calibration(
        stats=observer.stats(),
        attention_absmax=observer.attention_absmax(),
        num_images=len(read),
        images_sha256=_digest(sha256(path) for path in read),
        cached=False,
    )


def _visible(model: Encoder, batch: int, token_sizes: Sequence[int], seed: int, index: int) -> Tensor | None:
    """Random patches for one batch, int64 `(B, K)`; None for all."""
    if not token_sizes:
        return None
    rng = np.random.default_rng(derive_seed(seed, "calibration", index))
    K = token_sizes[index % len(token_sizes)]
    return torch.from_numpy(np.stack([rng.permutation(model.config.num_tokens)[:K] for _ in range(batch)]))


def _forward(model: Encoder, images: Tensor, ids: Tensor | None, *, decode: bool) -> None:
    device = model.device
    images, ids = images.to(device), ids.to(device) if ids is not None else None
    tokens = Encoder.forward(model, images, ids)
    if decode:
        assert isinstance(model, MaskedAutoencoder)
        assert ids is not None
        model.forward_decoder(tokens, restoring(ids, model.config.num_patches))


def _key(model: Encoder, images: CalibrationImages, names: Sequence[str], token_sizes: Sequence[int], seed: int) -> str:
    """Of everything that the statistics depend on."""
    digest = hashlib.sha256()
    settings = {
        "format": _FORMAT,
        "preprocess": to_dict(images.spec),
        "images": images.sha256,
        "names": list(names),
        "token_sizes": list(token_sizes),
        "seed": seed,
        "heads": [module.num_heads for module in model.modules() if isinstance(module, Attention)],
    }
    digest.update(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _load(file: Path, names: Sequence[str]) -> Calibration | None:
    """A cached calibration, or None where there is none that can be read."""
    attentions = [name.removesuffix(".qkv") for name in names if name.endswith(".qkv")]
    try:
        arrays = read_npz(file)
        return Calibration(
            stats={name: ActivationStats(**{field: arrays[f"{name}/{field}"] for field in _FIELDS}) for name in names},
            attention_absmax={name: arrays[f"{name}/absmax"] for name in attentions},
            num_images=int(arrays["num_images"]),
            images_sha256=str(arrays["images_sha256"]),
            cached=True,
        )
    except (ValueError, TypeError, KeyError):
        return None


def _save(file: Path, found: Calibration) -> None:
    arrays: dict[str, Any] = {
        f"{name}/{field}": getattr(entry, field) for name, entry in found.stats.items() for field in _FIELDS
    }
    arrays |= {f"{name}/absmax": values for name, values in found.attention_absmax.items()}
    try:
        with atomic_path(file) as aside, aside.open("wb") as stream:
            np.savez_compressed(stream, num_images=found.num_images, images_sha256=found.images_sha256, **arrays)
    except OSError as error:  # a home that is full or read-only: the work is done all the same
        notice("not cached:", str(error))
