"""Students of any shape, and their heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mae_deploy.cli import main
from mae_deploy.config import from_dict
from mae_deploy.distill.config import DistillConfig
from mae_deploy.distill.student import student_encoder
from mae_deploy.errors import ConfigError
from mae_deploy.models.config import EncoderConfig


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
        ({"shape": {"student_width": 0}}, "--student-width 0 must be at least 1"),
        (
            {"shape": {"student_width": 192, "student_heads": 5}},
            "embed_dim 192 must be a multiple of 4 and of num_heads 5",
        ),
        ({"patch_size": 0}, "sizes of model"),
        ({"keep_ratio": [0.5, 0.2]}, "--keep-ratio 0.5,0.2 must be LOW,HIGH"),
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
