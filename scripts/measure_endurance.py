"""Whether memory, open files and threads stay flat: many calls of a backbone, then many steps of a run, of a small
network with random weights. Draws both, and fails where anything has grown since a tenth of them.

    python -m scripts.measure_endurance [--calls 100000] [--steps 10000] [--picture endurance.png]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image

from mae_deploy.checkpoint import Metadata, save_checkpoint
from mae_deploy.config import to_dict
from mae_deploy.data.config import DataConfig
from mae_deploy.export.config import ExportConfig
from mae_deploy.export.run import run_export
from mae_deploy.images.preprocess import default_preprocess
from mae_deploy.models.config import DecoderConfig, EncoderConfig
from mae_deploy.models.vit import Encoder
from mae_deploy.pretrain.config import PretrainConfig
from mae_deploy.pretrain.run import run_pretrain
from mae_deploy.reporting.plots import figure, legend_below
from mae_deploy.runtime.backbone import Backbone
from mae_deploy.training.config import LoopConfig, OptimConfig
from mae_deploy.training.step import Stepper

_MODEL = EncoderConfig(name="small", image_size=(24, 32), patch_size=8, embed_dim=48, depth=2, num_heads=3)
_DECODER = DecoderConfig(decoder_depth=1, decoder_embed_dim=32, decoder_num_heads=2)
_IMAGES, _BATCH = 64, 8
_TIMES = 100
"""Points of a curve."""

_ALLOWED = 4.0
"""MiB by which allocators may differ between two points."""


@dataclass(frozen=True, slots=True)
class Point:
    """What the process holds after so many calls or steps."""

    done: int
    mib: float
    """Written to and not given back, in memory or swapped out."""
    files: int
    threads: int

    @classmethod
    def now(cls, done: int) -> Point:
        """As Linux has it."""
        status = Path("/proc/self/status").read_text(encoding="ascii")
        mib = sum(int(status.split(f"{name}:")[1].split()[0]) for name in ("RssAnon", "VmSwap")) / 1024
        return cls(done, mib, len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")))


def main(arguments: Sequence[str] | None = None) -> list[str]:
    """What has grown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--picture", type=Path)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="mae-deploy-") as folder:
        curves = {"calls": _calls(Path(folder), given.calls), "steps": _steps(Path(folder), given.steps)}
    if given.picture is not None:
        _draw(given.picture, curves)
    grown = []
    for name, points in curves.items():
        early, last = points[len(points) // 10], points[-1]
        for point in (points[0], early, last):
            print(f"{point.done} {name}  {point.mib:.1f} MiB  {point.files} files  {point.threads} threads")
        if last.mib - early.mib > _ALLOWED:
            grown.append(f"memory by {last.mib - early.mib:.1f} MiB from {early.done} {name} on")
        if (last.files, last.threads) != (early.files, early.threads):
            grown.append(f"files or threads from {early.done} {name} on")
    return grown


def _calls(folder: Path, count: int) -> list[Point]:
    """Of a backbone: one image after the other, of two sizes, with all patches and with some."""
    torch.manual_seed(0)
    metadata = Metadata(
        kind="encoder", encoder=to_dict(_MODEL), preprocess=to_dict(default_preprocess(_MODEL.image_size))
    )
    save_checkpoint(folder / "checkpoint", Encoder(_MODEL).state_dict(), metadata)
    run_export(ExportConfig(checkpoint=folder / "checkpoint", out=folder / "visible", tokens="visible"))
    rng, points = np.random.default_rng(0), list[Point]()
    images = [rng.integers(0, 256, size, dtype=np.uint8) for size in ((24, 32, 3), (50, 41, 3))]
    with Backbone.load(folder / "visible", threads=1) as backbone:
        for number in range(1, count + 1):
            keep = None if number % 3 == 0 else rng.permutation(backbone.num_patches)[: 4 + number % 5]
            backbone([images[number % 2]], keep)
            if number % max(1, count // _TIMES) == 0:
                points.append(Point.now(number))
    return points


def _steps(folder: Path, count: int) -> list[Point]:
    """Of `pretrain`, with a checkpoint every 50 epochs."""
    (folder / "photos").mkdir()
    for number in range(_IMAGES):
        pixels = np.random.default_rng(number).integers(0, 256, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / f"{number}.png")
    config = PretrainConfig(
        data=str(folder / "photos"),
        out=folder / "run",
        model=_MODEL,
        decoder=_DECODER,
        optim=OptimConfig(epochs=max(1, count * _BATCH // _IMAGES), batch_size=_BATCH),
        images=DataConfig(num_workers=0),
        loop=LoopConfig(checkpoint_every=50),
        pictures_every=1_000_000,
        device="cpu",
    )
    with _watched(max(1, count // _TIMES)) as points:
        run_pretrain(config)
    return points


@contextmanager
def _watched(every: int) -> Iterator[list[Point]]:
    points, take = list[Point](), Stepper.take

    def watched(self: Stepper, batches: Any, before: int, *arguments: Any) -> Any:
        if (before + 1) % every == 0:
            points.append(Point.now(before + 1))
        return take(self, batches, before, *arguments)

    with mock.patch.object(Stepper, "take", watched):
        yield points


def _draw(path: Path, curves: dict[str, list[Point]]) -> None:
    """Memory above, open files and threads below, all from zero on."""
    with figure(path, 8.0, 4.0) as drawn:
        rows = drawn.subplots(2, 2, sharex="col", sharey="row", height_ratios=(3, 2))
        for column, (name, points) in enumerate(curves.items()):
            done, (above, below) = [point.done for point in points], rows[:, column]
            above.plot(done, [point.mib for point in points])
            below.plot(done, [point.files for point in points], color="C1", label="open files")
            below.plot(done, [point.threads for point in points], color="C2", label="threads")
            above.set_title(f"{done[-1]:,} {name}")
            below.set_xlabel(name)
            below.xaxis.set_major_formatter("{x:,.0f}")
        for row, label in zip(rows, ("memory, MiB", "number"), strict=True):
            row[0].set(ylabel=label, ylim=(0, 1.2 * max(axes.dataLim.ymax for axes in row)))
        legend_below(drawn, rows[1, 0], columns=2)


if __name__ == "__main__":
    if grown := main():
        sys.exit(f"grown: {'; '.join(grown)}")
