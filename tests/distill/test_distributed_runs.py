"""Two processes on a CPU (gloo): the losses of one, also where most of the student has no gradient, in copies and in
shares.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mae_deploy.data.config import DataConfig
from mae_deploy.distill.config import DistillConfig, FeatureObjectiveConfig, RelationConfig, TeacherConfig
from mae_deploy.training.config import LoopConfig, Sharding
from tests.training.tiny_runs import DECODER, STUDENT, command, command_of, losses_of, optim, run_processes


def config_of(data: Path, teacher: Path, out: Path, batch_size: int, sharding: Sharding = "ddp") -> DistillConfig:
    """Relations of the last block and two pairs of tokens below it; nothing reaches the decoder."""
    common: dict[str, Any] = {
        "features": FeatureObjectiveConfig(mask_ratio=0.5, pixel_weight=0, feature_blocks=("1:1", "2:2")),
        "relation": RelationConfig(relation_weight=0.5, relation_blocks=("4:2",)),
        "teaching": TeacherConfig(teacher_precision="fp32"),
    }
    settings: dict[str, Any] = {
        "optim": optim(batch_size=batch_size),
        "images": DataConfig(num_workers=0),
        "loop": LoopConfig(sharding=sharding),
    }
    return DistillConfig(
        data=data, teacher=teacher, out=out, device="cpu", decoder=DECODER, **STUDENT, **common, **settings
    )


@pytest.mark.parametrize("sharding", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_two_processes_have_the_losses_of_one(images: Path, teacher: Path, tmp_path: Path, sharding: Sharding) -> None:
    alone, both = (
        config_of(images, teacher, tmp_path / "alone", 4),
        config_of(images, teacher, tmp_path / "both", 2, sharding),
    )
    assert run_processes(1, command, command_of(alone)) == [0]
    assert run_processes(2, command, command_of(both)) == [0, 0]
    names = ("feature_loss", "relation_loss", "grad_norm")
    for line, other in zip(losses_of(both.out, *names), losses_of(alone.out, *names), strict=True):
        assert line == pytest.approx(other, rel=1e-5)  # the same float32 sums in another order
