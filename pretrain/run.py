"""Pretraining: random masking, the autoencoder's loss, a run folder (paper, section 3 and appendix A.1)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mae_deploy.checkpoint import OWN_LICENCE, Metadata
from mae_deploy.config import to_dict
from mae_deploy.data.dataset import ImageDataset, unlabelled_images
from mae_deploy.data.transforms import train_transform
from mae_deploy.models.mae import MaskedAutoencoder
from mae_deploy.models.masking import random_masking
from mae_deploy.preprocess import UnreadableImage, read_image
from mae_deploy.pretrain.config import PretrainConfig
from mae_deploy.pretrain.reconstruct import draw_reconstructions
from mae_deploy.seeding import derive_seed, seed_everything
from mae_deploy.training.loop import Job, fit, make_accelerator
from mae_deploy.training.optim import decay_groups
from mae_deploy.training.run_folder import RunFolder

PAPER_WARMUP = 40.0
"""Epochs (paper, table 8)."""

_PICTURES = 8


def run(config: PretrainConfig) -> dict[str, Any]:
    """Pretrain a masked autoencoder; returns the loop's summary."""
    images = unlabelled_images(config.data)
    fingerprint = images.fingerprint()
    accelerator = make_accelerator(config.device, config.loop.precision, config.out)
    folder = RunFolder.open(config.out, config, fingerprint, resume=config.resume, write=accelerator.is_main_process)
    spec = config.images.preprocess(config.model.image_size, config.model.in_chans)
    dataset = ImageDataset(
        images, train_transform(spec, config.augment), channels=spec.channels, seed=config.seed, replace_unreadable=True, cache=config.images.cache
    )
    seed_everything(derive_seed(config.seed, "weights"))
    model = MaskedAutoencoder(config.model, config.decoder, norm_pix_loss=config.norm_pix_loss)

    def loss(model: nn.Module, images: Tensor, _: Tensor) -> dict[str, Tensor]:
        noise = torch.rand(len(images), config.model.num_patches, device=images.device)
        return {"loss": model(images, random_masking(noise, config.mask_ratio)).loss}

    def pictures(model: nn.Module, epochs: int, last: bool) -> None:
        if last or epochs % config.pictures_every == 0:
            shown = _readable(images.paths, spec.channels)
            assert isinstance(model, MaskedAutoencoder)
            draw_reconstructions(model, shown, spec, folder.path / f"reconstruction-{epochs:04d}.png", mask_ratio=config.mask_ratio, seed=config.seed)

    job = Job(
        title="pretrain",
        model=model,
        saved=model,
        groups=decay_groups(model, config.optim.weight_decay),
        dataset=dataset,
        spec=spec,
        loss=loss,
        metadata=lambda: Metadata(
            kind="mae",
            encoder=to_dict(config.model),
            decoder=to_dict(config.decoder),
            norm_pix_loss=config.norm_pix_loss,
            preprocess=to_dict(spec),
            licence=OWN_LICENCE,
            provenance={"stage": "pretrain", "config": to_dict(config), "data": fingerprint},
        ),
        paper_warmup=PAPER_WARMUP,
        epoch_end=pictures,
    )
    return fit(
        job,
        folder,
        accelerator,
        optim=config.optim,
        loop=config.loop,
        num_workers=config.images.num_workers,
        max_corrupt=config.images.max_corrupt,
        seed=config.seed,
    )


def _readable(paths: tuple[Path, ...], channels: int) -> list[Any]:
    """The first few images that can be read."""
    shown: list[Any] = []
    for path in paths:
        if len(shown) == _PICTURES:
            break
        try:
            shown.append(read_image(path, channels))
        except UnreadableImage:
            continue
    return shown
