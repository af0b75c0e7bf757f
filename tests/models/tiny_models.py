"""A ViT and its decoder with small, unequal sizes, numbers that leave no tensor zero, and the checkpoint files that
others write.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mae_deploy.checkpoint import Metadata
from mae_deploy.config import to_dict
from mae_deploy.images.preprocess import default_preprocess
from mae_deploy.models.config import DecoderConfig, EncoderConfig
from mae_deploy.models.mae import MaskedAutoencoder
from mae_deploy.models.vit import Classifier, Encoder, Pool

M = TypeVar("M", bound=nn.Module)

# Unequal, so that a transposed or mixed-up axis does not fit: 3x5 patches of 2x2 pixels, 5 heads of 4, a decoder of 3
# heads of 4.
ENCODER = EncoderConfig(name="tiny", image_size=(6, 10), patch_size=2, in_chans=3, embed_dim=20, depth=2, num_heads=5)
SQUARE = replace(ENCODER, image_size=(10, 10))
DECODER = DecoderConfig(decoder_depth=1, decoder_embed_dim=12, decoder_num_heads=3)
HEADS = {"num_heads": 5, "decoder_num_heads": 3}
"""What a weights file does not say about these."""
CLASSES = 11


def fill(model: M, seed: int = 0) -> M:
    """Random numbers in every tensor, biases, norms and position tables too; in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return model.eval()


def tiny_encoder(config: EncoderConfig = ENCODER, seed: int = 0) -> Encoder:
    return fill(Encoder(config), seed)


def tiny_mae(config: EncoderConfig = ENCODER, *, norm_pix_loss: bool = True, seed: int = 0) -> MaskedAutoencoder:
    return fill(MaskedAutoencoder(config, DECODER, norm_pix_loss=norm_pix_loss), seed)


def tiny_classifier(pool: Pool, config: EncoderConfig = ENCODER, seed: int = 0) -> Classifier:
    return fill(Classifier(config, num_classes=CLASSES, pool=pool), seed)


def random_tensor(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_images(config: EncoderConfig = ENCODER, batch: int = 3) -> Tensor:
    return random_tensor(batch, config.in_chans, *config.image_size)


def metadata_of(model: Encoder, **more: Any) -> Metadata:
    """The metadata that goes with a model."""
    common: dict[str, Any] = {
        "encoder": to_dict(model.config),
        "preprocess": to_dict(default_preprocess(model.config.image_size, model.config.in_chans)),
        **more,
    }
    if isinstance(model, MaskedAutoencoder):
        return Metadata(
            kind="mae",
            decoder=to_dict(model.decoder_config),
            norm_pix_loss=model.norm_pix_loss,
            objective=to_dict(model.objective),
            **common,
        )
    if isinstance(model, Classifier):
        return Metadata(kind="classifier", pool=model.pool, num_classes=model.head.out_features, **common)
    return Metadata(kind="encoder", **common)


def write_original(path: Path, tensors: dict[str, Tensor], *, legacy: bool = False, **arguments: Any) -> Path:
    """A `.pth` as the original training script writes it, its arguments an `argparse.Namespace`."""
    content = {
        "model": tensors,
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2)}},
            "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.95), "params": [0]}],
        },
        "epoch": 3,
        "scaler": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 0},
        "args": argparse.Namespace(**arguments),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path
