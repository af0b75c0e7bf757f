"""What fewer tokens bring on this GPU: encoders of several sizes in FP16 on several numbers of patches and images, as
PyTorch runs them, kernel by kernel and as the replay of a CUDA graph. Prints a row of JSON for each, and the page's
table at the end.

    python -m scripts.measure_tokens [--models vit_base_patch16 ...] [--keep 20 49 98 196] [--batch 1 8 32 128]
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mae_deploy.models.config import EncoderConfig
from mae_deploy.models.vit import Encoder
from mae_deploy.reporting.tables import Column, Table

MODELS = ("vit_tiny_patch16", "vit_small_patch16", "vit_base_patch16", "vit_large_patch16", "vit_huge_patch14")
SIDE = 8192
"""Of the square matrices whose product gives the GPU's rate."""
BOUND = 0.4
"""The share of a row's time from which on the arithmetic or the weights are said to bound it."""


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The rows: model, patches kept, batch, milliseconds eager and replayed, and what bounds the replay."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--keep", nargs="+", type=int, default=[20, 49, 98, 196])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32, 128])
    given = parser.parse_args(arguments)
    torch.manual_seed(0)
    flops, bandwidth = rates()
    print(
        json.dumps(
            {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "tflops": flops / 1e12}
            | {"tb_per_second": bandwidth / 1e12}
        ),
        flush=True,
    )
    rows = []
    for name in given.models:
        encoder = Encoder(EncoderConfig(name=name)).to("cuda", torch.float16).eval()
        for batch in given.batch:
            for keep in given.keep:
                row = {"model": name, "batch": batch, "keep": keep, **times(encoder, batch, keep)}
                row["bound"] = bound(encoder, row, flops, bandwidth)
                print(json.dumps(row), flush=True)
                rows.append(row)
    print(page(rows))
    return rows


def rates() -> tuple[float, float]:
    """Of the GPU: operations a second of a large FP16 product, and bytes a second that a copy reads and writes."""
    x, y = torch.randn(2, SIDE, SIDE, device="cuda", dtype=torch.float16)
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    product, copy = milliseconds(lambda: x @ y), milliseconds(lambda: target.copy_(source))
    return 2 * SIDE**3 / product * 1e3, 2 * source.nbytes / copy * 1e3


def times(encoder: Encoder, batch: int, keep: int) -> dict[str, float]:
    """Medians by the GPU's clock, in milliseconds."""
    config = encoder.config
    images = torch.randn(batch, config.in_chans, *config.image_size, device="cuda", dtype=torch.float16)
    ids_keep = torch.rand(batch, config.num_patches, device="cuda").argsort(1)[:, :keep].contiguous()

    def call() -> None:
        encoder(images, ids_keep)

    with torch.no_grad():
        eager = milliseconds(call, rounds=10)
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):  # what cannot be captured is done before
            for _ in range(3):
                call()
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
    return {"eager_ms": eager, "replay_ms": milliseconds(graph.replay)}


def milliseconds(work: Callable[[], object], *, rounds: int = 30) -> float:
    """The median of a call's time on the GPU, after three calls that are not counted."""
    found: list[float] = []
    for _ in range(3 + rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end))
    return statistics.median(found[3:])


def bound(encoder: Encoder, row: dict[str, Any], flops: float, bandwidth: float) -> str:
    """What a row's time mostly is: compute, the reading of the weights, or neither: the kernels' own latency."""
    config = encoder.config
    T, D = 1 + row["keep"], config.width
    weights = sum(parameter.numel() for parameter in encoder.parameters())
    attention = 4 * config.blocks * T * T * D
    needed = {
        "compute": row["batch"] * (2 * weights * T + attention) / flops,
        "weights": 2 * weights / bandwidth,
    }
    name = max(needed, key=lambda key: needed[key])
    return name if needed[name] > BOUND * row["replay_ms"] / 1e3 else "launch"


def page(rows: Sequence[dict[str, Any]]) -> str:
    """The table of the results' page: a line for each model and batch, a column for each number of patches."""
    keeps = sorted({row["keep"] for row in rows})
    lines: list[dict[str, Any]] = []
    for model, batch in dict.fromkeys((row["model"], row["batch"]) for row in rows):
        found = {row["keep"]: row for row in rows if (row["model"], row["batch"]) == (model, batch)}
        most = found[max(found)]["replay_ms"]
        cells = {
            str(keep): f"{row['replay_ms']:.2f} {row['bound']} ({most / row['replay_ms']:.2f}x)"
            for keep, row in found.items()
        }
        lines.append({"model": model, "batch": batch, **cells})
    columns = [
        Column("model", "model"),
        Column("batch", "batch"),
        *(Column(f"{keep} patches", str(keep)) for keep in keeps),
    ]
    return Table("", columns, lines).to_markdown()


if __name__ == "__main__":
    main()
