"""What a student starts from: random weights, a checkpoint of its own shape, or layers, heads and channels of its
teacher.
"""

from __future__ import annotations

from typing import TypeVar

from mae_deploy.distill.config import FROM_TEACHER, DistillConfig
from mae_deploy.errors import ConfigError
from mae_deploy.models.vit import Encoder
from mae_deploy.weights.load import LoadedWeights, read_weights, start_from
from mae_deploy.weights.slicing import start_from_slice

E = TypeVar("E", bound=Encoder)


def read_start(config: DistillConfig) -> LoadedWeights | None:
    """The weights that the student starts from; None: random ones.

    Raises:
        ConfigError: nothing is there, or the teacher is a bundle or has no weights of an encoder that is known here.
        CheckFailed: damaged, unsafe or not a MAE encoder.
    """
    if config.init != FROM_TEACHER:
        return None if config.init is None else read_weights(config.init)
    weights = config.teaching.teacher_weights or config.teacher
    if not weights.exists() or (weights / "manifest.json").exists():
        raise ConfigError(
            f"--init teacher needs a teacher with weights, and {weights} has none",
            hint="take the checkpoint that it was made of",
        )
    return read_weights(weights)


def start(student: E, config: DistillConfig, weights: LoadedWeights | None) -> E:
    """Put the weights into the student.

    Raises:
        ConfigError: the student is not a slice of its teacher, or differs from the checkpoint in more than image size.
    """
    if weights is None:
        return student
    return (
        start_from_slice(student, weights, blocks=config.shape.init_blocks)
        if config.init == FROM_TEACHER
        else start_from(student, weights)
    )
