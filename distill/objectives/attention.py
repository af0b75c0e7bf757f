"""Attention maps: each token of the student is to look where the teacher's looks.

Gao et al., An Experimental Study on Exploring Strong Lightweight Vision Transformers via Masked Image Modeling
Pre-Training (MAE-Lite, D-MAE): https://arxiv.org/abs/2404.12210, first as Wang et al., A Closer Look at Self-Supervised
Lightweight Vision Transformers: https://arxiv.org/abs/2205.14443
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mae_deploy.distill.objectives.base import Objective, Pairs, View, full_precision
from mae_deploy.models.taps import Tap, Taps


class AttentionMaps(Objective):
    """The mean squared error of softmaxed attention maps, the mean over pairs of blocks; where the numbers of heads
    differ, behind a 1x1 convolution.
    """

    def __init__(self, pairs: Pairs, student_heads: int, teacher_heads: int) -> None:
        super().__init__(
            tuple(Tap("qkv", student_block) for student_block, _ in pairs),
            tuple(Tap("qkv", teacher_block) for _, teacher_block in pairs),
        )
        same = student_heads == teacher_heads
        self.adapters = nn.ModuleList(
            nn.Identity() if same else nn.Conv2d(student_heads, teacher_heads, 1, bias=False) for _ in pairs
        )

    def forward(self, student: Taps, teacher: Taps, view: View) -> Tensor:
        """`(B, 3, heads, 1 + K, head_dim)` of both to a scalar."""
        each = zip(self.adapters, self.student_taps, self.teacher_taps, strict=True)
        with full_precision(view.images):
            return torch.stack(
                [
                    F.mse_loss(adapt(_attention(student[student_tap])), _attention(teacher[teacher_tap].detach()))
                    for adapt, student_tap, teacher_tap in each
                ]
            ).mean()


def _attention(qkv: Tensor) -> Tensor:
    """`(B, 3, heads, T, head_dim) -> (B, heads, T, T)`."""
    q, k = qkv[:, 0].float(), qkv[:, 1].float()
    return (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(dim=-1)
