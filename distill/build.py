"""From the settings to objectives: which have a weight, and which blocks of student and teacher they compare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mae_deploy.distill.config import LAST_BLOCK, Blocks, DistillConfig, RunKind, Schedule, block_pairs
from mae_deploy.distill.objectives.attention import AttentionMaps
from mae_deploy.distill.objectives.base import Objective, Pairs
from mae_deploy.distill.objectives.decoder_features import DecoderFeatures
from mae_deploy.distill.objectives.features import Features
from mae_deploy.distill.objectives.logits import DistLogits, HardLogits, Labels, SoftLogits
from mae_deploy.distill.objectives.pixels import Pixels
from mae_deploy.distill.objectives.pooled import Pooled, Vector
from mae_deploy.distill.objectives.relations import Relations
from mae_deploy.distill.quantization import Outliers
from mae_deploy.distill.teachers.base import Teacher
from mae_deploy.errors import ConfigError
from mae_deploy.models.mae import MaskedAutoencoder
from mae_deploy.models.quantization.training import Quantizer
from mae_deploy.models.vit import Encoder


@dataclass(frozen=True, slots=True)
class Weight:
    """An objective's weight: a number, and what it is multiplied by over the run."""

    value: float
    schedule: Schedule | None = None
    """Points (share of the run, factor) with straight lines between them, the first and last factor before and after;
    None: 1 throughout."""

    def at(self, done: float) -> float:
        """The weight where a share of the run's steps is done."""
        if self.schedule is None:
            return self.value
        shares, factors = zip(*self.schedule, strict=True)
        return self.value * float(np.interp(done, shares, factors))


def objective_weights(config: DistillConfig, kind: RunKind, *, masked: bool) -> dict[str, Weight]:
    """The objectives of a run by name, those with a weight above 0.

    Args:
        masked: whether the student always has patches to predict.

    Raises:
        ConfigError: none has a weight, or one has that there cannot be in this kind of run.
    """
    features, relation, decoder, pooled, logits = (
        config.features,
        config.relation,
        config.decoder_features,
        config.pooled,
        config.logits,
    )
    on_features = kind == "features"
    weights = {
        "feature": Weight(_given(features.feature_weight, on_features), features.feature_schedule),
        "relation": Weight(relation.relation_weight, relation.relation_schedule),
        "attention": Weight(relation.attention_weight, relation.attention_schedule),
        "decoder_feature": Weight(decoder.decoder_feature_weight, decoder.decoder_feature_schedule),
        "cls": Weight(pooled.cls_weight, pooled.cls_schedule),
        "pooled": Weight(pooled.pooled_weight, pooled.pooled_schedule),
        "pixel": Weight(_given(features.pixel_weight, on_features and masked), features.pixel_schedule),
        "logits": Weight(0.0 if on_features else logits.logits_weight, logits.logits_schedule),
        "label": Weight(0.0 if on_features else logits.label_weight, logits.label_schedule),
    }
    found = {name: weight for name, weight in weights.items() if weight.value > 0}
    if not found:
        raise ConfigError(
            "every objective has weight 0",
            hint="such as --feature-weight 1 or --pixel-weight 1" if on_features else "such as --logits-weight 1",
        )
    if config.edge.outlier_weight > 0:
        found["outlier"] = Weight(config.edge.outlier_weight, config.edge.outlier_schedule)
    for name in ("pixel", "decoder_feature"):
        flag = f"--{name.replace('_', '-')}-weight"
        if name in found and not on_features:
            raise ConfigError(
                f"{flag} needs the student's decoder, which a classifier has not", hint="use --objective features"
            )
        if name in found and not masked:
            raise ConfigError(
                f"{flag} needs masked patches to predict, and the student sees whole images",
                hint=f"pass {flag} 0, or hide some patches in every step",
            )
    return found


def build_objectives(
    weights: dict[str, Weight],
    config: DistillConfig,
    student: Encoder,
    teacher: Teacher,
    quantizer: Quantizer | None = None,
) -> dict[str, Objective]:
    """The objectives of these weights, in this order.

    Args:
        quantizer: what sees the inputs of the student's Linears, where outliers have a weight.

    Raises:
        ConfigError: a block that student or teacher has not, widths that need a projector, a teacher without blocks or
            without logits.
    """
    for name in ("feature", "relation", "attention"):
        if name in weights and teacher.depth == 0:
            raise ConfigError(
                f"--{name}-weight compares blocks, and the teacher is not a ViT",
                hint=f"pass --{name}-weight 0, and match --pooled-weight or logits",
            )
    objectives = {name: _BUILDERS[name](config, student, teacher) for name in weights if name != "outlier"}
    return (
        objectives
        if quantizer is None or "outlier" not in weights
        else objectives | {"outlier": Outliers(quantizer.penalty)}
    )


def resolve_block(block: int | None, depth: int, flag: str) -> int:
    """The block to tap, counted from 1; three quarters up by default (DMAE, section 3).

    Raises:
        ConfigError: there is no such block.
    """
    if block is None:
        return max(1, round(0.75 * depth))
    if not 1 <= block <= depth:
        raise ConfigError(f"{flag} {block} must be within 1 and {depth}")
    return block


def _given(weight: float | None, default: bool) -> float:
    return float(default) if weight is None else weight


def _pairs(written: Blocks | None, default: tuple[int, int], depths: tuple[int, int], flag: str) -> Pairs:
    pairs: list[tuple[int, int]] = []
    for pair in block_pairs(written, flag) or (default,):
        student_block, teacher_block = (
            depth if block == LAST_BLOCK else block for block, depth in zip(pair, depths, strict=True)
        )
        for block, depth, whose in ((student_block, depths[0], "student"), (teacher_block, depths[1], "teacher")):
            if not 1 <= block <= depth:
                raise ConfigError(f"{flag} {student_block}:{teacher_block}: the {whose}'s blocks are 1 to {depth}")
        pairs.append((student_block, teacher_block))
    return tuple(pairs)


def _features(config: DistillConfig, student: Encoder, teacher: Teacher) -> Objective:
    settings, depth = config.features, len(student.blocks)
    teacher_block = resolve_block(settings.teacher_block, teacher.depth, "--teacher-block")
    default = resolve_block(settings.student_block, depth, "--student-block"), teacher_block
    pairs = _pairs(settings.feature_blocks, default, (depth, teacher.depth), "--feature-blocks")
    return Features(
        pairs, student.config.width, teacher.width, loss=settings.feature_loss, projector_kind=settings.projector
    )


def _relations(config: DistillConfig, student: Encoder, teacher: Teacher) -> Objective:
    settings, depth = config.relation, len(student.blocks)
    default = depth, resolve_block(None, teacher.depth, "--relation-blocks")
    pairs = _pairs(settings.relation_blocks, default, (depth, teacher.depth), "--relation-blocks")
    return Relations(pairs, student.config.width, teacher.width, teacher.num_heads, kinds=settings.relations)


def _attention(config: DistillConfig, student: Encoder, teacher: Teacher) -> Objective:
    depths = len(student.blocks), teacher.depth
    return AttentionMaps(
        _pairs(config.relation.attention_blocks, depths, depths, "--attention-blocks"),
        student.config.heads,
        teacher.num_heads,
    )


def _decoder_features(config: DistillConfig, student: Encoder, teacher: Teacher) -> Objective:
    settings = config.decoder_features
    assert isinstance(student, MaskedAutoencoder)
    if teacher.decoder_depth == 0:
        raise ConfigError(
            "the teacher has no decoder",
            hint="take the pretrained autoencoder as --teacher, or --decoder-feature-weight 0",
        )
    depths = student.decoder_config.decoder_depth, teacher.decoder_depth
    ((student_block, teacher_block),) = _pairs(
        settings.decoder_blocks, (depths[0], -(-depths[1] // 2)), depths, "--decoder-blocks"
    )
    width = student.decoder_config.decoder_embed_dim
    return DecoderFeatures(
        student_block,
        teacher_block,
        width,
        teacher.decoder_width,
        loss=settings.decoder_feature_loss,
        patches=settings.decoder_feature_patches,
    )


def _vector(vector: Vector) -> Callable[[DistillConfig, Encoder, Teacher], Objective]:
    def build(config: DistillConfig, student: Encoder, teacher: Teacher) -> Objective:
        settings = config.pooled
        return Pooled(
            vector,
            student.config.width,
            teacher.width,
            loss=settings.pooled_loss,
            projector_kind=settings.pooled_projector,
        )

    return build


def _pixels(config: DistillConfig, student: Encoder, teacher: Teacher) -> Objective:
    assert isinstance(student, MaskedAutoencoder)
    return Pixels(student.forward_loss)


def _logits(config: DistillConfig, student: Encoder, teacher: Teacher) -> Objective:
    if teacher.num_classes is None:
        raise ConfigError(
            f"logits need a fine-tuned teacher, this one is a {teacher.kind}",
            hint="finetune it first, or use --objective features",
        )
    settings = config.logits
    if settings.logits_loss == "hard":
        return HardLogits()
    return (SoftLogits if settings.logits_loss == "kl" else DistLogits)(settings.temperature)


_BUILDERS: dict[str, Callable[[DistillConfig, Encoder, Teacher], Objective]] = {
    "feature": _features,
    "relation": _relations,
    "attention": _attention,
    "decoder_feature": _decoder_features,
    "cls": _vector("cls"),
    "pooled": _vector("pooled"),
    "pixel": _pixels,
    "logits": _logits,
    "label": lambda config, student, teacher: Labels(),
}
