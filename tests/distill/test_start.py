"""A student starts as a slice of its teacher, or from a checkpoint of its own shape."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from mae_deploy.checkpoint import open_checkpoint
from mae_deploy.distill.config import DistillConfig, FeatureObjectiveConfig, ShapeConfig, TeacherConfig
from mae_deploy.distill.run import run_distill
from mae_deploy.distill.start import read_start, start
from mae_deploy.errors import ConfigError
from mae_deploy.models.config import EncoderConfig, SliceBlocks
from mae_deploy.models.vit import Encoder
from mae_deploy.weights.load import LoadedWeights, read_weights
from mae_deploy.weights.slicing import slice_encoder
from tests.models.tiny_models import ENCODER, fill, metadata_of
from tests.training.tiny_runs import DECODER, STUDENT, optim

SLICE = ShapeConfig(student_width=8, student_depth=1, student_heads=2)
"""Of a teacher 12 wide, with 2 blocks and 3 heads, on patches of 5 instead of 4 pixels."""


def distilling(teacher: Path, **more: Any) -> DistillConfig:
    return DistillConfig(data=Path("data"), teacher=teacher, out=Path("run"), student="vit_nano_patch4", **more)


def test_a_run_from_a_slice_of_the_teacher(images: Path, teacher: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        **STUDENT,
        "decoder": DECODER,
        "features": FeatureObjectiveConfig(mask_ratio=0.5),
        "device": "cpu",
        "shape": SLICE,
    }
    run_distill(
        DistillConfig(
            data=images,
            teacher=teacher,
            out=tmp_path / "run",
            init=Path("teacher"),
            optim=optim(epochs=1, lr=0.0),
            **settings,
        )
    )
    found, metadata = (
        load_file(tmp_path / "run" / "checkpoints" / "last" / "model.safetensors"),
        open_checkpoint(tmp_path / "run").metadata,
    )
    expected = slice_encoder(read_weights(teacher), EncoderConfig(**metadata.encoder))
    assert expected["blocks.0.attn.qkv.weight"].shape == (24, 8)
    assert expected["patch_embed.proj.weight"].shape == (8, 3, 4, 4)
    assert [name for name in expected if not found[name].equal(expected[name])] == []
    assert metadata.provenance["parent"]["stage"] == "pretrain"


@pytest.mark.parametrize(("blocks", "last"), [("even", 4), ("first", 1)])
def test_which_blocks(blocks: SliceBlocks, last: int) -> None:
    larger = fill(Encoder(replace(ENCODER, name="larger", depth=5)))
    config = distilling(Path("runs"), init=Path("teacher"), shape=ShapeConfig(init_blocks=blocks))
    found = start(Encoder(ENCODER), config, LoadedWeights(metadata_of(larger), larger.state_dict(), {})).state_dict()
    assert found["blocks.1.norm1.bias"].equal(larger.state_dict()[f"blocks.{last}.norm1.bias"])


def test_without_init_the_student_stays_as_it_is(teacher: Path) -> None:
    config = distilling(teacher)
    student = Encoder(ENCODER)
    before = student.blocks[0].state_dict()["mlp.fc1.weight"].clone()
    assert read_start(config) is None
    assert start(student, config, None).blocks[0].state_dict()["mlp.fc1.weight"].equal(before)


def test_a_file_of_timms_weights_beside_the_teachers_name(teacher: Path) -> None:
    config = distilling(Path("timm:vit_small"), init=Path("teacher"), teaching=TeacherConfig(teacher_weights=teacher))
    weights = read_start(config)
    assert weights is not None
    assert weights.encoder_config.width == 12


def test_a_teacher_without_weights_cannot_be_sliced(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    for missing in (Path("timm:vit_small"), tmp_path):
        with pytest.raises(ConfigError, match="needs a teacher with weights"):
            read_start(distilling(missing, init=Path("teacher")))


def test_blocks_of_no_teacher() -> None:
    with pytest.raises(ConfigError, match="--init-blocks first says which of the teacher's blocks"):
        distilling(Path("runs"), shape=ShapeConfig(init_blocks="first"))
