"""What a teacher is, by how it is written; and settings that do not go with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mae_deploy.distill.config import TeacherConfig
from mae_deploy.distill.teachers.checkpoint_teacher import CheckpointTeacher
from mae_deploy.distill.teachers.open import open_teacher
from mae_deploy.errors import ConfigError
from tests.export.tiny_exports import write_checkpoint
from tests.models.tiny_models import tiny_mae


def test_a_checkpoint(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "checkpoint", tiny_mae(), licence="CC-BY-NC-4.0")
    teacher = open_teacher(path, TeacherConfig())
    assert isinstance(teacher, CheckpointTeacher)
    assert (teacher.kind, teacher.depth, teacher.decoder_width, teacher.licence) == ("mae", 2, 12, "CC-BY-NC-4.0")
    assert teacher.record["sha256"]


def test_settings_of_another_kind_of_teacher(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tiny_mae())
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "manifest.json").write_text("{}")
    for path, settings, message in (
        (
            checkpoint,
            TeacherConfig(teacher_engine="onnx"),
            "--teacher-engine onnx runs bundles, and the teacher is a checkpoint",
        ),
        (
            Path("timm:test_vit"),
            TeacherConfig(teacher_engine="trt", teacher_weights=checkpoint),
            "the teacher is a timm model",
        ),
        (Path("timm:test_vit"), TeacherConfig(), "--teacher timm:test_vit needs its weights"),
        (checkpoint, TeacherConfig(teacher_weights=checkpoint), "--teacher-weights goes with --teacher timm:NAME"),
        (bundle, TeacherConfig(teacher_engine="torch"), "--teacher-engine torch runs checkpoints"),
        (bundle, TeacherConfig(teacher_precision="fp32"), "--teacher-compile and --teacher-precision are for PyTorch"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_teacher(path, settings)
    with pytest.raises(ConfigError, match="no weights at"):
        open_teacher(tmp_path / "nothing", TeacherConfig())
