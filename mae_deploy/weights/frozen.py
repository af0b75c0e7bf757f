"""Frozen networks whose outputs another network learns: only the parts that are needed are kept and run, without
gradients.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, nn
from torch.nn import functional as F

from mae_deploy.errors import ConfigError
from mae_deploy.models.taps import DECODER_KINDS, Tap, encoder_depth, unreached
from mae_deploy.models.vit import Encoder
from mae_deploy.weights.load import LoadedWeights, encoder_of, model_of


def resize_images(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Bicubic resizing of a normalised batch: `(B, C, H, W) -> (B, C, *size)`."""
    if tuple(images.shape[2:]) == size:
        return images
    return F.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False)


def frozen(loaded: LoadedWeights, wanted: Collection[Tap]) -> Encoder:
    """The network without what `wanted` does not need: blocks behind the deepest tap, decoder and head; in evaluation
    mode, without gradients.

    An autoencoder with mask tokens in its encoder is a plain encoder here unless its decoder is asked.
    """
    model = model_of(loaded) if any(tap.kind in DECODER_KINDS for tap in wanted) else encoder_of(loaded)
    dropped = {id(part) for part in unreached(model, wanted)}
    del model.blocks[encoder_depth(wanted, len(model.blocks)) :]
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if id(child) in dropped:
                setattr(parent, name, nn.Identity())
    return model.float().requires_grad_(False)


def image_size_for(loaded: LoadedWeights, grid_size: tuple[int, int]) -> tuple[int, int]:
    """The size at which the encoder has this grid.

    Raises:
        ConfigError: it has several tokens at each place of the grid.
    """
    stored = loaded.encoder_config
    if stored.band_groups is not None:
        raise ConfigError(
            "the teacher has groups of bands, and so several tokens at each place",
            hint="fine-tune it, and distil its logits",
        )
    return grid_size[0] * stored.patch, grid_size[1] * stored.patch


def normalised(tokens: Tensor) -> Tensor:
    """LayerNorm without affine, in float32, as a student's target: `(..., D)`."""
    return F.layer_norm(tokens.float(), tokens.shape[-1:])
