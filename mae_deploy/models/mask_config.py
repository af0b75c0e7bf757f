"""Settings of masking: shares of the patches, how they are drawn, and what does not go together."""

from __future__ import annotations

from typing import Literal

from mae_deploy.errors import ConfigError


def check_shares(keep_ratio: tuple[float, ...] | None) -> None:
    """Whether there are shares of the patches, each above 0 and at most 1 as the field's bounds say.

    Raises:
        ConfigError: there is none.
    """
    if keep_ratio == ():
        raise ConfigError("--keep-ratio '' must be at least one share", hint="such as 1,0.5,0.25")


MaskSampling = Literal["random", "block", "grid"]


GroupMasking = Literal["independent", "consistent"]


GRID_MASK_RATIO = 0.75
"""The only ratio of grid masking: one of every four patches stays."""


BLOCK_MIN_GRID = 4
"""The least number of patches down and across for block-wise masking."""


def keep_count(num_patches: int, keep_ratio: float, *, least: int = 1) -> int:
    """Number of patches that a share of them is; truncates in floating point exactly as the original implementation
    does.
    """
    return max(least, int(num_patches * keep_ratio))


def check_keep_ratio(keep_ratio: tuple[float, float] | None, flag: str = "--keep-ratio") -> None:
    """Whether the least and the largest share of the patches are shares, in this order.

    Raises:
        ConfigError: they are not.
    """
    if keep_ratio is not None and not 0 < keep_ratio[0] <= keep_ratio[1] <= 1:
        raise ConfigError(
            f"{flag} {keep_ratio[0]:g},{keep_ratio[1]:g} is not LOW,HIGH, above 0 and at most 1",
            hint="such as 0.15,1, or one share",
        )


def mask_unit(mask_patch_size: int | None, patch_size: int) -> int:
    """Side, in patches, of the squares that are masked as a whole.

    Raises:
        ConfigError: not a multiple of the patch size.
    """
    if mask_patch_size is None:
        return 1
    if mask_patch_size < 1 or mask_patch_size % patch_size:
        raise ConfigError(f"--mask-patch-size {mask_patch_size} is not a multiple of the patch size, {patch_size}")
    return mask_patch_size // patch_size


def check_masking(kind: MaskSampling, mask_ratio: float, grid_size: tuple[int, int], *, unit: int = 1) -> None:
    """Whether there is such a masking of this grid, with something to see and something to predict.

    Raises:
        ConfigError: names the setting and its value.
    """
    rows, columns = grid_size
    if not 0 < mask_ratio < 1:
        raise ConfigError(f"--mask-ratio must be above 0 and below 1, got {mask_ratio:g}")
    if kind != "random" and unit != 1:
        raise ConfigError(f"--mask-patch-size of {unit} patches goes with --mask-sampling random, not {kind}")
    if rows % unit or columns % unit:
        raise ConfigError(f"--mask-patch-size of {unit} patches does not divide a grid of {rows}x{columns} patches")
    if kind == "grid" and mask_ratio != GRID_MASK_RATIO:
        raise ConfigError(
            f"--mask-sampling grid keeps one of every four patches, not --mask-ratio {mask_ratio:g}",
            hint="use --mask-ratio 0.75",
        )
    if kind == "grid" and (rows % 2 or columns % 2):
        raise ConfigError(f"--mask-sampling grid needs an even number of patches down and across, not {rows}x{columns}")
    if kind == "block" and min(grid_size) < BLOCK_MIN_GRID:
        raise ConfigError(
            f"--mask-sampling block needs at least {BLOCK_MIN_GRID}x{BLOCK_MIN_GRID} patches, not {rows}x{columns}"
        )
    squares = rows * columns // unit**2
    if keep_count(squares, 1 - mask_ratio, least=0) in (0, squares):
        what = "patches" if unit == 1 else f"squares of {unit}x{unit} patches"
        raise ConfigError(
            f"--mask-ratio {mask_ratio} of {squares} {what} leaves nothing to see or nothing to predict",
            hint="use a smaller --patch-size or another --mask-ratio",
        )
