"""Attention relations: how the student's queries, keys and values relate to one another, token by token, is to be how
the teacher's do.

Ren et al., TinyMIM: An Empirical Study of Distilling MIM Pre-trained Models: https://arxiv.org/abs/2301.01296
Relation heads: Wang et al., MiniLMv2: https://arxiv.org/abs/2012.15828
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from mae_deploy.distill.objectives.base import Objective, Pairs, View, full_precision
from mae_deploy.models.taps import Tap, Taps

Relation = Literal["qk", "vv", "qq", "kk"]


class Relations(Objective):
    """KL divergence of softmaxed relations, the mean over images, heads, tokens and pairs of blocks, summed over the
    kinds of relations.

    Relations are compared head by head, and the student may have other heads than the teacher. Queries, keys and values
    of all heads stand side by side in their D channels; on both sides these are cut anew into the same number of
    relation heads (`relation_heads`). TinyMIM gives the student's last block the teacher's number of heads instead,
    which is a different student.
    """

    def __init__(
        self,
        pairs: Pairs,
        student_dim: int,
        teacher_dim: int,
        teacher_heads: int,
        *,
        kinds: tuple[Relation, ...] = ("qk", "vv"),
    ) -> None:
        super().__init__(
            tuple(Tap("qkv", student_block) for student_block, _ in pairs),
            tuple(Tap("qkv", teacher_block) for _, teacher_block in pairs),
        )
        self.kinds = kinds
        self.num_heads = relation_heads(student_dim, teacher_dim, teacher_heads)

    def forward(self, student: Taps, teacher: Taps, view: View) -> Tensor:
        """`(B, 3, heads, 1 + K, head_dim)` of both to a scalar."""
        each = zip(self.student_taps, self.teacher_taps, strict=True)
        return torch.stack(
            [self._divergence(student[student_tap], teacher[teacher_tap].detach()) for student_tap, teacher_tap in each]
        ).mean()

    def _divergence(self, student_qkv: Tensor, teacher_qkv: Tensor) -> Tensor:
        with full_precision(student_qkv):
            terms = [
                _kl(
                    relation(teacher_qkv.float(), kind, self.num_heads),
                    relation(student_qkv.float(), kind, self.num_heads),
                )
                for kind in self.kinds
            ]
        return torch.stack(terms).sum()


def relation_heads(student_dim: int, teacher_dim: int, teacher_heads: int) -> int:
    """The teacher's number of heads where it divides both widths, else the next lower number that does."""
    return next(heads for heads in range(teacher_heads, 0, -1) if student_dim % heads == 0 and teacher_dim % heads == 0)


def relation(qkv: Tensor, kind: Relation, num_heads: int) -> Tensor:
    """Scaled products of two of queries, keys and values before the softmax:
    `(B, 3, heads, T, head_dim) -> (B, num_heads, T, T)`.
    """
    first, second = (_cut(qkv[:, "qkv".index(letter)], num_heads) for letter in kind)
    return first @ second.transpose(-2, -1) / math.sqrt(first.shape[-1])


def _cut(vectors: Tensor, num_heads: int) -> Tensor:
    """`(B, heads, T, head_dim) -> (B, num_heads, T, D / num_heads)`."""
    B, _, T, _ = vectors.shape
    return vectors.transpose(1, 2).reshape(B, T, num_heads, -1).transpose(1, 2)


def _kl(teacher: Tensor, student: Tensor) -> Tensor:
    """The mean over all rows of KL(teacher || student) of their softmax over the last axis."""
    return (
        F.kl_div(F.log_softmax(student, dim=-1), F.log_softmax(teacher, dim=-1), reduction="none", log_target=True)
        .sum(dim=-1)
        .mean()
    )
