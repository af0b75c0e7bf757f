"""Top-1 and top-5 on a validation folder, on every process at once."""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from mae_deploy.data.dataset import ImageDataset, eval_loader
from mae_deploy.data.sources.base import ImageSource
from mae_deploy.data.transforms import NormaliseImages, Transform
from mae_deploy.errors import CheckFailed
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.progress import notice
from mae_deploy.seeding import random_patches
from mae_deploy.training.kept_patches import KeptPatches


class Evaluator:
    """Validation of a classifier; images that cannot be read are left out and counted.

    Args:
        kept: what it is trained on: it sees the most patches, and once more the fewest; None: all.
    """

    def __init__(
        self,
        images: ImageSource,
        transform: Transform,
        spec: Preprocess,
        *,
        batch_size: int,
        num_workers: int,
        kept: KeptPatches | None = None,
    ) -> None:
        self.dataset = ImageDataset(images, transform, seed=0, replace_unreadable=False)
        self.spec = spec
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.kept = kept
        self._reported: set[str] = set()

    @torch.no_grad()
    def __call__(self, accelerator: Accelerator, model: nn.Module, *, at_most: int | None = None) -> dict[str, float]:
        """Accuracies in per cent and the mean cross-entropy; `top1_of_K` with K patches, where K is the fewest of
        several numbers. All are NaN where the logits of an image are: such a network has no accuracy.

        Args:
            at_most: of the first so many images; None: of all.

        Raises:
            CheckFailed: not one validation image can be read.
        """
        was_training = model.training
        model.eval()
        normalise = NormaliseImages(self.spec).to(accelerator.device)
        counts: tuple[int | None, ...] = (
            (None,) if self.kept is None else tuple(dict.fromkeys((self.kept.most, self.kept.least)))
        )
        totals = torch.zeros(len(counts), 5, dtype=torch.float64, device=accelerator.device)
        loader = eval_loader(
            self.dataset,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            at_most=at_most,
        )
        for batch in loader:
            for line in set(batch.unreadable) - self._reported:
                self._reported.add(line)
                notice("left out of the validation", line, own=True)
            if len(batch.images) == 0:
                continue
            images, labels = normalise(batch.images.to(accelerator.device)), batch.labels.to(accelerator.device)
            for row, count in zip(totals, counts, strict=True):
                seen = [ids_keep.to(accelerator.device) for ids_keep in self._seen(count, batch.items)]
                with accelerator.autocast():
                    logits = model(images, *seen).float()
                ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices.eq(labels.unsqueeze(1))
                loss = F.cross_entropy(logits, labels, reduction="sum")
                not_finite = (~logits.isfinite()).any(dim=1).sum()
                row += torch.stack([ranked[:, 0].sum(), ranked.sum(), loss, not_finite, loss.new_tensor(len(labels))])
        model.train(was_training)
        summed: Any = accelerator.reduce(totals, "sum")
        num_images = float(summed[0, -1])
        if num_images == 0:
            raise CheckFailed(f"no readable validation image below {self.dataset.name}")
        not_finite = int(summed[:, 3].max())
        if not_finite:
            notice(
                "validation:",
                f"logits of {not_finite} of {num_images:g} images are NaN or infinite, so there is no top-1",
            )
            summed = torch.full_like(summed, math.nan)
        (top1, top5, loss, *_), *fewer = summed.tolist()
        found = {"top1": 100 * top1 / num_images, "top5": 100 * top5 / num_images, "val_loss": loss / num_images}
        return found | {
            f"top1_of_{kept}": 100 * right / num_images for kept, (right, *_) in zip(counts[1:], fewer, strict=True)
        }

    def _seen(self, count: int | None, items: Tensor) -> tuple[Tensor, ...]:
        """The patches that each image is seen by, `(B, K)`, always the same ones; nothing where all are."""
        if self.kept is None or count is None or count == self.kept.num_patches:
            return ()
        return (torch.from_numpy(random_patches(self.kept.num_patches, count, items.tolist(), seed=0)),)
