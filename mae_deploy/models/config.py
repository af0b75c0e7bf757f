"""Which encoder and decoder to build: presets by name, every number open to a recipe. No torch here."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from mae_deploy.config import Settings, nearest, setting
from mae_deploy.errors import ConfigError, MaeDeployError, errors_of


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
    # For small images: the same family with patches of 2 to 8 pixels. Head dim 64 throughout, which TensorRT can fuse
    # in INT8.
    "vit_tiny_patch2": Preset(2, 192, 12, 3),
    "vit_tiny_patch4": Preset(4, 192, 12, 3),
    "vit_tiny_patch8": Preset(8, 192, 12, 3),
    "vit_small_patch4": Preset(4, 384, 12, 6),
    "vit_small_patch8": Preset(8, 384, 12, 6),
    "vit_micro_patch4": Preset(4, 128, 6, 2),
    "vit_nano_patch4": Preset(4, 64, 4, 1),
}
"""ViT-T/S/B as in timm, ViT-B/L/H as in the paper (appendix A), and small ones for small images."""


RotaryKind = Literal["none", "dinov3", "index", "mixed"]

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "swiglu"]

BEYOND_PLAIN = (
    *("rotary", "rotary_base", "rotary_offset", "rotary_reference", "position_table", "class_token", "num_registers"),
    *("activation", "qk_norm", "attn_norm", "mlp_norm", "pre_norm", "final_norm", "norm_eps"),
    *("pool_norm", "pool_heads", "pool_mlp_ratio", "pool_prefix"),
)
"""Fields of an encoder by which today's families differ from the original's ViT."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderConfig(Settings, resume="fixed"):
    """Model."""

    name: str = setting("vit_base_patch16", flag="--model", basic=True, metavar="MODEL")
    """The encoder: vit_{tiny,small,base,large}_patch16, vit_huge_patch14, or for small images vit_tiny_patch{2,4,8},
    vit_small_patch{4,8}, vit_micro_patch4, vit_nano_patch4."""
    image_size: tuple[int, int] = setting((224, 224), basic=True, at_least=1)
    """Input height and width in pixels, H[,W]; each a multiple of the patch size."""
    patch_size: int | None = setting(None, basic=True, at_least=1)
    """Side of a patch in pixels; default: the model's."""
    in_chans: int = setting(3, at_least=1)
    """Input channels: 1 grey, 3 RGB, 4 RGBA, any number from TIFF and NumPy files."""
    band_groups: tuple[tuple[int, ...], ...] | None = setting(None, metavar="GROUPS")
    """Groups of channels, each with tokens of its own, such as '0,1,2;3,4,5;6,7' (SatMAE); every channel in one of
    them; default: none."""
    embed_dim: int | None = setting(None, hidden=True, at_least=1)
    """Width of the tokens; default: the model's."""
    depth: int | None = setting(None, hidden=True, at_least=1, at_most=1000)
    """Number of blocks; default: the model's."""
    num_heads: int | None = setting(None, hidden=True, at_least=1)
    """Attention heads; default: the model's."""
    mlp_ratio: float = setting(4.0, hidden=True, above=0)
    """Hidden width of the MLP as a multiple of embed_dim."""
    rotary: RotaryKind = "none"
    """Rotary positions: queries and keys are turned by the place of their patch, so that any image size does without
    interpolation. dinov3: places from -1 to 1 across the image; index: numbers of patches (EVA, Perception Encoder);
    mixed: the same with learned frequencies (RoPE-ViT); none: a table is added to the patches."""
    rotary_base: float = setting(100.0, hidden=True, above=0)
    """Ratio of the highest to the lowest frequency of rotary positions, nearly (DINOv3 100, EVA 10000)."""
    rotary_offset: float = setting(0.0, hidden=True)
    """Added to every rotary coordinate (Perception Encoder 1)."""
    rotary_reference: tuple[int, int] | None = setting(None, hidden=True, at_least=1)
    """Grid to which index coordinates are scaled, rows and columns; default: not scaled."""
    position_table: bool | None = setting(None, hidden=True)
    """Whether a table of positions is added to the patches; default: without rotary positions."""
    class_token: bool = setting(True, hidden=True)
    """Whether there is a class token."""
    num_registers: int = setting(0, hidden=True, at_least=0)
    """Register tokens behind the class token."""
    activation: Activation = setting("gelu", hidden=True)
    """Of the MLP; swiglu: silu of one half of fc1 times the other half."""
    qk_norm: bool = setting(False, hidden=True)
    """LayerNorm of each head's queries and keys."""
    attn_norm: bool = setting(False, hidden=True)
    """LayerNorm before attention's last layer."""
    mlp_norm: bool = setting(False, hidden=True)
    """LayerNorm before the MLP's second layer."""
    pre_norm: bool = setting(False, hidden=True)
    """LayerNorm before the first block."""
    final_norm: bool = setting(True, hidden=True)
    """LayerNorm after the last block."""
    norm_eps: float = setting(1e-6, hidden=True, above=0)
    """Epsilon of all LayerNorms."""
    pool_norm: bool = setting(False, hidden=True)
    """LayerNorm of what is pooled."""
    pool_heads: int = setting(0, hidden=True, at_least=0)
    """Heads of the attention that pools the tokens; 0: the mean of the patches is pooled."""
    pool_mlp_ratio: float = setting(4.0, hidden=True, above=0)
    """Hidden width of its MLP as a multiple of embed_dim."""
    pool_prefix: bool = setting(True, hidden=True)
    """Whether it pools class token and registers too, or the patches alone."""

    def resolve(self) -> None:
        if self.position_table is None:
            object.__setattr__(self, "position_table", self.rotary == "none")
        # The frozen config holds the numbers themselves, so that a checkpoint does not depend on a table.
        preset = PRESETS.get(self.name)
        for field in dataclasses.fields(Preset):
            if preset is not None and getattr(self, field.name) is None:
                object.__setattr__(self, field.name, getattr(preset, field.name))

    def faults(self) -> Iterator[MaeDeployError]:
        if None in (self.patch_size, self.embed_dim, self.depth, self.num_heads):
            hint = nearest(self.name, list(PRESETS))
            yield ConfigError(f"--model '{self.name}' is not a known model", hint=hint)
            return
        if (preset := PRESETS.get(self.name)) is not None:
            for name in ("embed_dim", "depth", "num_heads"):
                if (given := getattr(self, name)) != (own := getattr(preset, name)):
                    yield ConfigError(
                        f"--model '{self.name}' has {name} {own}, not {given}",
                        hint="give a shape of your own a name of its own",
                    )
        if any(side % self.patch for side in self.image_size):
            nearest_sides = (max(1, round(side / self.patch)) * self.patch for side in self.image_size)
            yield ConfigError(
                f"--image-size {self.image_size[0]},{self.image_size[1]} is not a multiple of the patch size,"
                f" {self.patch}",
                hint=f"the nearest is {','.join(map(str, nearest_sides))}",
            )
        if self.width % self.heads or self.width % 4:
            yield ConfigError(f"embed_dim {self.width} must be a multiple of 4 and of num_heads, {self.heads}")
        if (groups := self.band_groups) is not None:
            yield from errors_of(lambda: check_band_groups(groups, self.in_chans))
            if self.width < 8:
                yield ConfigError(f"embed_dim must be at least 8 with --band-groups, got {self.width}")
            if given := ", ".join(self.beyond_plain()):
                yield ConfigError(f"--band-groups does not go with {given}", hint="leave one of the two out")
        if self.rotary != "none" and self.width // self.heads % 4:
            yield ConfigError(
                f"--rotary {self.rotary} needs heads of a width that is a multiple of 4, not {self.width // self.heads}"
            )
        if self.pool_heads and self.width % self.pool_heads:
            yield ConfigError(f"embed_dim {self.width} must be a multiple of pool_heads, {self.pool_heads}")

    def beyond_plain(self) -> dict[str, Any]:
        """Settings in which the encoder differs from the original's, by name, in the order of the fields."""
        defaults = {field.name: field.default for field in dataclasses.fields(EncoderConfig)}
        own = {name: getattr(self, name) for name in BEYOND_PLAIN}
        return {name: value for name, value in own.items() if value != {**defaults, "position_table": True}[name]}

    @property
    def num_prefix(self) -> int:
        """Tokens before the patches: class token and registers."""
        return int(self.class_token) + self.num_registers

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
    def num_groups(self) -> int:
        """Groups of bands, G; 1 without."""
        return len(self.band_groups) if self.band_groups is not None else 1

    @property
    def num_tokens(self) -> int:
        """Patches of all groups of bands, G * N: what masks choose from and `ids_keep` counts, group by group."""
        return self.num_groups * self.num_patches

    @property
    def group_dim(self) -> int:
        """Channels of a position embedding that tell the group of bands: 256 from ViT-B on, as SatMAE has it, else a
        quarter; 0 without groups.
        """
        if self.band_groups is None:
            return 0
        return 256 if self.width >= 768 else quarter(self.width)

    @property
    def patch_dim(self) -> int:
        """Values of a patch, P * P * C."""
        return self.patch**2 * self.in_chans


def encoder_of_init(stored: EncoderConfig, asked: dict[str, Any], *, hint: str) -> EncoderConfig:
    """The encoder of --init, at the image size that is asked for.

    Args:
        asked: settings of an encoder by name; None: that of --init.
        hint: how to have another encoder.

    Raises:
        ConfigError: another encoder is asked for.
    """
    given = {name: value for name, value in asked.items() if value is not None}
    for name, value in given.items():
        if name != "image_size" and value != (own := getattr(stored, name)):
            raise ConfigError(f"--init has {name} {own}, not {value}", hint=f"leave the option out, or {hint}")
    return dataclasses.replace(stored, **given)


def quarter(dim: int) -> int:
    """A quarter of a width in multiples of 4, at least 4: what SatMAE's decoder gives to the code of the group of
    bands.
    """
    return max(4, dim // 16 * 4)


def check_band_groups(groups: tuple[tuple[int, ...], ...], channels: int) -> None:
    """Whether every channel is in exactly one group.

    Raises:
        ConfigError: names the channel.
    """
    written = ";".join(",".join(map(str, group)) for group in groups)
    listed = [band for group in groups for band in group]
    hint = f"write 0 to {channels - 1}, each once, such as 0,1,2;3,4"
    if not groups or not all(groups):
        raise ConfigError(f"--band-groups {written} has an empty group", hint=hint)
    if outside := [band for band in listed if not 0 <= band < channels]:
        raise ConfigError(
            f"--band-groups {written} names band {outside[0]} of {channels}",
            hint=f"{hint}; --in-chans is the number of bands",
        )
    for band in range(channels):
        if listed.count(band) != 1:
            raise ConfigError(f"--band-groups {written} names band {band} {listed.count(band)} times", hint=hint)


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderConfig(Settings, resume="fixed"):
    """Decoder."""

    decoder_depth: int = setting(8, at_least=0)
    """Blocks of the decoder (paper, table 1a: 1 to 12); 0: one linear layer on the encoder's tokens, with
    --encoder-mask-tokens (SimMIM)."""
    decoder_embed_dim: int = setting(512, at_least=1)
    """Width of the decoder (paper, table 1b: 128 to 1024)."""
    decoder_num_heads: int | None = setting(None, at_least=1)
    """Attention heads of the decoder; default: one for every 32 of its width, 16 for the paper's 512."""

    def resolve(self) -> None:
        if self.decoder_num_heads is None:
            width, most = self.decoder_embed_dim, max(1, self.decoder_embed_dim // 32)
            heads = next(heads for heads in range(most, 0, -1) if width % heads == 0)
            object.__setattr__(self, "decoder_num_heads", heads)

    def faults(self) -> Iterator[MaeDeployError]:
        if self.decoder_embed_dim % self.heads or self.decoder_embed_dim % 4:
            yield ConfigError(
                f"--decoder-embed-dim {self.decoder_embed_dim} must be a multiple of 4 and of --decoder-num-heads,"
                f" {self.heads}"
            )

    @property
    def heads(self) -> int:
        """Number of attention heads."""
        return self.decoder_num_heads or 0


TargetKind = Literal["pixels", "pca", "features"]

PCA_DIM = 96
"""Coefficients of a patch's principal components (paper, table 1d)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveConfig(Settings, resume="fixed"):
    """Objective."""

    target: TargetKind = "pixels"
    """What is predicted of a patch: its pixels, the largest coefficients of its principal components (paper, table 1d),
    or a --teacher's features. --norm-pix-loss normalises the patches of the first two."""
    target_dim: int | None = setting(None, at_least=1)
    """Numbers predicted for a patch with --target pca; default: 96, as in the paper, at most those of a patch."""
    loss: Literal["mse", "l1", "smooth_l1"] = "mse"
    """How far a prediction is from its target: mse (MAE), l1 (SimMIM), smooth_l1."""
    loss_on: Literal["masked", "all"] = "masked"
    """Patches that the loss counts (paper, footnote 1: counting all patches costs about 0.5 % of accuracy)."""
    encoder_mask_tokens: bool = False
    """The encoder runs on mask tokens too, as BEiT's and SimMIM's does: slower and less accurate (paper, table 1c), for
    comparison."""

    def faults(self) -> Iterator[MaeDeployError]:
        if self.target_dim is not None and self.target == "pixels":
            yield ConfigError(f"--target-dim {self.target_dim} needs --target pca, not {self.target}")

    def width(self, encoder: EncoderConfig) -> int:
        """Numbers predicted for a patch."""
        if self.target == "pixels":
            return encoder.patch_dim
        if self.target == "pca":
            return self.target_dim or min(PCA_DIM, encoder.patch_dim)
        return self.target_dim or encoder.width


def check_objective(encoder: EncoderConfig, decoder: DecoderConfig, objective: ObjectiveConfig) -> None:
    """Whether there is such an autoencoder.

    Raises:
        ConfigError: names what does not go together.
    """
    if decoder.decoder_depth == 0 and not objective.encoder_mask_tokens:
        raise ConfigError(
            "--decoder-depth 0 leaves masked patches without a token",
            hint="pass --encoder-mask-tokens with it, as SimMIM does",
        )
    if objective.encoder_mask_tokens and encoder.pre_norm:
        raise ConfigError("--encoder-mask-tokens does not go with pre_norm", hint="leave one of the two out")
    if encoder.band_groups is not None and (objective.target != "pixels" or objective.encoder_mask_tokens):
        given = "--encoder-mask-tokens" if objective.encoder_mask_tokens else f"--target {objective.target}"
        raise ConfigError(f"--band-groups does not go with {given}", hint="leave one of the two out")
    if objective.target == "pca" and objective.width(encoder) > encoder.patch_dim:
        raise ConfigError(
            f"--target-dim {objective.target_dim} is more than the {encoder.patch_dim} numbers of a patch"
        )


SliceBlocks = Literal["even", "first"]
"""Which blocks of a larger encoder a slice takes: spread evenly from the first to the last, or the first ones."""
