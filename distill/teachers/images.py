"""The student's batch as the teacher was trained to see it: its own mean and deviation, and its own size."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mae_deploy.errors import ConfigError
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.weights.frozen import resize_images


class TeacherImages(nn.Module):
    """Normalised images in one specification to those in another; where the two have the same statistics, images of the
    right size are not touched.

    Raises:
        ConfigError: other channels.
    """

    def __init__(self, given: Preprocess, asked: Preprocess, image_size: tuple[int, int]) -> None:
        super().__init__()
        if given.channels != asked.channels:
            raise ConfigError(
                f"the teacher reads {asked.channels} channels, the student {given.channels}",
                hint="give the student the teacher's channels",
            )
        self.image_size = image_size
        # x = (p / divisor - mean) / std on both sides, for the same pixels p.
        factor = given.divisor / asked.divisor
        mean, std, own_mean, own_std = (
            torch.tensor(values, dtype=torch.float64) for values in (given.mean, given.std, asked.mean, asked.std)
        )
        self.same = (given.mean, given.std, factor) == (asked.mean, asked.std, 1)
        self.scale: Tensor
        self.shift: Tensor
        self.register_buffer("scale", (std * factor / own_std).float().view(-1, 1, 1))
        self.register_buffer("shift", ((mean * factor - own_mean) / own_std).float().view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """`(B, C, H, W) -> (B, C, *image_size)`."""
        return resize_images(images if self.same else images * self.scale + self.shift, self.image_size)
