"""Students of any shape, and what they start from: a slice of the teacher, or a checkpoint of their own shape."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from mae_deploy.checkpoint import open_checkpoint
from mae_deploy.cli import main
from mae_deploy.config import from_dict
from mae_deploy.distill.config import DistillConfig, FeatureObjectiveConfig, ShapeConfig, TeacherConfig
from mae_deploy.distill.run import run_distill
from mae_deploy.distill.student import read_start, start, student_encoder
from mae_deploy.errors import ConfigError
from mae_deploy.models.config import EncoderConfig, SliceBlocks
from mae_deploy.models.vit import Encoder
from mae_deploy.weights.load import LoadedWeights, read_weights
from mae_deploy.weights.slicing import slice_encoder
from tests.models.tiny_models import ENCODER, fill, metadata_of
from tests.training.tiny_runs import DECODER, STUDENT, optim


def student(name: str = "vit_tiny_patch16", **settings: Any) -> EncoderConfig:
    config = from_dict(DistillConfig, {"data": "d", "teacher": "t", "student": name, "out": "o", **settings})
    return student_encoder(config, image_size=(32, 48), in_chans=5)


def shape(encoder: EncoderConfig) -> tuple[int, int, int, int]:
    return encoder.width, encoder.blocks, encoder.heads, encoder.patch


def test_a_preset_at_the_size_of_the_teacher(capsys: pytest.CaptureFixture[str]) -> None:
    encoder = student()
    assert encoder == EncoderConfig(name="vit_tiny_patch16", image_size=(32, 48), in_chans=5)
    assert student(image_size=(64, 32), patch_size=8) == EncoderConfig(
        name="vit_tiny_patch16", image_size=(64, 32), patch_size=8, in_chans=5
    )
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({"student_width": 256}, (256, 12, 4, 16)),
        ({"student_depth": 5}, (192, 5, 3, 16)),
        ({"student_width": 128, "student_depth": 7, "student_heads": 4}, (128, 7, 4, 16)),
        ({"student_width": 192}, (192, 12, 3, 16)),
        ({"student_width": 100}, (100, 12, 2, 16)),  # heads of 50; one head of 100 would be further from 64
    ],
)
def test_shapes_of_your_own(asked: dict[str, int], found: tuple[int, ...]) -> None:
    encoder = student(shape=asked)
    assert shape(encoder) == found
    # What is another network than the preset has another name, and what is the same has not.
    assert (encoder.name == "vit_tiny_patch16") == (found == (192, 12, 3, 16))


def test_heads_that_tensorrt_does_not_fuse_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    student(shape={"student_heads": 6})
    assert (
        "heads of 32: TensorRT fuses attention in INT8 for heads of 64, such as --student-width 192 --student-heads 3"
        in " ".join(capsys.readouterr().err.split())
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shape": {"student_width": 0}}, "shape.student_width must be at least 1, got 0"),
        (
            {"shape": {"student_width": 192, "student_heads": 5}},
            "embed_dim 192 must be a multiple of 4 and of num_heads, 5",
        ),
        ({"patch_size": 0}, "patch_size must be at least 1, got 0"),
        ({"keep_ratio": [0.5, 0.2]}, "--keep-ratio 0.5,0.2 is not LOW,HIGH"),
    ],
)
def test_students_that_there_are_not(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        student(**settings)


def test_a_shape_is_a_recipe_setting_and_an_option(tmp_path: Path) -> None:
    out = tmp_path / "dump.yaml"
    arguments = [
        "distill",
        "d",
        "--teacher",
        "t",
        "--student",
        "vit_tiny_patch16",
        "--out",
        "o",
        "--student-depth",
        "6",
        "--keep-ratio",
        "0.25",
    ]
    assert main([*arguments, "--dump-config", str(out)]) == 0
    assert "student_depth: 6" in out.read_text()
    assert "keep_ratio:\n- 0.25\n- 0.25\n" in out.read_text()


# --- what it starts from ---------------------------------------------------------------------------------------------


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
    expected = slice_encoder(read_weights(teacher), from_dict(EncoderConfig, metadata.encoder))
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
