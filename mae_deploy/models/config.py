"""Which encoder and decoder to build: presets by name, every number open to a recipe. No torch here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from mae_deploy.config import nearest, setting
from mae_deploy.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Preset:
    """The shape of a ViT: patch side, width, blocks, attention heads."""

    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int


PRESETS = {
    "vit_tiny_patch16": Preset(16, 192, 12, 3),
    "vit_small_patch16": Preset(16, 384, 12, 6),
    "vit_base_patch16": Preset(16, 768, 12, 12),
    "vit_large_patch16": Preset(16, 1024, 24, 16),
    "vit_huge_patch14": Preset(14, 1280, 32, 16),
    # For small images: the same family with patches of 2 to 8 pixels. Head dim 64 throughout, which TensorRT can fuse in INT8.
    "vit_tiny_patch2": Preset(2, 192, 12, 3),
    "vit_tiny_patch4": Preset(4, 192, 12, 3),
    "vit_tiny_patch8": Preset(8, 192, 12, 3),
    "vit_small_patch4": Preset(4, 384, 12, 6),
    "vit_small_patch8": Preset(8, 384, 12, 6),
    "vit_micro_patch4": Preset(4, 128, 6, 2),
    "vit_nano_patch4": Preset(4, 64, 4, 1),
}
"""ViT-T/S/B as in timm, ViT-B/L/H as in the paper (appendix A), and small ones for small images."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderConfig:
    """Model."""

    name: str = setting("vit_base_patch16", flag="--model")
    """The encoder: vit_{tiny,small,base,large}_patch16, vit_huge_patch14, or for small images vit_tiny_patch{2,4,8},
    vit_small_patch{4,8}, vit_micro_patch4, vit_nano_patch4."""
    image_size: tuple[int, int] = (224, 224)
    """Input height and width in pixels, H[,W]; each a multiple of the patch size."""
    patch_size: int | None = None
    """Side of a patch in pixels; default: the model's."""
    in_chans: int = 3
    """Input channels: 1 grey, 3 RGB, 4 RGBA."""
    embed_dim: int | None = setting(None, hidden=True)
    """Width of the tokens; default: the model's."""
    depth: int | None = setting(None, hidden=True)
    """Number of blocks; default: the model's."""
    num_heads: int | None = setting(None, hidden=True)
    """Attention heads; default: the model's."""
    mlp_ratio: float = setting(4.0, hidden=True)
    """Hidden width of the MLP as a multiple of embed_dim."""

    def __post_init__(self) -> None:
        preset = PRESETS.get(self.name)
        if preset is None:
            if None in (self.patch_size, self.embed_dim, self.depth, self.num_heads):
                raise ConfigError(f"unknown model '{self.name}'", hint=nearest(self.name, list(PRESETS)))
        else:
            # The frozen config holds the numbers themselves, so that a checkpoint does not depend on a table.
            for field in dataclasses.fields(Preset):
                given, own = getattr(self, field.name), getattr(preset, field.name)
                if given is None:
                    object.__setattr__(self, field.name, own)
                elif given != own and field.name != "patch_size":
                    raise ConfigError(f"model '{self.name}' has {field.name} {own}, not {given}", hint="give a shape of your own a name of its own")
        if min(*self.image_size, self.patch, self.in_chans, self.blocks, self.heads, self.width) < 1:
            raise ConfigError(f"sizes of model '{self.name}' must be at least 1")
        if any(side % self.patch for side in self.image_size):
            raise ConfigError(
                f"image size {self.image_size[0]}x{self.image_size[1]} is not a multiple of the patch size {self.patch}",
                hint=f"the nearest is {','.join(str(max(1, round(side / self.patch)) * self.patch) for side in self.image_size)}",
            )
        if self.width % self.heads or self.width % 4:
            raise ConfigError(f"embed_dim {self.width} must be a multiple of 4 and of num_heads {self.heads}")

    @property
    def patch(self) -> int:
        """Side of a patch in pixels."""
        return self.patch_size or 0

    @property
    def width(self) -> int:
        """Width of the tokens, D."""
        return self.embed_dim or 0

    @property
    def blocks(self) -> int:
        """Number of transformer blocks."""
        return self.depth or 0

    @property
    def heads(self) -> int:
        """Number of attention heads."""
        return self.num_heads or 0

    @property
    def grid_size(self) -> tuple[int, int]:
        """Patches down and across, `(H / P, W / P)`."""
        return self.image_size[0] // self.patch, self.image_size[1] // self.patch

    @property
    def num_patches(self) -> int:
        """Number of patches, N."""
        return self.grid_size[0] * self.grid_size[1]

    @property
    def patch_dim(self) -> int:
        """Values of a patch, P * P * C."""
        return self.patch**2 * self.in_chans


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderConfig:
    """Decoder."""

    decoder_depth: int = 8
    """Blocks of the decoder (paper, table 1a)."""
    decoder_embed_dim: int = 512
    """Width of the decoder (paper, table 1b)."""
    decoder_num_heads: int = 16
    """Attention heads of the decoder."""

    def __post_init__(self) -> None:
        if min(self.decoder_depth, self.decoder_embed_dim, self.decoder_num_heads) < 1:
            raise ConfigError("the decoder's depth, width and heads must be at least 1")
        if self.decoder_embed_dim % self.decoder_num_heads or self.decoder_embed_dim % 4:
            raise ConfigError(f"decoder_embed_dim {self.decoder_embed_dim} must be a multiple of 4 and of decoder_num_heads {self.decoder_num_heads}")
