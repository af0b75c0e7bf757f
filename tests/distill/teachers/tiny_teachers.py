"""Teachers of a few numbers, ready for a batch of any student."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import TypeVar

import torch

from mae_deploy.distill.config import TeacherConfig
from mae_deploy.distill.teachers.base import Teacher
from mae_deploy.distill.teachers.checkpoint_teacher import CheckpointTeacher
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.models.config import EncoderConfig
from mae_deploy.models.masking import Masking, random_masking
from mae_deploy.models.taps import Tap
from mae_deploy.models.vit import Encoder
from mae_deploy.training.step import StepBatch
from mae_deploy.weights.load import LoadedWeights
from tests.models.tiny_models import ENCODER, metadata_of, random_tensor

T = TypeVar("T", bound=Teacher)

DEEP = replace(ENCODER, depth=3)
FP32 = TeacherConfig(teacher_precision="fp32")


def own_teacher(model: Encoder, settings: TeacherConfig = FP32) -> CheckpointTeacher:
    return CheckpointTeacher(LoadedWeights(metadata_of(model), model.state_dict(), {"sha256": "ab"}), settings)


def ready(
    teacher: T, wanted: Collection[Tap], *, student: EncoderConfig = ENCODER, spec: Preprocess | None = None
) -> T:
    """Watched and on the CPU; the batches are normalised as the teacher has it."""
    teacher.watch(wanted, student=student, spec=spec or replace(teacher.preprocess, image_size=student.image_size))
    teacher.to(torch.device("cpu"))
    return teacher


def batch_of(student: EncoderConfig = ENCODER, batch: int = 3) -> StepBatch:
    return StepBatch(random_tensor(batch, 3, *student.image_size), torch.zeros(batch, dtype=torch.int64))


def masking_of(student: EncoderConfig = ENCODER, mask_ratio: float = 0.7, batch: int = 3) -> Masking:
    return random_masking(
        torch.rand(batch, student.num_patches, generator=torch.Generator().manual_seed(4)), mask_ratio
    )
