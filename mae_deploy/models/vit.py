"""The ViT encoder on timm's blocks, and the classifier on top of it.

State-dict names and arithmetic are those of the original MAE implementation and of timm.
Shapes: B images, C channels, P patch side, N patches, K kept patches, D width.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from timm.layers import trunc_normal_
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from mae_deploy.models.bands import GroupedPatchEmbed, group_positions
from mae_deploy.models.config import EncoderConfig
from mae_deploy.models.position import sincos_group_embedding, sincos_position_embedding

Pool = Literal["avg", "cls"]

LayerNorm: Any = partial(nn.LayerNorm, eps=1e-6)

EXPLICIT_ATTENTION_TOKENS = 65
"""Up to this many tokens, attention written out trains about twice as fast on a CPU as the fused kernel (its backward
pass)."""


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """`(B, C, H, W) -> (B, N, P * P * C)`: patches row by row, channels last within a patch."""
    B, C, H, W = images.shape
    P = patch_size
    patches = images.reshape(B, C, H // P, P, W // P, P)
    return patches.permute(0, 2, 4, 3, 5, 1).reshape(B, (H // P) * (W // P), P * P * C)


def unpatchify(patches: Tensor, patch_size: int, grid_size: tuple[int, int]) -> Tensor:
    """The inverse of `patchify`: `(B, N, P * P * C) -> (B, C, H, W)`."""
    B, _, width = patches.shape
    P, (rows, columns) = patch_size, grid_size
    C = width // (P * P)
    images = patches.reshape(B, rows, columns, P, P, C).permute(0, 5, 1, 3, 2, 4)
    return images.reshape(B, C, rows * P, columns * P)


def gather_tokens(tokens: Tensor, ids: Tensor) -> Tensor:
    """Pick tokens by index: `(B, N, D), (B, K) -> (B, K, D)`."""
    return tokens.gather(1, ids.unsqueeze(-1).expand(-1, -1, tokens.shape[2]))


class PatchEmbed(nn.Module):
    """A linear map of flat patches; its weight is kept in the convolution form that every checkpoint has."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.in_chans, config.width, kernel_size=config.patch, stride=config.patch)

    def forward(self, patches: Tensor) -> Tensor:
        """`(B, K, P * P * C) -> (B, K, D)`."""
        return F.linear(patches, self.proj.weight.permute(0, 2, 3, 1).flatten(1), self.proj.bias)


def transformer_blocks(
    dim: int, depth: int, num_heads: int, *, mlp_ratio: float = 4.0, drop_path: float = 0.0
) -> nn.ModuleList:
    """timm's pre-norm blocks with stochastic depth rising linearly from 0 to `drop_path`."""
    rates = np.linspace(0, drop_path, depth).tolist()
    return nn.ModuleList(
        BlockWithQKV(dim, num_heads, mlp_ratio, qkv_bias=True, norm_layer=LayerNorm, drop_path=rate) for rate in rates
    )


class BlockWithQKV(Block):
    """timm's block, which also gives its queries, keys and values where they are asked for. Calls go through the block,
    as FSDP2 needs it.
    """

    def forward(
        self, x: Tensor, *args: Any, inner: Literal["with_qkv", "only_qkv"] | None = None, **kwargs: Any
    ) -> Any:
        """`(B, T, D)` to the same, to that and what the `qkv` layer gives, `(B, 3, heads, T, D / heads)`, or to the
        latter alone.
        """
        if inner is None:
            return super().forward(x, *args, **kwargs)
        attention: Any = self.attn
        B, T, _ = x.shape
        qkv = (
            attention.qkv(self.norm1(x))
            .reshape(B, T, 3, attention.num_heads, attention.head_dim)
            .permute(0, 2, 3, 1, 4)
        )
        if inner == "only_qkv":
            return qkv
        return self.behind_attention(x, _attended(attention, qkv)), qkv

    def behind_attention(self, x: Tensor, mixed: Tensor) -> Tensor:
        """The block's input and what its heads gave, `(B, T, D)` and `(B, heads, T, D / heads)`, to its output."""
        attention: Any = self.attn
        x = x + self.drop_path1(self.ls1(attention.proj(mixed.transpose(1, 2).flatten(2))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))  # type: ignore[no-any-return]


def _attended(attention: Any, qkv: Tensor) -> Tensor:
    """What timm's attention does between its `qkv` and `proj` layers: `(B, 3, H, T, d) -> (B, H, T, d)`."""
    queries, keys, values = qkv.unbind(1)
    if attention.fused_attn:
        return F.scaled_dot_product_attention(queries, keys, values)
    shares: Tensor = ((queries * attention.scale) @ keys.transpose(-2, -1)).softmax(dim=-1)
    return shares @ values


def run_blocks(blocks: nn.ModuleList, tokens: Tensor) -> Tensor:
    """Apply blocks in turn, with the attention that is faster for this device and length."""
    for block in blocks:
        tokens = run_block(block, tokens)
    return tokens


def run_block(block: nn.Module, tokens: Tensor, **inner: Any) -> Any:
    """Apply one block (see `BlockWithQKV`), with the attention that is faster for this device and length."""
    assert isinstance(block, Block)
    block.attn.fused_attn = not tokens.is_cpu or tokens.shape[1] > EXPLICIT_ATTENTION_TOKENS  # type: ignore[assignment]
    return block(tokens, **inner)


class Encoder(nn.Module):
    """The MAE encoder: all patches, or only those named by `ids_keep`, with a CLS token before them."""

    def __init__(self, config: EncoderConfig, *, drop_path: float = 0.0) -> None:
        super().__init__()
        self.config = config
        D = config.width
        self.patch_embed: Any = PatchEmbed(config) if config.band_groups is None else GroupedPatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        # A parameter, because fine-tuning may train it; fixed until then.
        self.pos_embed = nn.Parameter(
            sincos_position_embedding(D - config.group_dim, config.grid_size), requires_grad=False
        )
        if config.band_groups is not None:
            self.channel_embed = nn.Parameter(
                sincos_group_embedding(config.group_dim, config.num_groups), requires_grad=False
            )
        self.blocks = transformer_blocks(
            D, config.blocks, config.heads, mlp_ratio=config.mlp_ratio, drop_path=drop_path
        )
        self.norm: nn.Module = LayerNorm(D)
        self._initialise()

    def embed(self, images: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """Patch embedding plus position of the kept patches, CLS in front: `(B, C, H, W), (B, K) -> (B, 1 + K, D)`."""
        _, C, H, W = images.shape
        if (C, H, W) != (self.config.in_chans, *self.config.image_size):
            raise ValueError(
                f"the encoder takes {self.config.in_chans}x{self.config.image_size} images, not {(C, H, W)}"
            )
        patches = patchify(images, self.config.patch)
        if self.config.band_groups is None:
            return self.embed_patches(patches if ids_keep is None else gather_tokens(patches, ids_keep), ids_keep)
        # The groups' patches differ in width: tokens can be picked once they are embedded.
        embeds = self.patch_embed(patches)
        return self._placed(embeds if ids_keep is None else gather_tokens(embeds, ids_keep), ids_keep)

    def embed_patches(self, patches: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """The same of patches that were cut out already, without groups of bands:
        `(B, K, P * P * C), (B, K) -> (B, 1 + K, D)`.
        """
        return self._placed(self.patch_embed(patches), ids_keep)

    def _placed(self, embeds: Tensor, ids_keep: Tensor | None) -> Tensor:
        """Positions added, CLS in front: `(B, K, D) -> (B, 1 + K, D)`."""
        table = self.positions()
        positions = table[:, 1:] if ids_keep is None else table[0, 1:][ids_keep]
        tokens = embeds + positions
        cls = (self.cls_token + table[:, :1]).expand(len(embeds), -1, -1)
        return torch.cat([cls.to(tokens.dtype), tokens], dim=1)

    def positions(self) -> Tensor:
        """What is added to every token, CLS first: `(1, 1 + N, D)`, with groups of bands `(1, 1 + G * N, D)`."""
        return (
            self.pos_embed
            if self.config.band_groups is None
            else group_positions(self.pos_embed, self.channel_embed, self.config.num_groups)
        )

    def forward(self, images: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """CLS and patch tokens after the final norm: `(B, C, H, W), (B, K) -> (B, 1 + K, D)`.

        Args:
            ids_keep: int64 `(B, K)` row-major patch indices in any order; None keeps all in row-major order. With
                groups of bands, patch n of group g is `g * N + n`.

        Raises:
            ValueError: the images have another size or number of channels.
        """
        return self.norm(run_blocks(self.blocks, self.embed(images, ids_keep)))  # type: ignore[no-any-return]

    def _initialise(self) -> None:
        """As the original: Xavier-uniform linear maps (the patch embedding as one), normal(0.02) tokens."""
        for module in self.patch_embed.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.data.flatten(1))
        nn.init.normal_(self.cls_token, std=0.02)
        self.blocks.apply(initialise_linear)


def initialise_linear(module: nn.Module) -> None:
    """Xavier-uniform weight and zero bias of a linear layer; leaves other modules alone."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Classifier(Encoder):
    """Encoder and linear head, as the original fine-tunes it.

    `pool="avg"`: mean of the patch tokens, then `fc_norm`, and no norm before it. `pool="cls"`: the CLS token after
    `norm`.
    """

    def __init__(self, config: EncoderConfig, *, num_classes: int, pool: Pool = "avg", drop_path: float = 0.0) -> None:
        super().__init__(config, drop_path=drop_path)
        self.pool = pool
        if pool == "avg":
            self.norm = nn.Identity()
            self.fc_norm = LayerNorm(config.width)
        self.head = nn.Linear(config.width, num_classes)
        trunc_normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)

    def forward_pooled(self, images: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """What the head reads: `(B, C, H, W), (B, K) -> (B, D)`."""
        return self.pool_latent(super().forward(images, ids_keep))

    def pool_latent(self, latent: Tensor) -> Tensor:
        """The same from the encoder's latent: `(B, 1 + K, D) -> (B, D)`."""
        return self.fc_norm(latent[:, 1:].mean(dim=1)) if self.pool == "avg" else latent[:, 0]

    def forward(self, images: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """Logits: `(B, C, H, W), (B, K) -> (B, classes)`."""
        return self.head(self.forward_pooled(images, ids_keep))  # type: ignore[no-any-return]
