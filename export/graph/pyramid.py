"""ViTDet's simple feature pyramid as ONNX nodes, on top of an encoder's feature map.

Its module stands in models/pyramid.py. FP32 whatever the precision of the blocks: detectors regress coordinates from
these maps. Shapes: B images, D width, H' x W' patches, E output channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mae_deploy.export.graph.blocks import BlockWriter
from mae_deploy.export.graph.builder import Dim, GraphBuilder
from mae_deploy.export.graph.precision import FLOAT32, Arithmetic
from mae_deploy.images.read import Array
from mae_deploy.models.pyramid import LEVELS, pyramid_sizes


def write_pyramid(
    builder: GraphBuilder,
    feature_map: str,
    weights: Mapping[str, Array],
    grid_size: tuple[int, int],
    batch: Dim,
    levels: Sequence[str] = LEVELS,
) -> dict[str, tuple[str, list[Dim]]]:
    """Add the nodes of the levels asked for; returns each level's value and its shape `(B, E, height, width)`.

    Args:
        feature_map: a value of shape `(B, D, H', W')`, of any float type: the last block's patch tokens before the
            final norm.
        weights: float32 arrays by the state-dict names of `SimpleFeaturePyramid`; others among them are left alone.

    Raises:
        ConfigError: a grid of one row or column.
    """
    sizes = pyramid_sizes(grid_size)
    writer = _PyramidWriter(builder, weights)
    feature_map = builder.cast(feature_map, FLOAT32)
    E = weights["simfp_4.0.weight"].shape[0]
    return {level: (writer.level(level, feature_map), [batch, E, *sizes[level]]) for level in levels}


class _PyramidWriter:
    """Writes levels; values are named by the state dict's names."""

    def __init__(self, builder: GraphBuilder, weights: Mapping[str, Array]) -> None:
        self.builder = builder
        self.weights = weights
        self.blocks = BlockWriter(builder, weights, Arithmetic())

    def level(self, level: str, value: str) -> str:
        """Scale the feature map, then two convolutions: `(B, D, H', W') -> (B, E, height, width)`."""
        name = f"simfp_{level[1:]}"
        if level == "p2":
            value = self.blocks.gelu(self._layer_norm(self._double(value, f"{name}.0"), f"{name}.1"), f"{name}.2")
            value = self._double(value, f"{name}.3")
        elif level == "p3":
            value = self._double(value, f"{name}.0")
        elif level == "p5":
            value = self.builder.node("MaxPool", [value], f"{name}.0/MaxPool", kernel_shape=[2, 2], strides=[2, 2])
        first = {"p2": 4, "p3": 1, "p4": 0, "p5": 1}[level]
        return self._normed_conv(self._normed_conv(value, f"{name}.{first}"), f"{name}.{first + 1}")

    def _double(self, value: str, name: str) -> str:
        """Twice the height and width."""
        b = self.builder
        constants = [b.weight(f"{name}.{part}", self.weights[f"{name}.{part}"]) for part in ("weight", "bias")]
        return b.node(
            "ConvTranspose", [value, *constants], f"{name}/ConvTranspose", kernel_shape=[2, 2], strides=[2, 2]
        )

    def _normed_conv(self, value: str, name: str) -> str:
        """A convolution that keeps height and width, then its norm."""
        b = self.builder
        kernel = self.weights[f"{name}.weight"]
        side = kernel.shape[-1]
        value = b.node(
            "Conv",
            [value, b.weight(f"{name}.weight", kernel)],
            f"{name}/Conv",
            kernel_shape=[side, side],
            pads=[side // 2] * 4,
        )
        return self._layer_norm(value, f"{name}.norm")

    def _layer_norm(self, value: str, name: str) -> str:
        """Over the channels of each pixel, which stand last only for that."""
        b = self.builder
        value = b.node("Transpose", [value], f"{name}/channels_last", perm=[0, 2, 3, 1])
        return b.node("Transpose", [self.blocks.layer_norm(value, name)], f"{name}/channels_first", perm=[0, 3, 1, 2])
