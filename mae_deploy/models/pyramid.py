"""ViTDet's simple feature pyramid: four maps for a detector from a plain ViT's last one.

Li et al. 2022, "Exploring Plain Vision Transformer Backbones for Object Detection" (https://arxiv.org/abs/2203.16527),
section 3. State-dict names, initialisation and arithmetic are those of Detectron2's `SimpleFeaturePyramid` with
`norm="LN"`. Shapes: B images, D width, H' x W' patches, E output channels.
"""

from __future__ import annotations

from timm.layers import LayerNorm2d
from torch import Tensor, nn

from mae_deploy.errors import ConfigError

LEVELS = ("p2", "p3", "p4", "p5")
"""Names of the maps, fine to coarse. For patches of 16 pixels their strides are 4, 8, 16 and 32 (two to the power of
the digit)."""

OUT_CHANNELS = 256


class NormedConv(nn.Conv2d):
    """A convolution without bias that keeps height and width, then LayerNorm over the channels of each pixel."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = LayerNorm2d(out_channels, eps=1e-6)

    def forward(self, input: Tensor) -> Tensor:
        """`(B, C, H, W) -> (B, E, H, W)`."""
        return self.norm(super().forward(input))  # type: ignore[no-any-return]


class SimpleFeaturePyramid(nn.Module):
    """Scales one feature map by 4, 2, 1 and 1/2, and takes each to the same number of channels."""

    def __init__(self, width: int, out_channels: int = OUT_CHANNELS) -> None:
        super().__init__()
        self.out_channels = out_channels
        half, quarter = width // 2, width // 4
        self.simfp_2 = nn.Sequential(
            _double(width, half),
            LayerNorm2d(half, eps=1e-6),
            nn.GELU(),
            _double(half, quarter),
            *_project(quarter, out_channels),
        )
        self.simfp_3 = nn.Sequential(_double(width, half), *_project(half, out_channels))
        self.simfp_4 = nn.Sequential(*_project(width, out_channels))
        self.simfp_5 = nn.Sequential(nn.MaxPool2d(kernel_size=2, stride=2), *_project(width, out_channels))

    def forward(self, feature_map: Tensor) -> dict[str, Tensor]:
        """The maps by name, p2 first: `(B, D, H', W') -> (B, E, ...)`, of the sizes that `pyramid_sizes` gives.

        Args:
            feature_map: the last block's patch tokens. ViTDet's encoder has no final norm: its pyramid is trained on
                what comes before ours.
        """
        return {
            "p2": self.simfp_2(feature_map),
            "p3": self.simfp_3(feature_map),
            "p4": self.simfp_4(feature_map),
            "p5": self.simfp_5(feature_map),
        }


def pyramid_sizes(grid_size: tuple[int, int]) -> dict[str, tuple[int, int]]:
    """Height and width of each map above a grid of patches; of an odd grid, p5 leaves the last row or column out.

    Raises:
        ConfigError: a grid of one row or column, which has no half.
    """
    rows, columns = grid_size
    if min(grid_size) < 2:
        raise ConfigError(
            f"a feature pyramid needs at least 2x2 patches, the image has {rows}x{columns}",
            hint="take a larger --image-size",
        )
    return {
        "p2": (4 * rows, 4 * columns),
        "p3": (2 * rows, 2 * columns),
        "p4": (rows, columns),
        "p5": (rows // 2, columns // 2),
    }


def _double(in_channels: int, out_channels: int) -> nn.Module:
    """Twice the height and width."""
    return nn.ConvTranspose2d(in_channels, out_channels, kernel_size=2, stride=2)


def _project(in_channels: int, out_channels: int) -> tuple[nn.Module, nn.Module]:
    """To the channels of the output."""
    return NormedConv(in_channels, out_channels, 1), NormedConv(out_channels, out_channels, 3)
