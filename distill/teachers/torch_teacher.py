"""What teachers that PyTorch runs have in common: images in, precision, compilation, answers out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from mae_deploy.config import to_dict
from mae_deploy.distill.config import TeacherConfig
from mae_deploy.distill.teachers.answers import answers_for
from mae_deploy.distill.teachers.arithmetic import set_precision
from mae_deploy.distill.teachers.base import SPATIAL_KINDS, key_of, reason_against_grid
from mae_deploy.distill.teachers.images import TeacherImages
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.models.config import EncoderConfig
from mae_deploy.models.masking import Masking
from mae_deploy.models.taps import Tap, Taps
from mae_deploy.progress import notice
from mae_deploy.training.device import resolve_precision
from mae_deploy.training.step import StepBatch


class TorchTeacher(ABC):
    """A teacher that is a PyTorch module; see `Teacher`."""

    preprocess: Preprocess
    encoder_config: EncoderConfig | None
    record: dict[str, Any]
    reason_against_subset: str | None = None
    sees_all: bool = False
    """Whether it gives rows of all patches, even where it is shown some of them."""

    def __init__(self, settings: TeacherConfig) -> None:
        self.settings = settings
        self.arithmetic: Callable[[], AbstractContextManager[Any]] = nullcontext
        self._answers: list[Any] = []

    @property
    def key(self) -> str:
        """See `Teacher`."""
        return key_of(
            self.record.get("timm"), self.record.get("sha256") or self.record.get("source_sha256"), *self._answers
        )

    def prepare(
        self,
        model: nn.Module,
        wanted: Collection[Tap],
        *,
        student: EncoderConfig,
        spec: Preprocess,
        grid_size: tuple[int, int],
        image_size: tuple[int, int],
    ) -> None:
        """Take the network that is left of the teacher, for `watch` to end with.

        Args:
            grid_size: of the patches that it sees.
            image_size: at which it sees them.
        """
        self.model = model
        self.wanted = tuple(sorted(wanted))
        self.found, self.asked = grid_size, student.grid_size
        trained = self.preprocess.image_size
        if image_size != trained:
            notice(
                "teacher:",
                f"sees images of {image_size[0]}x{image_size[1]} as {grid_size[0]}x{grid_size[1]} patches, the grid of"
                f" the student; it was made for {trained[0]}x{trained[1]} (--teacher-grid interpolate keeps to that)",
            )
        elif grid_size != self.asked and any(tap.kind in SPATIAL_KINDS for tap in wanted):
            notice(
                "teacher:",
                f"has {grid_size[0]}x{grid_size[1]} patches, the student {self.asked[0]}x{self.asked[1]}: what is of"
                " patches is interpolated",
            )
        self.reason_against_subset = self.reason_against_subset or reason_against_grid(self.found, self.asked)
        self._images = TeacherImages(spec, self.preprocess, image_size)
        self._answers = [
            self.wanted,
            image_size,
            self.asked,
            *(to_dict(known) for known in (spec, self.preprocess, self.encoder_config) if known),
        ]
        self._run = torch.compile(self.forward) if self.settings.teacher_compile else self.forward

    def to(self, device: torch.device) -> None:
        """See `Teacher`."""
        self._images.to(device)
        precision = resolve_precision(
            self.settings.teacher_precision, device, frozen=True, option="--teacher-precision"
        )
        self.arithmetic = set_precision(self.model, precision, device)
        self._answers.append(precision)
        self.model.to(device)

    @torch.no_grad()
    def __call__(self, batch: StepBatch, masking: Masking | None, *, whole: bool) -> Taps:
        """See `Teacher`."""
        with self.arithmetic():
            found = self._run(self._images(batch.images), None if whole else masking)
        picked = masking.ids_keep if masking is not None and (whole or self.sees_all) else None
        return answers_for(dict(zip(self.wanted, found, strict=True)), picked, found=self.found, asked=self.asked)

    @abstractmethod
    def forward(self, images: Tensor, masking: Masking | None) -> tuple[Tensor, ...]:
        """The taps in the order of `wanted`, as the network gives them."""
