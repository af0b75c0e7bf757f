"""Find out what a teacher is, and open it."""

from __future__ import annotations

from pathlib import Path

from mae_deploy.distill.config import TeacherConfig
from mae_deploy.distill.teachers.base import Teacher
from mae_deploy.errors import ConfigError
from mae_deploy.runtime.manifest import MANIFEST_FILE
from mae_deploy.weights.load import read_weights

TIMM = "timm:"
"""What stands before the name of a timm model."""


def open_teacher(path: Path, settings: TeacherConfig) -> Teacher:
    """A checkpoint or weights file, a bundle, or `timm:NAME` with --teacher-weights.

    Raises:
        ConfigError: nothing is there, or settings that this kind of teacher does not have.
        CheckFailed: damaged or unsafe weights, or weights of another model.
    """
    name = str(path).removeprefix(TIMM)
    if name != str(path):
        from mae_deploy.distill.teachers.timm_teacher import TimmTeacher

        _check_engine(settings, "a timm model")
        if settings.teacher_weights is None:
            raise ConfigError(
                f"--teacher {path} needs its weights", hint="pass --teacher-weights FILE; nothing is downloaded"
            )
        return TimmTeacher(name, settings.teacher_weights, settings)
    if settings.teacher_weights is not None:
        raise ConfigError(
            "--teacher-weights goes with --teacher timm:NAME",
            hint=f"or give the file itself: --teacher {settings.teacher_weights}",
        )
    if (path / MANIFEST_FILE).is_file():
        from mae_deploy.distill.teachers.bundle_teacher import BundleTeacher

        return BundleTeacher(path, settings)
    from mae_deploy.distill.teachers.checkpoint_teacher import CheckpointTeacher

    _check_engine(settings, "a checkpoint")
    return CheckpointTeacher(read_weights(path), settings)


def _check_engine(settings: TeacherConfig, what: str) -> None:
    if settings.teacher_engine not in ("auto", "torch"):
        raise ConfigError(
            f"--teacher-engine {settings.teacher_engine} runs bundles, and the teacher is {what}",
            hint=(
                "mae-deploy export --tokens full (or visible, where the teacher sees the student's patches) makes a"
                " bundle of a checkpoint"
            ),
        )
