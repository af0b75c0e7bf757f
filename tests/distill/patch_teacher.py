"""A teacher that answers with the image's own patches, and what it takes to put a cache before it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mae_deploy.data.config import CropConfig, DataConfig
from mae_deploy.data.dataset import ImageDataset
from mae_deploy.data.sources.files import image_files
from mae_deploy.data.training_set import train_dataset
from mae_deploy.data.transforms import train_transform
from mae_deploy.distill.cache import CachedTeacher, open_cache
from mae_deploy.distill.config import CacheConfig
from mae_deploy.distill.teachers.answers import pick_rows
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.models.masking import Masking, random_masking
from mae_deploy.models.taps import Tap, Taps
from mae_deploy.training.step import StepBatch

SPEC = Preprocess(image_size=(6, 10))
N = 15
"""Patches of 2 x 2."""
CROP = CropConfig(min_scale=0.5)
CPU = torch.device("cpu")


class PatchTeacher:
    """Patches as tokens, 12 wide, behind a CLS token; and two logits. Remembers what it was shown."""

    def __init__(self, key: str = "a") -> None:
        self.key = key
        self.factor = 1.0
        self.shown: list[int] = []
        """Images of each call."""

    def __call__(self, batch: StepBatch, masking: Masking | None, *, whole: bool) -> Taps:
        self.shown.append(len(batch.images))
        B = len(batch.images)
        patches = batch.images.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).reshape(B, N, 12)
        taps = {
            Tap("tokens", 2): torch.cat([patches.mean(dim=1, keepdim=True), patches], dim=1),
            Tap("logits"): self.factor * batch.images.mean((2, 3))[:, :2],
        }
        return taps if masking is None else pick_rows(taps, masking.ids_keep)


class ViewMasks:
    """Masks as the loss draws them, the same each time for each view of an image."""

    def __init__(self, mask_ratio: float = 0.6, *, ever: bool = True, each_step: bool = False) -> None:
        self.mask_ratio, self.ever = mask_ratio, ever
        self.settings = {"mask_ratio": mask_ratio} if ever and not each_step else None

    def __call__(self, batch: StepBatch) -> Masking:
        return random_masking(batch.image_rand(N), self.mask_ratio)


mask = ViewMasks()


def dataset_of(images: Path, *, seed: int = 5) -> ImageDataset:
    return train_dataset(image_files(images), train_transform(SPEC, CROP), DataConfig(), seed=seed, fixed_views=2)


def batch_of(*items: int, view: int = 0) -> StepBatch:
    images = torch.stack(
        [torch.randn(3, 6, 10, generator=torch.Generator().manual_seed(100 * view + item)) for item in items]
    )
    return StepBatch(
        images,
        torch.zeros(len(items), dtype=torch.int64),
        seed=5,
        items=torch.tensor(items),
        view=torch.full((len(items),), view),
    )


def opened(teacher: PatchTeacher, dataset: ImageDataset, folder: Path, **more: Any) -> CachedTeacher:
    settings = {"augment": CROP, "masks": mask, "whole": False, "device": CPU, **more}
    given: Any = teacher
    cached = open_cache(given, CacheConfig(teacher_cache=folder, fixed_views=2), dataset, **settings)
    teacher.shown.clear()  # the blank images
    return cached
