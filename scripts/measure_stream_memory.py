"""Whether the memory of a stream stays flat: many frames of a camera that misbehaves through the smallest model, random
weights. Prints the process's memory ten times, and fails where it has grown since the first.

    python -m scripts.measure_stream_memory [--frames 100000] [--cameras 1]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from mae_deploy.checkpoint import Metadata, save_checkpoint
from mae_deploy.cli import main as mae_deploy
from mae_deploy.config import to_dict
from mae_deploy.images.preprocess import default_preprocess
from mae_deploy.images.read import Array
from mae_deploy.models.config import EncoderConfig
from mae_deploy.models.vit import Encoder
from mae_deploy.runtime.backbone import Backbone

_MODEL = EncoderConfig(name="vit_nano_patch4", image_size=(24, 32))
_ALLOWED = 4.0
"""MiB by which allocators and thread pools may differ between two of the ten times."""


def main(arguments: Sequence[str] | None = None) -> float:
    """MiB by which the memory has grown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=100_000)
    parser.add_argument("--cameras", type=int, default=1)
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="mae-deploy-") as folder:
        torch.manual_seed(0)
        metadata = Metadata(
            kind="encoder", encoder=to_dict(_MODEL), preprocess=to_dict(default_preprocess(_MODEL.image_size))
        )
        save_checkpoint(Path(folder) / "checkpoint", Encoder(_MODEL).state_dict(), metadata)
        command = ["export", f"{folder}/checkpoint", "--out", f"{folder}/cached", "--tokens", "cached"]
        if mae_deploy(command):
            raise SystemExit("the export failed")
        with Backbone.load(Path(folder) / "cached", threads=1) as backbone:
            pool = backbone.stream_pool(given.cameras, bypass=0.7, audit=0.1)
            rng, seen, start = np.random.default_rng(0), list[float](), time.perf_counter()
            for number in range(given.frames):
                found = pool([_frame(rng, number) for _ in range(given.cameras)])
                if (number + 1) % max(1, given.frames // 10) == 0:
                    seen.append(_memory())
                    rate = (number + 1) / (time.perf_counter() - start)
                    print(f"{number + 1} frames  {seen[-1]:.1f} MiB  {rate:.0f} frames/s  cost {found[0].cost:.2f}")
    return seen[-1] - seen[0]


def _frame(rng: np.random.Generator, number: int) -> Array | None:
    """A square on its way over a still; each 97th frame is missing, and there are black ones, cuts and other sizes."""
    if number % 97 == 96:
        return None
    height, width = (36, 48) if number // 1009 % 2 == 0 else (48, 36)
    still = np.random.default_rng(number // 211).integers(60, 190, (height // 6, width // 6, 3), np.uint8)
    frame: Array = still.repeat(6, axis=0).repeat(6, axis=1)
    if number % 503 == 502:
        return np.zeros_like(frame)
    row, column = number % (height - 6), number * 2 % (width - 6)
    frame[row : row + 6, column : column + 6] = rng.integers(0, 256, 3, np.uint8)
    return frame


def _memory() -> float:
    """MiB that the process has written to and not given back, in memory or swapped out (Linux)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return sum(int(status.split(f"{name}:")[1].split()[0]) for name in ("RssAnon", "VmSwap")) / 1024


if __name__ == "__main__":
    if (grown := main()) > _ALLOWED:
        sys.exit(f"grown by {grown:.1f} MiB, more than {_ALLOWED:g}")
