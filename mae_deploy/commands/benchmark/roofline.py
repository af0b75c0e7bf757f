"""What bounds a row: the arithmetic, the bytes that it must move, or neither, which leaves what a call and its kernels
cost whatever they compute; after the roofline of Williams, Waterman and Patterson (2009),
https://doi.org/10.1145/1498765.1498785.

The rates are this machine's, measured on the engine itself in the run: large products, a vector times a matrix that no
cache holds, and a product of one number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mae_deploy.commands.benchmark.rows import BenchmarkRow
from mae_deploy.errors import MaeDeployError
from mae_deploy.files import temporary_folder
from mae_deploy.progress import notice
from mae_deploy.runtime.engines.base import EngineOptions
from mae_deploy.runtime.manifest import PLANNED, num_prefix
from mae_deploy.runtime.onnx_file import write_products
from mae_deploy.runtime.registry import TENSORRT_RTX, open_graph
from mae_deploy.runtime.timing import take_turns

BOUND = 0.4
"""The share of a row's time from which on the arithmetic or the bytes are said to bound it."""

Kind = Literal["compute", "weights", "call"]


@dataclass(frozen=True, slots=True)
class Yardstick:
    """A product `(rows, size) x (size, size)`, `length` times in a call, in 4 or 2 bytes a number."""

    engine: str
    kind: Kind
    rows: int
    size: int
    length: int
    itemsize: int = 4

    @property
    def work(self) -> int:
        """What a call does: operations, or bytes of weights; one call."""
        products = self.length * self.size**2
        return {"compute": 2 * self.rows * products, "weights": self.itemsize * products, "call": 1}[self.kind]


def yardsticks(engine: str) -> list[Yardstick]:
    """Those of an engine: on the CPU in FP32, several products a call, so that the call itself costs nothing; on a GPU
    in FP16, of a size that fills it.
    """
    if engine in PLANNED:
        return [
            Yardstick(engine, "compute", 4096, 4096, 4, 2),
            Yardstick(engine, "weights", 1, 8192, 1, 2),
            Yardstick(engine, "call", 1, 1, 1, 2),
        ]
    return [
        Yardstick(engine, "compute", 768, 768, 4),
        Yardstick(engine, "weights", 1, 4096, 1),
        Yardstick(engine, "call", 1, 1, 1),
    ]


def open_yardsticks(
    engines: Sequence[str], options: EngineOptions, stack: ExitStack
) -> dict[Yardstick, Callable[[], object]]:
    """What runs each yardstick of the engines that read graphs.

    Args:
        stack: closes them.
    """
    found: dict[Yardstick, Callable[[], object]] = {}
    for engine in engines:
        for yardstick in yardsticks(engine) if engine not in PLANNED else ():
            with temporary_folder() as folder:
                loaded = stack.enter_context(open_graph(_written(yardstick, folder), engine, options))
            found[yardstick] = partial(loaded.run, {"x": _input(yardstick)})
    return found


def measure_on_gpu(engines: Sequence[str], options: EngineOptions, *, repeats: int) -> dict[Yardstick, float]:
    """Seconds of each yardstick of the engines that run plans, by the GPU's clock, without copies; an engine that
    builds none is left out, and that is said.
    """
    found: dict[Yardstick, float] = {}
    for engine in engines:
        if engine not in PLANNED:
            continue
        with ExitStack() as stack:
            try:
                timers = {
                    yardstick: stack.enter_context(_built(yardstick, options)).timer(
                        {"x": _input(yardstick)}, replays=5
                    )
                    for yardstick in yardsticks(engine)
                }
                timings = take_turns(timers, repeats=repeats, warmup=3)
                found |= {yardstick: timing.median for yardstick, timing in timings.items()}
            except MaeDeployError as error:
                notice("no roofline:", f"{engine}: {error}")
    return found


def rates_of(seconds: Mapping[Yardstick, float]) -> dict[str, dict[Kind, float]]:
    """Of each engine: operations and bytes a second, and the seconds of an empty call."""
    rates: dict[str, dict[Kind, float]] = {}
    for yardstick, time in seconds.items():
        own = rates.setdefault(yardstick.engine, {})
        own[yardstick.kind] = time if yardstick.kind == "call" else yardstick.work / time
    return rates


def bytes_moved(row: BenchmarkRow) -> int | None:
    """What a call cannot do without: weights once, images in, outputs out, the residual stream read and written by
    each block; of a stream all keys and values as well. None for a graph of other origin.
    """
    subject = row.subject
    if subject.bundle is None or row.patches is None:
        return None
    model, wide = subject.bundle.model, 4 if row.precision == "fp32" else 2
    D, depth, first = model["embed_dim"], model["depth"], num_prefix(model)
    image = int(np.prod(subject.image_shape)) * np.dtype(subject.image_dtype).itemsize
    stream = 2 * depth * (first + row.patches) * D * wide
    cache = 2 * depth * (first + subject.num_patches) * D * wide if subject.token_mode == "cached" else 0
    return subject.size_bytes + row.batch * (image + stream + cache)


def roofline(
    row: BenchmarkRow, seconds: float, flops: int | None, rates: Mapping[Kind, float]
) -> dict[str, Any] | None:
    """What bounds a row that takes `seconds`, and the least time that each alone would need; None where that is not
    known.

    Args:
        flops: of one image.
        rates: of its engine, see `rates_of`.
    """
    moved = bytes_moved(row)
    if flops is None or moved is None or not rates:
        return None
    needed = {"compute": flops * row.batch / rates["compute"], "weights": moved / rates["weights"]}
    largest = max(needed, key=lambda name: needed[name])
    return {
        "bound": largest if needed[largest] >= BOUND * seconds else "launch",
        "compute_ms": 1000 * needed["compute"],
        "weights_ms": 1000 * needed["weights"],
        "call_ms": 1000 * rates["call"],
    }


def _input(yardstick: Yardstick) -> Any:
    dtype = np.float32 if yardstick.itemsize == 4 else np.float16
    return np.random.default_rng(0).standard_normal((yardstick.rows, yardstick.size), np.float32).astype(dtype)


def _written(yardstick: Yardstick, folder: Path) -> Path:
    path = folder / "products.onnx"
    write_products(path, yardstick.size, yardstick.length, rows=yardstick.rows, half=yardstick.itemsize == 2)
    return path


def _built(yardstick: Yardstick, options: EngineOptions) -> Any:
    """A plan of it, on the GPU."""
    from mae_deploy.runtime.tensorrt.build import build_plan
    from mae_deploy.runtime.tensorrt.engine import TensorRtEngine, TensorRtRtxEngine, gpu_index

    rtx = yardstick.engine == TENSORRT_RTX
    with temporary_folder() as folder:
        plan = folder / "products.plan"
        build_plan(
            _written(yardstick, folder),
            plan,
            precision="fp16",
            typing="strong",
            profiles=[],
            index=gpu_index(options.device),
            rtx=rtx,
        )
        return (TensorRtRtxEngine if rtx else TensorRtEngine)(plan, options, precision="fp16")
