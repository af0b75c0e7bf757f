"""A teacher's answers on disk: an image whose view comes again does not need the teacher again (Shen and Xing, FKD:
https://arxiv.org/abs/2112.01528).

An answer is a function of the image and of the number of its fixed view, which stands for the augmentation and the
mask; everything else that it depends on names the folder. Answers are kept and given in FP16, also the first time: what
a run computes does not depend on what was there.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mae_deploy import __version__
from mae_deploy.config import to_dict
from mae_deploy.data.config import CropConfig
from mae_deploy.data.dataset import ImageDataset
from mae_deploy.distill.config import CacheConfig
from mae_deploy.distill.masks import Masks
from mae_deploy.distill.row_store import RowStore
from mae_deploy.distill.teachers.answers import pick_rows
from mae_deploy.distill.teachers.base import Teacher
from mae_deploy.errors import ConfigError
from mae_deploy.files import read_json, write_json
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.models.masking import Masking
from mae_deploy.models.taps import Tap, Taps
from mae_deploy.progress import notice
from mae_deploy.text import as_size
from mae_deploy.training.monitor.readback import Readback
from mae_deploy.training.step import StepBatch, to_device

_INDEX = "index.json"

_EXAMPLES = 2
"""Blank images that the teacher answers once, for the shapes of its answers. Of one, `torch.compile` would take the
number for a constant."""

_LARGEST = torch.finfo(torch.float16).max


class Part(NamedTuple):
    """One tap's place in a row."""

    tap: Tap
    shape: tuple[int, ...]
    """Of one image's answer."""

    @property
    def numel(self) -> int:
        """Numbers of one image's answer."""
        return int(torch.Size(self.shape).numel())


class CachedTeacher:
    """Answers like the teacher, in FP16's precision, from the disk where it can."""

    def __init__(
        self,
        teacher: Teacher,
        store: RowStore,
        parts: tuple[Part, ...],
        *,
        num_images: int,
        device: torch.device,
        masked: bool,
        main: bool,
    ) -> None:
        """Put a cache before a teacher.

        Args:
            parts: what a row holds.
            num_images: of the data set.
            masked: an image's mask is that of its view, and its answer is kept as the mask leaves it; else the answer
                to the whole image is kept, and what a mask leaves is picked of it.
            main: this process says what the cache was good for.
        """
        self.teacher = teacher
        self.store = store
        self.parts = parts
        self.num_images = num_images
        self.device = device
        self.masked = masked
        self.main = main
        self.read = self.computed = 0
        """Answers that were read and computed."""
        self._writes: Readback[Tensor] = Readback(device)
        self._full = False

    def __call__(self, batch: StepBatch, masking: Masking | None, *, whole: bool) -> Taps:
        """See `Teacher`."""
        shown = masking if self.masked else None
        numbers = batch.view * self.num_images + batch.items
        rows, found = self._read(numbers)
        missing = (~found).nonzero().flatten()
        self.read += len(numbers) - len(missing)
        self.computed += len(missing)
        if len(missing) == len(numbers):
            rows = self._compute(batch, numbers, shown, whole=whole)
        elif len(missing):
            places = to_device(missing, self.device)
            few = None if shown is None else Masking(*(part[places] for part in shown))
            rows[places] = self._compute(_rows_of(batch, missing, places), numbers[missing], few, whole=whole)
        self._write()
        taps = self._unpack(rows)
        return taps if shown is masking or masking is None else pick_rows(taps, masking.ids_keep)

    def close(self) -> None:
        """Write what is on its way, and say what the cache was good for."""
        self._write(all_of_them=True)
        self.store.close()
        if self.main:
            size = as_size(self.store.on_disk())
            notice(
                "teacher cache:",
                f"{self.read:,} answers read, {self.computed:,} computed; {size} in {self.store.folder}",
            )

    def _read(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """FP16 `(B, row)` on the device, and `(B,)` on the host: which rows were there."""
        rows = torch.empty(
            len(numbers),
            sum(part.numel for part in self.parts),
            dtype=torch.float16,
            pin_memory=self.device.type == "cuda",
        )
        found = self.store.read(numbers.numpy(), rows.view(torch.uint8).numpy())
        return rows.to(self.device, non_blocking=True), torch.from_numpy(found)

    def _compute(self, batch: StepBatch, numbers: Tensor, masking: Masking | None, *, whole: bool) -> Tensor:
        """The teacher's answers as rows, which are on their way to the disk."""
        taps = self.teacher(batch, masking, whole=whole)
        rows = torch.cat([taps[part.tap].flatten(1).clamp(-_LARGEST, _LARGEST).half() for part in self.parts], dim=1)
        self._writes.push(numbers, rows)
        return rows

    def _write(self, *, all_of_them: bool = False) -> None:
        for numbers, rows in self._writes.due(all_of_them=all_of_them):
            if self._full:
                continue
            try:
                self.store.write(numbers.numpy(), rows.view(torch.uint8).numpy())
            except OSError as error:
                self._full = True
                notice(
                    "teacher cache:",
                    f"cannot write to {self.store.folder} ({error}); the run goes on with what is there",
                )

    def _unpack(self, rows: Tensor) -> Taps:
        split = rows.split([part.numel for part in self.parts], dim=1)
        return {
            part.tap: values.reshape(len(rows), *part.shape).float()
            for part, values in zip(self.parts, split, strict=True)
        }


def open_cache(
    teacher: Teacher,
    settings: CacheConfig,
    dataset: ImageDataset,
    *,
    augment: CropConfig,
    masks: Masks,
    whole: bool,
    device: torch.device,
    main: bool = True,
) -> CachedTeacher:
    """Put the cache of `--teacher-cache` before a teacher that watches its taps and is on its device.

    Args:
        dataset: what the run trains on, with the fixed views of the settings.
        augment: what its transform was made from.
        masks: the loss's own.
        whole: as the teacher is called.
        main: this process says how large the cache is.

    Raises:
        ConfigError: its folder cannot be written, the disk has no room for it, or the teacher sees patches that each
            step draws anew.
    """
    if settings.teacher_cache is None:
        raise ValueError("there is no folder for a cache")
    masked = masks.settings is not None
    if masks.ever and not masked and not whole:
        raise ConfigError(
            "--teacher-cache keeps the teacher's answers to patches that come again, and --keep-ratio draws others in"
            " each step",
            hint="pass --teacher-view whole, or one --keep-ratio",
        )
    of = {
        "teacher": teacher.key,
        "whole": whole,
        "data": dataset.fingerprint(),
        "seed": dataset.seed,
        "augment": to_dict(augment),
        "preprocess": to_dict(dataset.transform.spec),
        "masks": masks.settings,
        "mae_deploy": __version__,
    }
    folder = settings.teacher_cache / hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:16]
    parts = _stored(folder)
    if parts is None:
        example = _example(dataset.transform.spec, device)
        taps = teacher(example, masks(example) if masked else None, whole=whole)
        parts = tuple(Part(tap, tuple(taps[tap].shape[1:])) for tap in sorted(taps))
    try:
        store = RowStore(folder, 2 * sum(part.numel for part in parts))
        _check_room(store, settings.teacher_cache, len(dataset) * settings.fixed_views, main=main)
        write_json(
            folder / _INDEX,
            {
                "of": of,
                "taps": [{"kind": part.tap.kind, "block": part.tap.block, "shape": list(part.shape)} for part in parts],
            },
        )
    except OSError as error:
        raise ConfigError(
            f"--teacher-cache {settings.teacher_cache}: {error}", hint="give a folder that can be written"
        ) from error
    return CachedTeacher(teacher, store, parts, num_images=len(dataset), device=device, masked=masked, main=main)


def _example(spec: Preprocess, device: torch.device) -> StepBatch:
    numbers = torch.arange(_EXAMPLES)
    images = torch.zeros(_EXAMPLES, spec.channels, *spec.image_size, device=device)
    return StepBatch(images, numbers.to(device), items=numbers, view=torch.zeros_like(numbers))


def _stored(folder: Path) -> tuple[Part, ...] | None:
    """What the rows of a folder hold, where it says so."""
    try:
        taps = read_json(folder / _INDEX)["taps"]
        return tuple(Part(Tap(tap["kind"], tap["block"]), tuple(tap["shape"])) for tap in taps)
    except (ConfigError, KeyError, TypeError):
        return None


def _check_room(store: RowStore, cache: Path, num_rows: int, *, main: bool) -> None:
    """Say how large the cache is and will be.

    Raises:
        ConfigError: there is not so much room on the disk.
    """
    whole, there, free = num_rows * store.stride, store.on_disk(), shutil.disk_usage(store.folder).free
    if whole - there > free:
        raise ConfigError(
            f"--teacher-cache {cache}: {num_rows:,} answers of {as_size(store.stride)} take {as_size(whole)},"
            f" {as_size(there)} are there, {as_size(free)} are free",
            hint="take fewer --fixed-views, another disk, or objectives that need less of the teacher",
        )
    if main:
        notice(
            "teacher cache:",
            f"{num_rows:,} answers of {as_size(store.stride)}: {as_size(whole)}, {as_size(there)} of it in"
            f" {store.folder}; {as_size(free)} are free",
        )


def _rows_of(batch: StepBatch, rows: Tensor, places: Tensor) -> StepBatch:
    """Some rows of a batch, numbered on the host and on the device."""
    return replace(
        batch, images=batch.images[places], labels=batch.labels[places], items=batch.items[rows], view=batch.view[rows]
    )
