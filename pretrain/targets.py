"""What the decoder predicts where the images alone do not say it: a frozen teacher's features, and components fitted to
the training images.

Pixels, and the coefficients of components that are there, are computed by the model itself. Everything else, such as
tokens of another model or latents, is a `Target`: `pretrain.run` calls it on every batch and gives its answer to the
model.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor

from mae_deploy.data.dataset import TrainImages
from mae_deploy.data.order import RunSlice
from mae_deploy.data.transforms import NormaliseImages
from mae_deploy.errors import ConfigError
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.models.config import EncoderConfig
from mae_deploy.models.mae import MaskedAutoencoder
from mae_deploy.models.pca import PatchPca
from mae_deploy.models.taps import Tap, tapped
from mae_deploy.progress import notice
from mae_deploy.weights.frozen import frozen, image_size_for, normalised, resize_images
from mae_deploy.weights.load import LoadedWeights, at_image_size

PCA_IMAGES = 2048
"""Training images, at most, whose patches the principal components are fitted to: 400,000 patches of 224-pixel
images."""


class Target(Protocol):
    """A target that is not computed by the model."""

    @property
    def dim(self) -> int:
        """Numbers predicted for a patch, T."""
        ...

    @property
    def licence(self) -> str:
        """What may be done with weights that learnt this target."""
        ...

    @property
    def record(self) -> dict[str, Any]:
        """Where it comes from, for the checkpoint's provenance."""
        ...

    def to(self, device: torch.device) -> None:
        """Move what it computes with."""
        ...

    def __call__(self, images: Tensor) -> Tensor:
        """The target of every patch, without gradients: `(B, C, H, W) -> (B, N, T)`."""
        ...


class TeacherFeatures:
    """The patch tokens behind a frozen encoder's last block, each normalised (LayerNorm without affine).

    Args:
        loaded: the teacher's weights.
        encoder: what learns; the teacher sees the image at the size at which its grid is this one's.

    Raises:
        ConfigError: the teacher reads other channels.
    """

    def __init__(self, loaded: LoadedWeights, encoder: EncoderConfig) -> None:
        stored = loaded.encoder_config
        if (stored.in_chans, stored.band_groups) != (encoder.in_chans, None):
            raise ConfigError(f"--teacher reads {stored.in_chans} channels in one group, the model {encoder.in_chans}")
        self.dim = stored.width
        self.licence = loaded.metadata.licence
        self.record = loaded.record
        self._tap = Tap("tokens", stored.blocks)
        self._teacher = frozen(at_image_size(loaded, image_size_for(loaded, encoder.grid_size)), {self._tap})

    def to(self, device: torch.device) -> None:
        """Move the teacher."""
        self._teacher.to(device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """`(B, C, H, W) -> (B, N, D)`."""
        resized = resize_images(images, self._teacher.config.image_size)
        return normalised(tapped(self._teacher, resized, {self._tap})[self._tap])[:, 1:]


def fit_pca(
    model: MaskedAutoencoder,
    images: TrainImages,
    spec: Preprocess,
    accelerator: Accelerator,
    *,
    batch_size: int,
    seed: int,
    num_workers: int,
) -> None:
    """Fit the model's principal components to the patches of the first training images of the run, augmented as they
    are in training.

    The main process fits, and the others are given what it found.
    """
    pca = model.pca
    assert pca is not None
    if accelerator.is_main_process:
        notice("components:", f"fitting {len(pca.components)} to the patches of {min(len(images), PCA_IMAGES)} images")
        _fit(model, pca, images, spec, accelerator.device, batch_size=batch_size, seed=seed, num_workers=num_workers)
    for buffer in (pca.mean, pca.components):
        buffer.copy_(broadcast(buffer.to(accelerator.device)))


@torch.no_grad()
def _fit(
    model: MaskedAutoencoder,
    pca: PatchPca,
    images: TrainImages,
    spec: Preprocess,
    device: torch.device,
    *,
    batch_size: int,
    seed: int,
    num_workers: int,
) -> None:
    normalise = NormaliseImages(spec).to(device)
    D = model.config.patch_dim
    count, total, moments = 0, torch.zeros(D, dtype=torch.float64), torch.zeros(D, D, dtype=torch.float64)
    batch_size = min(batch_size, len(images))
    batches = min(len(images), PCA_IMAGES) // batch_size or 1
    for batch in images.stream(
        RunSlice(batch_size, batches, 0, batches), seed=seed, num_workers=num_workers, pin_memory=False
    ):
        patches = model.patches(normalise(batch.images.to(device))).flatten(0, 1)
        count += len(patches)
        total += patches.sum(dim=0).double().cpu()
        moments += (patches.T @ patches).double().cpu()
    if count:  # else no image can be read, which the loop says
        pca.fit(count, total, moments)
