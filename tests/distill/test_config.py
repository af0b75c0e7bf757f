"""Schedules and pairs of blocks as recipes and options give them."""

from __future__ import annotations

import pytest

from mae_deploy.config import from_dict
from mae_deploy.distill.config import (
    DecoderFeatureConfig,
    FeatureObjectiveConfig,
    PooledConfig,
    RelationConfig,
    block_pairs,
)
from mae_deploy.errors import ConfigError


def test_schedules_come_from_recipes() -> None:
    config = from_dict(FeatureObjectiveConfig, {"pixel_schedule": [[0, 1], [0.5, 0]]})
    assert config.pixel_schedule == ((0, 1), (0.5, 0))


@pytest.mark.parametrize(
    "points", [[], [[0.5, 1], [0.5, 2]], [[0.5, 1], [0.2, 1]], [[-0.1, 1]], [[0, 1], [1.1, 1]], [[0, -1]]]
)
def test_what_is_no_schedule(points: list[list[float]]) -> None:
    with pytest.raises(ConfigError, match=r"relation_schedule .* is not a schedule"):
        from_dict(RelationConfig, {"relation_schedule": points})


def test_pairs_of_blocks() -> None:
    assert block_pairs(None, "--feature-blocks") is None
    assert from_dict(FeatureObjectiveConfig, {"feature_blocks": "9:24, 12:32"}).feature_blocks == ("9:24", "12:32")
    assert block_pairs(("9:24", "12:32"), "--feature-blocks") == ((9, 24), (12, 32))


@pytest.mark.parametrize("written", [("9",), ("9:",), (":9",), ("a:b",), ("9:-1",), ("9:8:7",), (), ("1:2", "1:2")])
def test_what_are_no_pairs(written: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="--relation-blocks"):
        RelationConfig(relation_blocks=written)


def test_settings_that_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match=r"--feature-blocks .* does not go with"):
        FeatureObjectiveConfig(feature_blocks=("1:2",), teacher_block=3)
    with pytest.raises(ConfigError, match=r"--decoder-blocks .* must be one pair"):
        DecoderFeatureConfig(decoder_blocks=("1:2", "2:3"))
    with pytest.raises(ConfigError, match=r"--cls-weight must be at least 0, got -1"):
        PooledConfig(cls_weight=-1.0)
    with pytest.raises(ConfigError, match="--relations '' must be at least one of qk"):
        RelationConfig(relations=())
