"""The student's shape, a preset or one of your own, and what it starts from: random weights, a checkpoint of that
shape, or layers, heads and channels of its teacher.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from mae_deploy.config import from_dict
from mae_deploy.distill.config import FROM_TEACHER, DistillConfig
from mae_deploy.errors import ConfigError
from mae_deploy.models.config import EncoderConfig
from mae_deploy.models.vit import Encoder
from mae_deploy.progress import notice
from mae_deploy.weights.load import LoadedWeights, read_weights, start_from
from mae_deploy.weights.slicing import start_from_slice

E = TypeVar("E", bound=Encoder)

HEAD_DIM = 64
"""The head width of the ViT family, which TensorRT fuses into one kernel in INT8."""


def student_encoder(config: DistillConfig, *, image_size: tuple[int, int], in_chans: int) -> EncoderConfig:
    """The encoder that is asked for.

    Args:
        image_size: the teacher's, where none is asked for.

    Raises:
        ConfigError: there is no such encoder.
    """
    patch = {"patch_size": config.patch_size} if config.patch_size is not None else {}
    given = {"name": config.student, "image_size": config.image_size or image_size, "in_chans": in_chans, **patch}
    encoder, shape = from_dict(EncoderConfig, given), config.shape
    asked = (
        shape.student_width or encoder.width,
        shape.student_depth or encoder.blocks,
        shape.student_heads or _heads(encoder, shape.student_width),
    )
    if asked != (encoder.width, encoder.blocks, encoder.heads):
        width, depth, heads = asked
        encoder = replace(
            encoder,
            name=f"vit_{width}x{depth}_heads{heads}_patch{encoder.patch}",
            embed_dim=width,
            depth=depth,
            num_heads=heads,
        )
    if encoder.width != encoder.heads * HEAD_DIM:
        notice(
            f"heads of {encoder.width // encoder.heads}:",
            f"TensorRT fuses attention in INT8 for heads of {HEAD_DIM}, such as {_nearest(encoder)}",
        )
    return encoder


def _heads(encoder: EncoderConfig, width: int | None) -> int:
    """Those of the model; of another width one for every 64, or as nearly as the width can be divided."""
    if width is None or width == encoder.width:
        return encoder.heads
    return min(
        (heads for heads in range(1, width + 1) if width % heads == 0),
        key=lambda heads: (abs(width / heads - HEAD_DIM), heads),
    )


def _nearest(encoder: EncoderConfig) -> str:
    heads = max(1, round(encoder.width / HEAD_DIM))
    return f"--student-width {heads * HEAD_DIM} --student-heads {heads}"


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
