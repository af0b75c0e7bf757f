"""Features of images from a checkpoint, a bundle or a timm model, with which k-NN and linear probes evaluate it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from mae_deploy.config import from_dict
from mae_deploy.data.dataset import ImageDataset, eval_loader
from mae_deploy.data.sources.base import ImageSource
from mae_deploy.data.transforms import NormaliseImages, eval_transform
from mae_deploy.errors import CheckFailed, ConfigError
from mae_deploy.evaluation.config import FeaturesConfig
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.images.read import Array
from mae_deploy.models.config import EncoderConfig
from mae_deploy.models.vit import Classifier, Encoder
from mae_deploy.progress import notice, progress
from mae_deploy.runtime.backbone import Backbone
from mae_deploy.runtime.manifest import MANIFEST_FILE
from mae_deploy.seeding import derive_seed, random_patches, seed_everything
from mae_deploy.training.config import Device, TrainingPrecision
from mae_deploy.training.device import autocast, resolve_device
from mae_deploy.weights.load import LoadedWeights, at_image_size, encoder_of, read_weights


class FeatureSource(Protocol):
    """Anything that gives a vector for an image."""

    @property
    def spec(self) -> Preprocess:
        """Resize, crop and normalisation."""
        ...

    @property
    def description(self) -> str:
        """Which network, and what of it is the feature."""
        ...

    @property
    def parameters(self) -> int:
        """Parameters of the encoder, without decoder and head."""
        ...

    @property
    def licence(self) -> str | None:
        """What the weights may be used for, where known."""
        ...

    def __call__(self, images: Tensor) -> Tensor:
        """`(B, C, H, W)` pixels, as the loader gives them, to float32 `(B, D)` on the CPU."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


@dataclass(frozen=True, slots=True)
class FeatureSet:
    """Features of a whole set, in its order, without the images that could not be read."""

    features: Tensor
    """float32 `(S, D)`, on the CPU."""
    labels: Tensor
    """int64 `(S,)`."""
    unreadable: tuple[str, ...]
    """A line for each image that was left out."""
    images_per_second: float
    """Rate of the encoder alone: decoding and cropping are not counted."""


def open_source(path: Path, config: FeaturesConfig, device: Device) -> FeatureSource:
    """A bundle, or any checkpoint or weights file that `read_weights` reads.

    Raises:
        ConfigError: nothing is there, or it has no such feature.
        MissingDependency: the device or the engine is absent.
    """
    if (path / MANIFEST_FILE).is_file():
        return BundleFeatures(path, config, device)
    return EncoderFeatures(read_weights(path), config, device)


def extract(
    source: FeatureSource, images: ImageSource, config: FeaturesConfig, *, title: str = "features"
) -> FeatureSet:
    """Run every image through the encoder once.

    Raises:
        CheckFailed: no image can be read, more than `max_corrupt` cannot, or a feature is not finite.
    """
    spec = source.spec
    dataset = ImageDataset(images, eval_transform(spec), seed=0, replace_unreadable=False)
    features: list[Tensor] = []
    labels: list[Tensor] = []
    unreadable: list[str] = []
    seconds = 0.0
    with progress(title, len(dataset)) as bar:
        for batch in eval_loader(dataset, batch_size=config.batch_size, num_workers=config.num_workers):
            for line in batch.unreadable:
                notice("left out", line)
            unreadable += batch.unreadable
            if len(unreadable) > config.max_corrupt:
                raise CheckFailed(
                    f"{len(unreadable)} unreadable images in {images.name}",
                    hint=f"mend them, or allow more than --max-corrupt {config.max_corrupt}",
                )
            if len(batch.images):
                started = time.perf_counter()
                features.append(source(batch.images))
                seconds += time.perf_counter() - started
                labels.append(batch.labels)
            bar.advance(len(batch.images) + len(batch.unreadable))
    if not features:
        raise CheckFailed(f"no readable image in {images.name}")
    found = torch.cat(features)
    if not found.isfinite().all():
        raise CheckFailed(
            f"features of {source.description} are NaN or infinite",
            hint="try --precision fp32; else the weights are damaged",
        )
    return FeatureSet(found, torch.cat(labels), tuple(unreadable), len(found) / max(seconds, 1e-9))


# --- where features come from ----------------------------------------------------------------------------------------


class ModuleFeatures:
    """A torch module and what it makes of normalised images `(B, C, H, W)`: a vector for each."""

    def __init__(
        self,
        model: nn.Module,
        pooled: Callable[[Tensor], Tensor],
        spec: Preprocess,
        description: str,
        licence: str | None,
        precision: TrainingPrecision,
        device: Device,
    ) -> None:
        self.device = resolve_device(device)
        self.model = model.requires_grad_(False).eval().to(self.device)
        self.spec, self.description, self.licence = spec, description, licence
        self.parameters = sum(
            parameter.numel() for name, parameter in model.named_parameters() if name.split(".")[0] != "head"
        )
        self._pooled = pooled
        self._normalise = NormaliseImages(spec).to(self.device)
        self._autocast = autocast(precision, self.device)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """`(B, C, H, W)` pixels to float32 `(B, D)` on the CPU."""
        normalised = self._normalise(images.to(self.device, non_blocking=True))
        with self._autocast():
            return self._pooled(normalised).float().cpu()

    def close(self) -> None:
        """Nothing is held but memory."""


class EncoderFeatures(ModuleFeatures):
    """A checkpoint's encoder or classifier, of all patches or of `keep` random ones, as `random_patches` draws them."""

    def __init__(
        self,
        loaded: LoadedWeights,
        config: FeaturesConfig,
        device: Device,
        *,
        keep: int | None = None,
        seed: int = 0,
    ) -> None:
        loaded = at_image_size(loaded, config.image_size)
        model = encoder_of(loaded)
        headed = isinstance(model, Classifier) and model.pool == "avg"
        has_cls = model.config.class_token and not headed
        pool = _pool_of(config.pool, ("cls", "avg") if has_cls else ("avg",))
        self.output = {"cls": "cls", "avg": "pooled"}[pool]
        """What an exported graph calls this feature."""
        encoder = loaded.encoder_config
        description = (
            f"{encoder.name} at {encoder.image_size[0]}x{encoder.image_size[1]},"
            f" {'fc_norm of ' if headed else ''}{pool}"
        )
        super().__init__(
            model,
            _pooling(model, pool, _random_ids(encoder.num_tokens, keep, seed)),
            from_dict(Preprocess, loaded.metadata.preprocess),
            description,
            loaded.metadata.licence,
            config.precision,
            device,
        )
        self.loaded = loaded


class BundleFeatures:
    """A bundle's `cls` or `pooled` output, of all patches or of `keep` random ones, on whichever engine."""

    def __init__(
        self, path: Path, config: FeaturesConfig, device: Device, *, keep: int | None = None, seed: int = 0
    ) -> None:
        self._backbone = Backbone.load(path, config.engine, device=device, threads=config.threads)
        bundle = self._backbone.bundle
        outputs = {"cls": "cls", "avg": "pooled"}
        pool = _pool_of(config.pool, tuple(pool for pool, output in outputs.items() if output in bundle.output_names))
        self._output, self._ids = outputs[pool], _random_ids(bundle.num_patches, keep, seed)
        self.spec = bundle.preprocess
        self.licence: str | None = bundle.licence
        model = bundle.model
        self.description = f"{model['name']}, {bundle.precision} on {self._backbone.engine.name}, {pool}"
        shape = {name: value for name, value in model.items() if name in EncoderConfig.__dataclass_fields__}
        with torch.device("meta"):
            self.parameters = sum(
                parameter.numel() for parameter in Encoder(from_dict(EncoderConfig, shape)).parameters()
            )

    def __call__(self, images: Tensor) -> Tensor:
        """`(B, C, H, W)` pixels to float32 `(B, D)`."""
        pixels = np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())
        found = self._backbone.run_cropped(pixels, self._ids(len(pixels)), outputs=[self._output])[self._output]
        return torch.from_numpy(found.astype(np.float32))

    def close(self) -> None:
        """Free the engine."""
        self._backbone.close()


def classifier_logits(
    loaded: LoadedWeights,
    precision: TrainingPrecision,
    device: Device,
    *,
    keeps: Sequence[int | None] = (None,),
    seed: int = 0,
) -> ModuleFeatures:
    """A classifier's logits in the place of features, one after the other for each number of patches:
    `(B, len(keeps) * classes)`.

    Args:
        keeps: patches that the classifier sees, the n-th image those that `random_patches` gives the n-th; None: all.
    """
    metadata, model = loaded.metadata, encoder_of(loaded)
    draws = [_random_ids(loaded.encoder_config.num_tokens, keep, seed) for keep in keeps]

    def logits(images: Tensor) -> Tensor:
        return torch.cat([model(images, _tensor(ids(len(images)), images)) for ids in draws], dim=1)

    return ModuleFeatures(
        model,
        logits,
        from_dict(Preprocess, metadata.preprocess),
        loaded.encoder_config.name,
        metadata.licence,
        precision,
        device,
    )


def random_like(loaded: LoadedWeights, seed: int) -> LoadedWeights:
    """The same encoder with random weights: what an architecture gives without training."""
    seed_everything(derive_seed(seed, "weights"))
    metadata = replace(
        loaded.metadata,
        kind="encoder",
        decoder=None,
        pool=None,
        num_classes=None,
        class_names=None,
        licence="own",
        provenance={},
        metrics={},
    )
    return LoadedWeights(metadata, Encoder(loaded.encoder_config).state_dict(), {})


def _pool_of(asked: str, offered: tuple[str, ...]) -> str:
    """The pooling that was asked for, if there is one; auto is the first on offer."""
    if not offered:
        raise ConfigError("this bundle has neither a cls nor a pooled output", hint="export it with --tokens full")
    if asked != "auto" and asked not in offered:
        raise ConfigError(
            f"--pool {asked}, but this encoder offers {' and '.join(offered)}",
            hint="a mean-pooled classifier has no norm for its CLS token",
        )
    return offered[0] if asked == "auto" else asked


def _random_ids(num_patches: int, keep: int | None, seed: int) -> Callable[[int], Array | None]:
    """Of the next B images, `ids_keep (B, K)`: the n-th image those that `random_patches` gives the n-th; None: all."""
    numbers = itertools.count()

    def ids(count: int) -> Array | None:
        items = list(itertools.islice(numbers, count))
        return None if keep is None else random_patches(num_patches, keep, items, seed)

    return ids


def _tensor(ids: Array | None, like: Tensor) -> Tensor | None:
    return None if ids is None else torch.from_numpy(ids).to(like.device)


def _pooling(model: Encoder, pool: str, ids: Callable[[int], Array | None]) -> Callable[[Tensor], Tensor]:
    def pooled(images: Tensor) -> Tensor:
        ids_keep = _tensor(ids(len(images)), images)
        if isinstance(model, Classifier) and model.pool == "avg":
            return model.forward_pooled(images, ids_keep)
        tokens = Encoder.forward(model, images, ids_keep)
        return tokens[:, 0] if pool == "cls" else Encoder.pool_latent(model, tokens)

    return pooled
