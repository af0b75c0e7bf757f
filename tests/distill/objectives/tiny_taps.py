"""Taps of a student and of a wider teacher with more heads, on six patches of which two are visible; all sizes
differ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mae_deploy.data.sources.base import UNLABELLED
from mae_deploy.distill.objectives.attention import AttentionMaps
from mae_deploy.distill.objectives.base import Objective, View
from mae_deploy.distill.objectives.decoder_features import DecoderFeatures
from mae_deploy.distill.objectives.features import Features
from mae_deploy.distill.objectives.logits import DistLogits, HardLogits, Labels, SoftLogits
from mae_deploy.distill.objectives.pixels import Pixels
from mae_deploy.distill.objectives.pooled import Pooled
from mae_deploy.distill.objectives.relations import Relations
from mae_deploy.models.masking import Masking, random_masking
from mae_deploy.models.taps import Tap, Taps
from tests.models.tiny_models import random_tensor, tiny_mae

B, N, K, CLASSES = 3, 15, 4, 7
STUDENT = {"tokens": 12, "decoder": 6, "heads": 3, "head_dim": 4}
TEACHER = {"tokens": 20, "decoder": 10, "heads": 5, "head_dim": 4}
PAIRS = ((2, 3), (4, 6))


def masking() -> Masking:
    return random_masking(torch.rand(B, N, generator=torch.Generator().manual_seed(7)), 1 - K / N)


def view(*, labels: list[int] | None = None) -> View:
    return View(random_tensor(B, 3, 6, 10, seed=8), torch.tensor(labels or [1, UNLABELLED, 3]), masking())


def tap_tensor(tap: Tap, sizes: dict[str, int], seed: int) -> Tensor:
    shapes: dict[str, tuple[int, ...]] = {
        "tokens": (B, 1 + K, sizes["tokens"]),
        "qkv": (B, 3, sizes["heads"], 1 + K, sizes["head_dim"]),
        "decoder": (B, N, sizes["decoder"]),
        "pixels": (B, N, 12),
        "cls": (B, sizes["tokens"]),
        "pooled": (B, sizes["tokens"]),
        "logits": (B, CLASSES),
    }
    return random_tensor(*shapes[tap.kind], seed=seed + tap.block)


def taps_of(objective: Objective) -> tuple[Taps, Taps]:
    """Random taps of both, as the objective wants them."""
    student = {tap: tap_tensor(tap, STUDENT, 100) for tap in objective.student_taps}
    return student, {tap: tap_tensor(tap, TEACHER, 200) for tap in objective.teacher_taps}


def every_objective() -> dict[str, Objective]:
    """One of each, for the taps above."""
    torch.manual_seed(0)
    return {
        "features": Features(PAIRS, 12, 20),
        "features-mlp": Features(PAIRS, 12, 20, loss="cosine", projector_kind="mlp"),
        "decoder_features": DecoderFeatures(1, 2, 6, 10),
        "relations": Relations(PAIRS, 12, 20, 5, kinds=("qk", "vv", "qq", "kk")),
        "attention": AttentionMaps(PAIRS, 3, 5),
        "cls": Pooled("cls", 12, 20),
        "pooled": Pooled("pooled", 12, 20, loss="mse"),
        "soft_logits": SoftLogits(2.0),
        "hard_logits": HardLogits(),
        "dist_logits": DistLogits(2.0),
        "labels": Labels(),
        "pixels": Pixels(tiny_mae().forward_loss),
    }
