"""The masked autoencoder: encoder on visible patches, light decoder on all, loss on the masked ones.

He et al., Masked Autoencoders Are Scalable Vision Learners: https://arxiv.org/abs/2111.06377
It stands here and not in `pretrain/`, because distillation trains a student with it and export writes its decoder.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mae_deploy.models.config import DecoderConfig, EncoderConfig
from mae_deploy.models.masking import Masking
from mae_deploy.models.position import sincos_position_embedding
from mae_deploy.models.vit import Encoder, LayerNorm, gather_tokens, initialise_linear, patchify, run_blocks, transformer_blocks


class MaeOutput(NamedTuple):
    """What a forward pass of the autoencoder gives."""

    loss: Tensor
    """Mean squared error on the masked patches, a scalar."""
    pixels: Tensor
    """`(B, N, P * P * C)`: every patch as predicted, in the space of the target."""


class MaskedAutoencoder(Encoder):
    """Encoder plus decoder, with the original's state-dict names side by side."""

    def __init__(self, config: EncoderConfig, decoder: DecoderConfig, *, norm_pix_loss: bool = True) -> None:
        super().__init__(config)
        self.decoder_config = decoder
        self.norm_pix_loss = norm_pix_loss
        D = decoder.decoder_embed_dim
        self.decoder_embed = nn.Linear(config.width, D)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, D))
        self.decoder_pos_embed = nn.Parameter(sincos_position_embedding(D, config.grid_size), requires_grad=False)
        self.decoder_blocks = transformer_blocks(D, decoder.decoder_depth, decoder.decoder_num_heads)
        self.decoder_norm = LayerNorm(D)
        self.decoder_pred = nn.Linear(D, config.patch_dim)
        nn.init.normal_(self.mask_token, std=0.02)
        for module in (self.decoder_embed, self.decoder_blocks, self.decoder_pred):
            module.apply(initialise_linear)

    def forward_encoder(self, images: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """The latent of the visible patches: `(B, C, H, W), (B, K) -> (B, 1 + K, D)`."""
        return super().forward(images, ids_keep)

    def forward_decoder(self, latent: Tensor, ids_restore: Tensor) -> Tensor:
        """Predict every patch: `(B, 1 + K, D), (B, N) -> (B, N, P * P * C)`."""
        tokens = self.decoder_embed(latent)
        B, visible, D = tokens.shape
        masked = self.mask_token.to(tokens.dtype).expand(B, ids_restore.shape[1] + 1 - visible, D)
        patches = gather_tokens(torch.cat([tokens[:, 1:], masked], dim=1), ids_restore)
        tokens = torch.cat([tokens[:, :1], patches], dim=1) + self.decoder_pos_embed
        tokens = self.decoder_norm(run_blocks(self.decoder_blocks, tokens))
        return self.decoder_pred(tokens)[:, 1:]  # type: ignore[no-any-return]

    def target(self, images: Tensor) -> Tensor:
        """What the decoder should predict: `(B, C, H, W) -> (B, N, P * P * C)`.

        With `norm_pix_loss`, each patch is normalised by its own mean and unbiased variance, eps 1e-6 inside the root.
        """
        target = patchify(images, self.config.patch)
        if self.norm_pix_loss:
            variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
            target = (target - mean) / (variance + 1e-6).sqrt()
        return target

    def forward_loss(self, images: Tensor, pixels: Tensor, mask: Tensor) -> Tensor:
        """Mean squared error over the masked patches (paper, section 3, "Reconstruction target"), a scalar in float32."""
        error = (pixels.float() - self.target(images.float())).square().mean(dim=-1)
        return (error * mask).sum() / mask.sum()

    def forward(self, images: Tensor, masking: Masking) -> MaeOutput:  # type: ignore[override]
        """Loss and prediction for one masking: `(B, C, H, W) -> MaeOutput`."""
        latent = self.forward_encoder(images, masking.ids_keep)
        pixels = self.forward_decoder(latent, masking.ids_restore)
        return MaeOutput(self.forward_loss(images, pixels, masking.mask), pixels)
