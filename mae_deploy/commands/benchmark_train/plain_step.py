"""The yardstick of `benchmark-train`: a pretraining step as code of 2021 did it, in plain PyTorch.

Every patch is embedded by a convolution before masked ones are dropped, attention is written out, AdamW updates tensor
by tensor, on a GPU in FP16 with a loss scaler, and the host reads the loss after every step. State-dict names are the
autoencoder's, so both start from the same weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mae_deploy.data.transforms import NormaliseImages
from mae_deploy.models.config import DecoderConfig, EncoderConfig
from mae_deploy.training.optim.groups import decay_groups


class PlainStep:
    """Model, optimiser and loss scaler; a call is one step."""

    def __init__(
        self,
        encoder: EncoderConfig,
        decoder: DecoderConfig,
        weights: dict[str, Tensor],
        normalise: NormaliseImages,
        *,
        mask_ratio: float,
        lr: float,
    ) -> None:
        self.device = normalise.mean.device
        self.model = _Autoencoder(encoder, decoder)
        self.model.load_state_dict(weights)
        self.model.to(self.device)
        self.normalise = normalise
        self.mask_ratio = mask_ratio
        groups = [
            {"params": group["params"], "weight_decay": group["weight_decay"]}
            for group in decay_groups(self.model, 0.05)
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), foreach=False, fused=False)
        self.scaler = torch.amp.GradScaler("cuda", enabled=self.device.type == "cuda")

    def __call__(self, images: Tensor, noise: Tensor) -> float:
        """`uint8 (B, C, H, W)`, uniform noise `(B, N)` on the device; returns the loss."""
        with torch.autocast("cuda", torch.float16, enabled=self.scaler.is_enabled()):
            loss: Tensor = self.model(self.normalise(images.to(self.device, non_blocking=True)), noise, self.mask_ratio)
        value = loss.item()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.stack(
            [parameter.grad.norm() for parameter in self.model.parameters() if parameter.grad is not None]
        ).norm()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return value


class _Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        q, k, v = self.qkv(x).reshape(B, T, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        attention = (q @ k.transpose(-2, -1)) * (D // self.num_heads) ** -0.5
        x = (attention.softmax(dim=-1) @ v).transpose(1, 2).reshape(B, T, D)
        return self.proj(x)  # type: ignore[no-any-return]


class _Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))  # type: ignore[no-any-return]


class _Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = _Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = _Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class _PatchEmbed(nn.Module):
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.in_chans, config.width, kernel_size=config.patch, stride=config.patch)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]


class _Autoencoder(nn.Module):
    def __init__(self, encoder: EncoderConfig, decoder: DecoderConfig) -> None:
        super().__init__()
        N, D, E = encoder.num_patches, encoder.width, decoder.decoder_embed_dim
        self.patch_size, self.grid_size = encoder.patch, encoder.grid_size
        self.patch_embed = _PatchEmbed(encoder)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + N, D), requires_grad=False)
        self.blocks = nn.ModuleList(_Block(D, encoder.heads, encoder.mlp_ratio) for _ in range(encoder.blocks))
        self.norm = nn.LayerNorm(D, eps=1e-6)
        self.decoder_embed = nn.Linear(D, E)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, E))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, 1 + N, E), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(_Block(E, decoder.heads, 4) for _ in range(decoder.decoder_depth))
        self.decoder_norm = nn.LayerNorm(E, eps=1e-6)
        self.decoder_pred = nn.Linear(E, encoder.patch_dim)

    def forward(self, images: Tensor, noise: Tensor, mask_ratio: float) -> Tensor:
        """The mean squared error on the masked patches, each normalised by its mean and variance."""
        B, N = noise.shape
        K = int(N * (1 - mask_ratio))
        ids_shuffle = torch.argsort(noise, dim=1)
        ids_restore = torch.argsort(ids_shuffle, dim=1)
        mask = torch.ones(B, N, device=noise.device)
        mask[:, :K] = 0
        mask = torch.gather(mask, 1, ids_restore)
        predicted = self._decode(self._encode(images, ids_shuffle[:, :K]), ids_restore)
        error = ((predicted - self._target(images)) ** 2).mean(dim=-1)
        return (error * mask).sum() / mask.sum()

    def _encode(self, images: Tensor, ids_keep: Tensor) -> Tensor:
        x = self.patch_embed(images) + self.pos_embed[:, 1:]
        x = torch.gather(x, 1, ids_keep.unsqueeze(-1).repeat(1, 1, x.shape[2]))
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)  # type: ignore[no-any-return]

    def _decode(self, latent: Tensor, ids_restore: Tensor) -> Tensor:
        x = self.decoder_embed(latent)
        masked = self.mask_token.repeat(len(x), ids_restore.shape[1] + 1 - x.shape[1], 1)
        patches = torch.cat([x[:, 1:], masked.to(x.dtype)], dim=1)
        patches = torch.gather(patches, 1, ids_restore.unsqueeze(-1).repeat(1, 1, x.shape[2]))
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]  # type: ignore[no-any-return]

    def _target(self, images: Tensor) -> Tensor:
        (B, C), (rows, columns), P = images.shape[:2], self.grid_size, self.patch_size
        target = images.reshape(B, C, rows, P, columns, P)
        target = torch.einsum("nchpwq->nhwpqc", target).reshape(B, rows * columns, P * P * C)
        mean, variance = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
        return (target - mean) / (variance + 1e-6) ** 0.5
