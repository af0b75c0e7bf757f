"""Embed a collection in turns with the engine alone, as `benchmark` times it, and compare the CPU time of an image.

    python scripts/measure_embed.py DATA BUNDLE [BUNDLE …]

Where all cores are busy, the rates are as the inverse of these times, whatever else the machine does meanwhile.
"""

from __future__ import annotations

import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from mae_deploy.commands.embed.config import EmbedConfig
from mae_deploy.commands.embed.run import run_embed
from mae_deploy.runtime import Backbone

BATCH, ROUNDS = 8, 3


def cpu_seconds(work: Callable[[], object]) -> float:
    """Of this process and its children."""
    before = _used()
    work()
    return _used() - before


def _used() -> float:
    return sum(
        used.ru_utime + used.ru_stime
        for used in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def embed(config: EmbedConfig, found: dict[str, int]) -> None:
    """Call the command."""
    found.update(run_embed(config).data)


def repeat(work: Callable[[], object], times: int) -> None:
    """Do it so often."""
    for _ in range(times):
        work()


def main(data: str, *bundles: str) -> None:
    """Print a row of Markdown for each bundle."""
    print("| bundle | engine | alone, CPU ms an image | embed, CPU ms an image | rate of embed | cores busy |")
    print("|---|---|---|---|---|---|")
    for bundle in bundles:
        with Backbone.load(bundle) as backbone:
            outputs = tuple(name for name in ("cls", "pooled", "logits") if name in backbone.output_names)
            H, W = backbone.preprocess.image_size
            pixels = np.random.default_rng(0).integers(0, 256, (BATCH, H, W, 3), dtype=np.uint8)
            backbone.run_cropped(pixels, outputs=outputs)
            alone, whole, busy = [], [], []
            for _ in range(ROUNDS):
                with tempfile.TemporaryDirectory() as folder:
                    out = Path(folder) / "features"
                    config = EmbedConfig(data=data, bundle=Path(bundle), out=out, engine_workers=1, batch_size=BATCH)
                    started = time.perf_counter()
                    found: dict[str, int] = {}
                    seconds = cpu_seconds(partial(embed, config, found))
                    whole.append(seconds / found["images"])
                    busy.append(seconds / (time.perf_counter() - started))
                times = 1 + found["images"] // BATCH
                run = partial(backbone.run_cropped, pixels, outputs=outputs)
                alone.append(cpu_seconds(partial(repeat, run, times)) / times / BATCH)
            ratio = statistics.median(alone) / statistics.median(whole)
            first, second = (1000 * statistics.median(times) for times in (alone, whole))
            name = f"{Path(bundle).name} | {backbone.engine.name}"
            print(f"| {name} | {first:.1f} | {second:.1f} | {ratio:.2f} | {statistics.median(busy):.2f} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
