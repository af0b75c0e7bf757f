"""What a stream's update costs beside the same patches without their surroundings, and a whole frame beside the full
graph: CPU time of the process, one thread, all graphs in turns. The weights are random. Prints a table.

    python -m scripts.measure_cached [--models vit_small_patch16 ...] [--engines onnxruntime openvino] [--keep 20]
        [--precision fp32|fp16] [--repeats 60]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mae_deploy.checkpoint import Metadata
from mae_deploy.config import to_dict
from mae_deploy.export.graph.encoder import build_graph
from mae_deploy.export.graph.spec import GraphSpec
from mae_deploy.images.preprocess import default_preprocess
from mae_deploy.models.config import EncoderConfig
from mae_deploy.models.vit import Encoder
from mae_deploy.reporting.tables import Column, Table
from mae_deploy.runtime.cache import CacheShape, TokenCache, update_cache
from mae_deploy.runtime.engines.base import Engine, EngineOptions
from mae_deploy.runtime.registry import open_graph
from mae_deploy.runtime.timing import measure


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The rows: model, engine, what ran, milliseconds, and the share of what it is compared with."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vit_small_patch16", "vit_base_patch16"])
    parser.add_argument("--engines", nargs="+", default=["onnxruntime", "openvino"])
    parser.add_argument("--keep", type=int, default=20)
    parser.add_argument("--precision", choices=["fp32", "fp16"], default="fp32")
    parser.add_argument("--repeats", type=int, default=60)
    given = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    for model in given.models:
        for engine in given.engines:
            with ExitStack() as stack:
                calls = dict(_calls(stack, EncoderConfig(name=model), engine, given.keep, given.precision))
                timings = measure(calls, repeats=given.repeats, warmup=5, clock=time.process_time)
            for name, timing in timings.items():
                beside = timings["full" if name in ("full", "whole frame") else "visible"]
                rows.append(
                    {
                        "model": model,
                        "engine": engine,
                        "graph": name,
                        "p50": timing.median * 1000,
                        "p10": timing.percentile(10) * 1000,
                        "ratio": timing.ratio(beside),
                        "ratio_p10": timing.percentile(10) / beside.percentile(10),
                    }
                )
    columns = (Column("model", "model"), Column("engine", "engine"), Column("graph", "graph"))
    figures = (Column("p50 ms", "p50", "{:.2f}"), Column("p10 ms", "p10", "{:.2f}"))
    ratios = (Column("ratio", "ratio", "{:.3f}"), Column("p10 ratio", "ratio_p10", "{:.3f}"))
    print(Table("CPU time of a call", (*columns, *figures, *ratios), rows).to_markdown())
    return rows


def _calls(
    stack: ExitStack, config: EncoderConfig, engine: str, keep: int, precision: Any
) -> Iterator[tuple[str, Callable[[], object]]]:
    """`visible` and `cached` with `keep` patches, each with a dynamic and a fixed K, and all patches of both."""
    torch.manual_seed(0)
    encoder = Encoder(config)
    metadata = Metadata(
        kind="encoder", encoder=to_dict(config), preprocess=to_dict(default_preprocess(config.image_size))
    )
    strong = {"precision": precision, "typing": "strong", "fp32_ops": ("softmax",), "cache": "float16"}
    types: dict[str, Any] = strong if precision == "fp16" else {}

    def opened(mode: Any, fixed: int | None = None) -> Engine:
        with tempfile.TemporaryDirectory(prefix="mae-deploy-") as folder:
            spec = GraphSpec(token_mode=mode, keep=fixed, **types)
            path = build_graph(metadata, encoder.state_dict(), spec).save(Path(folder) / "graph.onnx")[0]
            return stack.enter_context(open_graph(path, engine, EngineOptions(threads=1), precision=precision))

    rng = np.random.default_rng(0)
    N = config.num_patches
    images = rng.standard_normal((1, config.in_chans, *config.image_size), np.float32)
    patches = rng.standard_normal((1, N, config.patch_dim), np.float32)
    ids, everything = rng.permutation(N)[None, :keep], np.arange(N)[None]
    dynamic = opened("cached")
    for name, fixed in (("visible", keep), ("visible, any K", None)):
        yield name, partial(opened("visible", fixed).run, {"images": images, "ids_keep": ids})
    for name, fixed in (("cached", keep), ("cached, any K", None)):
        graph = dynamic if fixed is None else opened("cached", fixed)
        shape = CacheShape(
            num_patches=N,
            depth=config.blocks,
            num_heads=config.heads,
            embed_dim=config.width,
            dtype=types.get("cache", "float32"),
            fixed_rows=fixed is not None,
        )
        cache = TokenCache.empty(shape, 1)
        cache.computed[:] = True
        yield name, partial(update_cache, graph, cache, patches[:, :keep], ids)
    yield "full", partial(opened("full").run, {"images": images})
    yield "whole frame", partial(update_cache, dynamic, cache, patches, everything)


if __name__ == "__main__":
    main()
