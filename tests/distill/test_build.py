"""From settings to objectives: which have a weight in which kind of run, which blocks they compare, and what is
refused.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mae_deploy.distill.build import Weight, build_objectives, objective_weights, resolve_block
from mae_deploy.distill.config import (
    DecoderFeatureConfig,
    DistillConfig,
    EdgeConfig,
    FeatureObjectiveConfig,
    LogitsConfig,
    PooledConfig,
    RelationConfig,
    RunKind,
    TeacherConfig,
)
from mae_deploy.distill.objectives.logits import DistLogits, HardLogits, SoftLogits
from mae_deploy.distill.teachers.checkpoint_teacher import CheckpointTeacher
from mae_deploy.errors import ConfigError
from mae_deploy.models.mae import MaskedAutoencoder
from mae_deploy.models.taps import Tap
from mae_deploy.models.vit import Encoder
from mae_deploy.weights.load import LoadedWeights
from tests.models.tiny_models import DECODER, ENCODER, metadata_of, tiny_classifier, tiny_mae

STUDENT = replace(ENCODER, depth=4, embed_dim=12, num_heads=3)
TEACHER = replace(ENCODER, depth=8)


def distilling(**more: Any) -> DistillConfig:
    return DistillConfig(data=Path("data"), teacher=Path("teacher"), student="vit_nano_patch4", out=Path("out"), **more)


def weights(kind: RunKind, *, masked: bool = True, **more: Any) -> dict[str, float]:
    return {name: weight.value for name, weight in objective_weights(distilling(**more), kind, masked=masked).items()}


def teacher(model: Encoder | None = None) -> CheckpointTeacher:
    model = model or MaskedAutoencoder(TEACHER, replace(DECODER, decoder_depth=7, decoder_embed_dim=24))
    return CheckpointTeacher(LoadedWeights(metadata_of(model), model.state_dict(), {}), TeacherConfig())


def taps(name: str, **more: Any) -> tuple[tuple[Tap, ...], tuple[Tap, ...]]:
    student = MaskedAutoencoder(STUDENT, replace(DECODER, decoder_depth=2))
    objective = build_objectives({name: Weight(1.0)}, distilling(**more), student, teacher())[name]
    return objective.student_taps, objective.teacher_taps


# --- weights ---------------------------------------------------------------------------------------------------------


def test_the_weights_of_each_kind_of_run() -> None:
    assert weights("features") == {"feature": 1, "pixel": 1}
    assert weights("features", masked=False) == {"feature": 1}
    assert weights("logits", masked=False) == {"logits": 1, "label": 0.5}
    assert weights(
        "logits", features=FeatureObjectiveConfig(feature_weight=0.25), pooled=PooledConfig(cls_weight=3.0)
    ) == {
        "feature": 0.25,
        "cls": 3,
        "logits": 1,
        "label": 0.5,
    }
    more: dict[str, Any] = {
        "relation": RelationConfig(relation_weight=2.0, attention_weight=4.0),
        "decoder_features": DecoderFeatureConfig(decoder_feature_weight=5.0),
        "edge": EdgeConfig(outlier_weight=6.0),
    }
    assert weights("features", features=FeatureObjectiveConfig(feature_weight=0.0, pixel_weight=0.5), **more) == {
        "relation": 2,
        "attention": 4,
        "decoder_feature": 5,
        "pixel": 0.5,
        "outlier": 6,
    }


def test_a_weight_without_a_schedule_stays() -> None:
    assert [Weight(0.3).at(done) for done in (0.0, 0.5, 1.0)] == [0.3, 0.3, 0.3]


def test_straight_lines_between_points() -> None:
    weight = Weight(2.0, ((0.25, 1.0), (0.5, 3.0), (0.75, 0.0)))
    assert [weight.at(done) for done in (0.0, 0.25, 0.375, 0.5, 0.625, 0.75, 1.0)] == [2, 2, 4, 6, 3, 0, 0]


def test_schedules_go_with_their_weights() -> None:
    found = objective_weights(
        distilling(features=FeatureObjectiveConfig(pixel_schedule=((0, 1), (1, 0)))), "features", masked=True
    )
    assert [weight.at(0.5) for weight in found.values()] == [1, 0.5]


@pytest.mark.parametrize(
    ("kind", "masked", "more", "message"),
    [
        (
            "features",
            True,
            {"features": FeatureObjectiveConfig(feature_weight=0.0, pixel_weight=0.0)},
            "every objective has weight 0",
        ),
        (
            "logits",
            False,
            {"logits": LogitsConfig(logits_weight=0.0, label_weight=0.0)},
            "every objective has weight 0",
        ),
        (
            "features",
            False,
            {"features": FeatureObjectiveConfig(pixel_weight=1.0)},
            "--pixel-weight needs masked patches to predict",
        ),
        (
            "features",
            False,
            {"decoder_features": DecoderFeatureConfig(decoder_feature_weight=1.0)},
            "--decoder-feature-weight needs masked patches",
        ),
        (
            "logits",
            True,
            {"features": FeatureObjectiveConfig(pixel_weight=1.0)},
            "--pixel-weight needs the student's decoder, which a classifier has not",
        ),
    ],
)
def test_weights_that_cannot_be(kind: RunKind, masked: bool, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        weights(kind, masked=masked, **more)


# --- blocks ----------------------------------------------------------------------------------------------------------


def test_three_quarters_up_unless_told() -> None:
    assert [resolve_block(None, depth, "--teacher-block") for depth in (1, 2, 4, 12, 24)] == [1, 2, 3, 9, 18]
    assert resolve_block(2, 3, "--teacher-block") == 2
    for block in (0, 4):
        with pytest.raises(ConfigError, match=f"--teacher-block {block} must be within 1 and 3"):
            resolve_block(block, 3, "--teacher-block")


@pytest.mark.parametrize(
    ("name", "more", "own", "its"),
    [
        ("feature", {}, [Tap("tokens", 3)], [Tap("tokens", 6)]),
        (
            "feature",
            {"features": FeatureObjectiveConfig(student_block=1, teacher_block=8)},
            [Tap("tokens", 1)],
            [Tap("tokens", 8)],
        ),
        (
            "feature",
            {"features": FeatureObjectiveConfig(feature_blocks=("2:4", "4:8"))},
            [Tap("tokens", 2), Tap("tokens", 4)],
            [Tap("tokens", 4), Tap("tokens", 8)],
        ),
        ("relation", {}, [Tap("qkv", 4)], [Tap("qkv", 6)]),
        (
            "feature",
            {"features": FeatureObjectiveConfig(feature_blocks=("2:4", "last:last"))},
            [Tap("tokens", 2), Tap("tokens", 4)],
            [Tap("tokens", 4), Tap("tokens", 8)],
        ),
        ("relation", {"relation": RelationConfig(relation_blocks=("1:2",))}, [Tap("qkv", 1)], [Tap("qkv", 2)]),
        ("attention", {}, [Tap("qkv", 4)], [Tap("qkv", 8)]),
        ("decoder_feature", {}, [Tap("decoder", 2)], [Tap("decoder", 4)]),
        (
            "decoder_feature",
            {"decoder_features": DecoderFeatureConfig(decoder_blocks=("1:7",))},
            [Tap("decoder", 1)],
            [Tap("decoder", 7)],
        ),
        ("pooled", {}, [Tap("pooled")], [Tap("pooled")]),
        ("cls", {}, [Tap("cls")], [Tap("cls")]),
        ("pixel", {}, [Tap("pixels")], []),
    ],
)
def test_which_blocks_are_compared(name: str, more: dict[str, Any], own: list[Tap], its: list[Tap]) -> None:
    assert taps(name, **more) == (tuple(own), tuple(its))


@pytest.mark.parametrize(("loss", "objective"), [("kl", SoftLogits), ("hard", HardLogits), ("dist", DistLogits)])
def test_the_losses_of_logits(loss: Any, objective: type) -> None:
    config, expert = distilling(logits=LogitsConfig(logits_loss=loss, temperature=3.0)), teacher(tiny_classifier("avg"))
    found = build_objectives({"logits": Weight(1.0)}, config, tiny_classifier("avg"), expert)["logits"]
    assert type(found) is objective
    assert getattr(found, "temperature", 3.0) == 3.0


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        (
            "feature",
            {"features": FeatureObjectiveConfig(feature_blocks=("2:9",))},
            "--feature-blocks 2:9: the teacher's blocks are 1 to 8",
        ),
        (
            "feature",
            {"features": FeatureObjectiveConfig(feature_blocks=("5:1",))},
            "--feature-blocks 5:1: the student's blocks are 1 to 4",
        ),
        (
            "relation",
            {"relation": RelationConfig(relation_blocks=("0:1",))},
            "--relation-blocks 0:1: the student's blocks are 1 to 4",
        ),
        (
            "decoder_feature",
            {"decoder_features": DecoderFeatureConfig(decoder_blocks=("3:1",))},
            "--decoder-blocks 3:1: the student's blocks are 1 to 2",
        ),
        (
            "feature",
            {"features": FeatureObjectiveConfig(projector="none")},
            "without a projector the student's width 12 would have to be the teacher's 20",
        ),
        ("logits", {}, "logits need a fine-tuned teacher, this one is a mae"),
    ],
)
def test_objectives_that_cannot_be(name: str, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        taps(name, **more)


def test_blocks_are_those_of_a_vit() -> None:
    no_vit = teacher()
    no_vit.depth = 0  # as of timm's other networks
    for name in ("feature", "relation", "attention"):
        with pytest.raises(ConfigError, match=f"--{name}-weight compares blocks, and the teacher is not a ViT"):
            build_objectives({name: Weight(1.0)}, distilling(), tiny_mae(), no_vit)


def test_decoder_features_need_a_teacher_with_a_decoder() -> None:
    with pytest.raises(ConfigError, match="the teacher has no decoder"):
        build_objectives({"decoder_feature": Weight(1.0)}, distilling(), tiny_mae(), teacher(tiny_classifier("avg")))
