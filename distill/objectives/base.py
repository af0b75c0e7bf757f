"""What every objective is: taps of the student and of the teacher to one scalar."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mae_deploy.models.masking import Masking
from mae_deploy.models.taps import Tap, Taps

Pairs = tuple[tuple[int, int], ...]
"""Blocks of the student and the teacher's blocks that they follow, counted from 1."""


@dataclass(frozen=True, slots=True)
class View:
    """What of a batch both networks answer for."""

    images: Tensor
    """`(B, C, H, W)`, normalised for the student."""
    labels: Tensor
    """`(B,)` int64; `UNLABELLED` where an image has none."""
    masking: Masking | None
    """The patches that the student sees; None: all, in their order."""


class Objective(nn.Module, ABC):
    """One term of the loss. What it trains beside the student, such as a projector, are its own parameters."""

    def __init__(self, student_taps: tuple[Tap, ...], teacher_taps: tuple[Tap, ...] = ()) -> None:
        super().__init__()
        self.student_taps = student_taps
        self.teacher_taps = teacher_taps

    @abstractmethod
    def forward(self, student: Taps, teacher: Taps, view: View) -> Tensor:
        """The loss, a float32 scalar. It has a gradient for the student's taps and for its own parameters, none for the
        teacher's taps.
        """


def full_precision(like: Tensor) -> torch.autocast:
    """A context on the tensor's device in which products are taken in the precision of their inputs, also within
    autocast.
    """
    return torch.autocast(like.device.type, enabled=False)
