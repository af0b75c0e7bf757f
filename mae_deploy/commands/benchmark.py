"""`mae-deploy benchmark`: what bundles cost on this machine, timed in turns; torch-free."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from mae_deploy.commands.config import BenchmarkConfig
from mae_deploy.errors import ConfigError
from mae_deploy.options import Result
from mae_deploy.runtime.backbone import Backbone
from mae_deploy.runtime.benchmark import measure


def run(config: BenchmarkConfig) -> Result:
    """Time the engine alone: preprocessed random images in, outputs out.

    Raises:
        ConfigError: a bundle is named twice.
    """
    names = [str(path) for path in config.bundles]
    if len(set(names)) < len(names):
        raise ConfigError(f"a bundle is named twice: {', '.join(names)}")
    rng = np.random.default_rng(config.seed)
    with ExitStack() as stack:
        calls: dict[str, Callable[[], object]] = {}
        rows: list[dict[str, Any]] = []
        for name, path in zip(names, config.bundles, strict=True):
            backbone = stack.enter_context(Backbone.load(path, config.engine, device=config.device, threads=config.threads))
            call, row = _call(backbone, config, rng)
            calls[name] = call
            rows.append({"bundle": name, **row})
        timings = measure(calls, repeats=config.repeats, warmup=config.warmup)
    first = timings[names[0]]
    for row in rows:
        timing = timings[row["bundle"]]
        row |= {**timing.to_dict(), "images_per_second": row["batch"] / timing.median, "ratio": timing.ratio(first)}
    return Result(rows, _table(rows))


def _call(backbone: Backbone, config: BenchmarkConfig, rng: np.random.Generator) -> tuple[Callable[[], object], dict[str, Any]]:
    bundle, preprocess = backbone.bundle, backbone.preprocess
    batch = bundle.fixed_batch or config.batch_size
    images = rng.standard_normal((batch, preprocess.channels, *preprocess.image_size), np.float32)
    N = backbone.num_patches
    keep = None
    if bundle.token_mode == "visible":
        K = bundle.fixed_keep or max(1, int(N * config.keep_ratio))
        keep = np.stack([rng.permutation(N)[:K] for _ in range(batch)])
    row = {"tokens": bundle.token_mode, "patches": N if keep is None else keep.shape[1], "batch": batch, "engine": backbone.engine.name}
    return partial(backbone, images, keep), row


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table("bundle", "tokens", "patches", "batch", "median ms", "p95 ms", "images/s", "ratio")
    for row in rows:
        figures = (f"{row['p50_ms']:.2f}", f"{row['p95_ms']:.2f}", f"{row['images_per_second']:.1f}", f"{row['ratio']:.3f}")
        table.add_row(Text(row["bundle"], overflow="fold"), row["tokens"], str(row["patches"]), str(row["batch"]), *figures)
    return table
