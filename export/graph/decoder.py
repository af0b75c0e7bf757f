"""The MAE decoder as ONNX nodes: every patch's pixels from the tokens of the visible ones.

Shapes: B images, P patch side, C channels, N patches, T = 1 + K tokens, D width of the encoder.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mae_deploy.export.graph.blocks import BlockWriter
from mae_deploy.export.graph.builder import GraphBuilder
from mae_deploy.export.graph.precision import FLOAT32
from mae_deploy.export.graph.spec import Pixels
from mae_deploy.images.read import Array
from mae_deploy.models.config import DecoderConfig

_PIXEL_EPSILON = 1e-6
"""Added to a patch's variance, as in the original's loss."""


def write_decoder(writer: BlockWriter, decoder: DecoderConfig, latent: str, place: Callable[[str], str]) -> str:
    """What the decoder predicts for every patch: FP32 `(B, T, D) -> (B, N, P * P * C)`.

    Args:
        writer: of blocks on all N patches.
        place: puts the visible tokens at their rows of the position table, zeros elsewhere:
            `(B, T, d) -> (B, 1 + N, d)`.
    """
    b, weights = writer.builder, writer.weights
    # A visible token's row is x + position, all others are mask_token + position: so (x - mask_token) is placed,
    # and the table has the rest.
    mask_token = weights["mask_token"][0, 0]
    visible = writer.fp32_linear(latent, "decoder_embed", bias=weights["decoder_embed.bias"] - mask_token)
    table = b.weight("decoder_table", weights["decoder_pos_embed"][0] + mask_token)
    tokens = b.cast(b.node("Add", [place(visible), table], "decoder/tokens"), writer.arithmetic.of("residual"))
    rows = writer.rows(tokens, decoder.decoder_embed_dim, "decoder_blocks/rows")
    for index in range(decoder.decoder_depth):
        rows = writer.block(rows, f"decoder_blocks.{index}", decoder.heads)
    # Tokens before the norm: OpenVINO 2026.4 moves a norm's scale through a Reshape behind it, and fails where the
    # graph has Q/DQ.
    tokens = writer.tokens(rows, decoder.decoder_embed_dim, "decoder/rows")
    tokens = writer.layer_norm(tokens, "decoder_norm", dtype=FLOAT32)
    return writer.fp32_linear(b.without_first(tokens, 1, "decoder/patches"), "decoder_pred")


class PixelWriter:
    """From the decoder's prediction to the pixels asked for.

    Args:
        mean, std: of the images, for each value of a patch, `(P * P * C,)`.
        uint8: the patches are 0 to 255, not normalised.
        norm_pix_loss: the prediction is of patches normalised by their own mean and variance (paper, section 3).
    """

    def __init__(self, builder: GraphBuilder, mean: Array, std: Array, *, uint8: bool, norm_pix_loss: bool) -> None:
        self.builder = builder
        self.uint8, self.norm_pix_loss = uint8, norm_pix_loss
        self._mean, self._std = mean, std

    def write(self, predicted: str, patches: str, space: Pixels) -> str:
        """Pixels in the space asked for; each patch's mean and variance are those of the input image:
        two of FP32 `(B, N, P * P * C)` to one.
        """
        if space == "target":
            return predicted
        b = self.builder
        mean, std = (
            b.weight(f"pixels/{name}", values.astype(np.float32))
            for name, values in (("mean", self._mean), ("std", self._std))
        )
        if self.norm_pix_loss:
            if self.uint8:
                patches = b.node("Div", [patches, b.scalar(255.0)], "pixels/unit")
                patches = b.node("Div", [b.node("Sub", [patches, mean], "pixels/shifted"), std], "pixels/normalised")
            predicted = self._restored(predicted, patches)
        if space == "image":
            predicted = b.node("Add", [b.node("Mul", [predicted, std], "pixels/contrast"), mean], "pixels/image")
        return predicted

    def _restored(self, pixels: str, patches: str) -> str:
        """`x * sqrt(var + 1e-6) + mean`, with the variance of n - 1, as torch takes it."""
        b, n = self.builder, len(self._mean)
        centre = b.mean(patches, 2, "pixels/centre", keepdims=True)
        away = b.node("Sub", [patches, centre], "pixels/away")
        spread = b.mean(b.node("Mul", [away, away], "pixels/squares"), 2, "pixels/spread", keepdims=True)
        variance = b.node("Mul", [spread, b.scalar(n / (n - 1))], "pixels/variance")
        floored = b.node("Add", [variance, b.scalar(_PIXEL_EPSILON)], "pixels/floored")
        deviation = b.node("Sqrt", [floored], "pixels/deviation")
        return b.node("Add", [b.node("Mul", [pixels, deviation], "pixels/scaled"), centre], "pixels/restored")
