"""The masked autoencoder: encoder on visible patches, light decoder on all, loss on the masked ones.

He et al., Masked Autoencoders Are Scalable Vision Learners: https://arxiv.org/abs/2111.06377
It stands here and not in `pretrain/`, because distillation trains a student with it and export writes its decoder.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mae_deploy.models.bands import GroupedPrediction, group_means, group_moments, group_positions
from mae_deploy.models.config import DecoderConfig, EncoderConfig, ObjectiveConfig, check_objective, quarter
from mae_deploy.models.masking import Masking
from mae_deploy.models.pca import PatchPca
from mae_deploy.models.position import sincos_group_embedding, sincos_position_embedding
from mae_deploy.models.vit import (
    Encoder,
    LayerNorm,
    gather_tokens,
    initialise_linear,
    patchify,
    run_blocks,
    transformer_blocks,
)

_ERRORS = {"mse": F.mse_loss, "l1": F.l1_loss, "smooth_l1": F.smooth_l1_loss}


class MaeOutput(NamedTuple):
    """What a forward pass of the autoencoder gives."""

    loss: Tensor
    """The loss, a scalar; by default the mean squared error on the masked patches."""
    pixels: Tensor
    """`(B, N, T)`: every patch as predicted, in the space of the target; by default its pixels, T = P * P * C."""


class MaskedAutoencoder(Encoder):
    """Encoder plus decoder, with the original's state-dict names side by side.

    With mask tokens in the encoder, `mask_token` is as wide as the encoder. Without decoder blocks, `decoder_pred`
    reads the encoder's tokens.

    Raises:
        ConfigError: no decoder blocks, and no mask tokens in the encoder that could stand for them.
    """

    def __init__(
        self,
        config: EncoderConfig,
        decoder: DecoderConfig,
        *,
        norm_pix_loss: bool = True,
        objective: ObjectiveConfig | None = None,
    ) -> None:
        super().__init__(config)
        self.decoder_config = decoder
        self.norm_pix_loss = norm_pix_loss
        self.objective = objective or ObjectiveConfig()
        check_objective(config, decoder, self.objective)
        D = decoder.decoder_embed_dim if decoder.decoder_depth else config.width
        if decoder.decoder_depth:
            self.decoder_embed = nn.Linear(config.width, D)
            code = quarter(D) if config.band_groups is not None else 0
            self.decoder_pos_embed = nn.Parameter(
                sincos_position_embedding(D - code, config.grid_size), requires_grad=False
            )
            if config.band_groups is not None:  # one more, for CLS
                self.decoder_channel_embed = nn.Parameter(
                    sincos_group_embedding(code, config.num_groups + 1), requires_grad=False
                )
            self.decoder_norm = LayerNorm(D)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.width if self.objective.encoder_mask_tokens else D))
        self.decoder_blocks = transformer_blocks(D, decoder.decoder_depth, decoder.heads)
        self.decoder_pred: Any = (
            nn.Linear(D, self.objective.width(config)) if config.band_groups is None else GroupedPrediction(D, config)
        )
        self.pca = PatchPca(config.patch_dim, self.objective.width(config)) if self.objective.target == "pca" else None
        nn.init.normal_(self.mask_token, std=0.02)
        for name, module in self.named_children():
            if name.startswith("decoder"):
                module.apply(initialise_linear)

    def forward_encoder(self, images: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """The latent of the visible patches: `(B, C, H, W), (B, K) -> (B, P + K, D)`."""
        return super().forward(images, ids_keep)

    def forward_masked_encoder(self, images: Tensor, mask: Tensor) -> Tensor:
        """The latent of all patches, mask tokens in place of the masked ones:
        `(B, C, H, W), (B, N) -> (B, P + N, D)`.
        """
        tokens = run_blocks(self.blocks, self.embed_masked(images, mask), self.turns())
        return self.norm(tokens)  # type: ignore[no-any-return]

    def embed_masked(self, images: Tensor, mask: Tensor) -> Tensor:
        """What the first block reads then: `(B, C, H, W), (B, N) -> (B, P + N, D)`."""
        tokens, table, P = self.embed(images), self.positions(), self.config.num_prefix
        masked = self.mask_token if table is None else self.mask_token + table[:, 1:]
        patches = torch.where(mask.unsqueeze(-1).bool(), masked.to(tokens.dtype), tokens[:, P:])
        return torch.cat([tokens[:, :P], patches], dim=1)

    def forward_latent(self, images: Tensor, masking: Masking) -> Tensor:
        """What the decoder reads, by the kind of encoder: `(B, C, H, W) -> (B, P + K, D)`, or `(B, P + N, D)` with mask
        tokens in the encoder.
        """
        if self.objective.encoder_mask_tokens:
            return self.forward_masked_encoder(images, masking.mask)
        return self.forward_encoder(images, masking.ids_keep)

    def forward_decoder(self, latent: Tensor, ids_restore: Tensor) -> Tensor:
        """Predict every patch: `(B, P + K, D), (B, N) -> (B, N, T)`.

        With mask tokens in the encoder the latent is whole, `(B, P + N, D)`, and in its order. Registers stay out.
        """
        if not self.decoder_config.decoder_depth:
            return self.predict(self.rows(latent))
        tokens = run_blocks(self.decoder_blocks, self.embed_decoder(latent, ids_restore))
        return self.predict(self.decoder_norm(tokens))

    def embed_decoder(self, latent: Tensor, ids_restore: Tensor) -> Tensor:
        """What the decoder's first block reads: every patch in its place, mask tokens for those not seen, CLS first:
        `-> (B, 1 + N, D')`.
        """
        tokens: Tensor = self.decoder_embed(self.rows(latent))
        if not self.objective.encoder_mask_tokens:
            B, visible, D = tokens.shape
            masked = self.mask_token.to(tokens.dtype).expand(B, ids_restore.shape[1] + 1 - visible, D)
            patches = gather_tokens(torch.cat([tokens[:, 1:], masked], dim=1), ids_restore)
            tokens = torch.cat([tokens[:, :1], patches], dim=1)
        return tokens + self.decoder_positions()

    def decoder_positions(self) -> Tensor:
        """What is added to every token of the decoder, CLS first: `(1, 1 + N, D)`, with groups of bands
        `(1, 1 + G * N, D)`.
        """
        if self.config.band_groups is None:
            return self.decoder_pos_embed
        return group_positions(self.decoder_pos_embed, self.decoder_channel_embed, self.config.num_groups)

    def patches(self, images: Tensor) -> Tensor:
        """The patches that are to be predicted: `(B, C, H, W) -> (B, N, P * P * C)`.

        With `norm_pix_loss`, each (of each group of bands) is normalised by its own mean and unbiased variance, eps
        1e-6 inside the root.
        """
        patches = patchify(images, self.config.patch)
        if self.norm_pix_loss:
            variance, mean = self._moments(patches)
            patches = (patches - mean) / (variance + 1e-6).sqrt()
        return patches

    def target(self, images: Tensor) -> Tensor:
        """What the decoder should predict, patches or their principal components: `(B, C, H, W) -> (B, N, T)`.

        Raises:
            ValueError: the target is a teacher's features, which only the teacher can give.
        """
        if self.objective.target == "features":
            raise ValueError("a teacher's features are given to the model, not computed by it")
        patches = self.patches(images)
        return patches if self.pca is None else self.pca(patches)

    def predicted_patches(self, images: Tensor, predicted: Tensor) -> Tensor:
        """A prediction as patches in the images' own units: `(B, C, H, W), (B, N, T) -> (B, N, P * P * C)`.

        A patch normalised by its own mean and deviation can be restored with those of the true patch only.
        """
        patches = predicted if self.pca is None else self.pca.inverse(predicted)
        if self.norm_pix_loss:
            variance, mean = self._moments(patchify(images, self.config.patch))
            patches = patches * (variance + 1e-6).sqrt() + mean
        return patches

    def forward_loss(self, images: Tensor, pixels: Tensor, mask: Tensor, target: Tensor | None = None) -> Tensor:
        """The error of a prediction over the masked patches (paper, section 3, "Reconstruction target"), or over all, a
        scalar in float32.
        """
        target = self.target(images.float()) if target is None else target.float()
        error = _ERRORS[self.objective.loss](pixels.float(), target, reduction="none")
        error = error.mean(dim=-1) if self.config.band_groups is None else group_means(error, self.config.band_groups)
        return (error * mask).sum() / mask.sum() if self.objective.loss_on == "masked" else error.mean()

    def forward(  # type: ignore[override]
        self, images: Tensor, masking: Masking, target: Tensor | None = None
    ) -> MaeOutput:
        """Loss and prediction for one masking: `(B, C, H, W) -> MaeOutput`.

        Args:
            target: `(B, N, T)`, where it is not computed from the images alone.
        """
        latent = self.forward_latent(images, masking)
        pixels = self.forward_decoder(latent, masking.ids_restore)
        return MaeOutput(self.forward_loss(images, pixels, masking.mask, target), pixels)

    def predict(self, tokens: Tensor) -> Tensor:
        """The last linear layer, without CLS: `(B, 1 + N, D) -> (B, N, T)`."""
        if self.config.band_groups is None:
            return self.decoder_pred(tokens)[:, 1:]  # type: ignore[no-any-return]
        return self.decoder_pred(tokens[:, 1:])  # type: ignore[no-any-return]

    def _moments(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Unbiased variance and mean of each patch, or of each group's part of it: `(B, N, 1)` or
        `(B, N, P * P * C)`.
        """
        if self.config.band_groups is None:
            variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
            return variance, mean
        return group_moments(patches, self.config.band_groups)
