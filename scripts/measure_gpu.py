"""Time bundles' TensorRT engines on this machine's GPU in turns: a call of ours from arrays on the GPU and on the host,
TensorRT's bare enqueue and the bare replay of its CUDA graph, and with a checkpoint PyTorch in FP16, eager and
compiled. `mae-deploy benchmark` times whole engines and other runtimes; this shows what our runner adds, and what
TensorRT gains over PyTorch. Prints rows as JSON.

    python -m scripts.measure_gpu BUNDLE... [--checkpoint CKPT] [--compile] [--batch 1 8 32] [--repeats 100]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mae_deploy.errors import ConfigError
from mae_deploy.images.read import Array
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.cuda.driver import CudaGraph
from mae_deploy.runtime.cuda.memory import Memory
from mae_deploy.runtime.cuda.open_memory import open_memory
from mae_deploy.runtime.engines.base import EngineOptions
from mae_deploy.runtime.manifest import IDS_KEEP, IMAGES
from mae_deploy.runtime.tensorrt.api import Api, load_tensorrt
from mae_deploy.runtime.tensorrt.engine import TensorRtEngine
from mae_deploy.runtime.tensorrt.open_plan import open_plan
from mae_deploy.runtime.tensorrt.plans import find_plan, reason_against_plans
from mae_deploy.runtime.tensorrt.tensors import (
    activation_bytes,
    choose_profile,
    create_context,
    read_profiles,
    read_tensors,
)
from mae_deploy.runtime.timing import measure

Call = Callable[[], object]
Candidate = tuple[dict[str, Any], Callable[[int], Call | None]]
"""What tells a candidate from others, and what gives its call for a batch size; None where it does not take it."""

BARE = "tensorrt, bare"
REPLAY = "tensorrt, bare replay"
"""The engines of the rows of `RawCalls`: an enqueue, and the replay of the CUDA graph that was captured from one."""


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The rows: engine, precision, tokens, batch, where the arrays are, and the times in milliseconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--checkpoint", type=Path, help="time PyTorch beside, with these weights")
    parser.add_argument("--compile", action="store_true", help="torch.compile as well")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=100)
    given = parser.parse_args(arguments)
    bundles = [Bundle.load(path) for path in given.bundles]
    with ExitStack() as stack:
        candidates = list(tensorrt_candidates(bundles, stack))
        if given.checkpoint is not None:
            keeps = {None if bundle.token_mode == "full" else bundle.keep_range[0] for bundle in bundles}
            candidates += pytorch_candidates(given.checkpoint, keeps, compiled=given.compile)
        return [row for batch in given.batch for row in timed(candidates, batch, given.repeats)]


def timed(candidates: Sequence[Candidate], batch: int, repeats: int) -> list[dict[str, Any]]:
    """Rows of the candidates that take this batch size, timed in turns."""
    calls = {index: call for index, (_, make) in enumerate(candidates) if (call := make(batch)) is not None}
    timings = measure(calls, repeats=repeats, warmup=max(3, repeats // 5)) if calls else {}
    return [
        {**candidates[index][0], "batch": batch, **timing.to_dict(), "images_per_second": batch / timing.median}
        for index, timing in timings.items()
    ]


def tensorrt_candidates(bundles: Sequence[Bundle], stack: ExitStack) -> Iterator[Candidate]:
    """Every bundle's engine: inputs and outputs on the GPU, inputs and outputs on the host, and TensorRT's bare call.

    Raises:
        ConfigError: a bundle has no engine that fits.
    """
    api = load_tensorrt()
    memory = stack.enter_context(open_memory(index=api.gpu.index))
    for bundle in bundles:
        entry = find_plan(bundle, api.version, api.gpu)
        if entry is None:
            raise ConfigError(reason_against_plans(bundle, api.version, api.gpu))
        engine = stack.enter_context(open_plan(bundle, entry, EngineOptions()))
        row = {"engine": "tensorrt", "precision": entry["precision"], "tokens": bundle.token_mode}
        yield {**row, "arrays": "gpu"}, partial(_on_device, engine, bundle, memory)
        yield {**row, "arrays": "host"}, partial(_on_host, engine, bundle)
        if not entry["stripped"]:
            raw = RawCalls(api, memory, bundle.file(entry["file"]).read_bytes())
            stack.callback(raw.close)
            yield {**row, "arrays": "gpu", "engine": BARE}, partial(_bare, raw, bundle, False)
            yield {**row, "arrays": "gpu", "engine": REPLAY}, partial(_bare, raw, bundle, True)


def _on_device(engine: TensorRtEngine, bundle: Bundle, memory: Memory, batch: int) -> Call | None:
    inputs: dict[str, Any] = random_inputs(bundle, batch)
    inputs[IMAGES] = OnDevice(memory, inputs[IMAGES])  # the indices are small, and of another width on TensorRT 8
    return _if_it_runs(partial(engine.run_on_device, inputs))


def _on_host(engine: TensorRtEngine, bundle: Bundle, batch: int) -> Call | None:
    return _if_it_runs(partial(engine.run, random_inputs(bundle, batch)))


def _bare(raw: RawCalls, bundle: Bundle, replay: bool, batch: int) -> Call | None:
    return raw.call(random_inputs(bundle, batch), replay=replay)


def _if_it_runs(call: Call) -> Call | None:
    try:
        call()
    except ConfigError as error:  # no profile holds this batch
        print(error, file=sys.stderr)
        return None
    return call


class OnDevice:
    """An array on the GPU as other libraries see it."""

    def __init__(self, memory: Memory, array: Array) -> None:
        with memory.active():
            stream, pointer = memory.stream(), memory.allocate(array.nbytes)
            memory.copy_in(pointer, array, stream)
            stream.synchronize()
        self.__cuda_array_interface__ = {
            "shape": array.shape,
            "typestr": array.dtype.str,
            "data": (pointer, False),
            "stream": None,
            "version": 3,
        }


def random_inputs(bundle: Bundle, batch: int) -> dict[str, Array]:
    """Images and patches at random; the same for every candidate of a batch size."""
    rng = np.random.default_rng(0)
    images = next(entry for entry in bundle.inputs if entry["name"] == IMAGES)
    inputs: dict[str, Array] = {
        IMAGES: (
            rng.standard_normal((batch, *(int(side) for side in images["shape"][1:])), np.float32).astype(
                images["dtype"]
            )
        )
    }
    if IDS_KEEP in bundle.input_names:
        N, K = bundle.num_patches, bundle.keep_range[0]
        inputs[IDS_KEEP] = np.stack([rng.permutation(N)[:K] for _ in range(batch)])
    return inputs


class RawCalls:
    """One engine as TensorRT's own tool calls it: everything is on the GPU already, one enqueue or replay, one wait."""

    def __init__(self, api: Api, memory: Memory, content: bytes) -> None:
        self._api, self._memory = api, memory
        with memory.active():
            engine = api.deserialize(content)
            inputs, outputs = read_tensors(api.module, engine)
            self._engine: Any = engine
            self._stream, self._nbytes = memory.stream(), activation_bytes(engine)
            self._activations = memory.allocate(self._nbytes)
        self._inputs, self._tensors, self._profiles = inputs, {**inputs, **outputs}, read_profiles(engine, inputs)
        self._contexts: list[Any] = []
        self._graphs: list[CudaGraph] = []

    def call(self, given: dict[str, Array], *, replay: bool) -> Call | None:
        """An enqueue with these inputs, or the replay of one; None where no profile holds them."""
        try:
            profile = choose_profile(self._profiles, {name: array.shape for name, array in given.items()})
        except ConfigError:
            return None
        with self._memory.active():
            context = create_context(self._api.module, self._engine, self._activations, self._nbytes)
            context.set_optimization_profile_async(profile.index, self._stream.handle)
            for name, array in given.items():
                context.set_input_shape(name, array.shape)
            for name, tensor in self._tensors.items():
                pointer = self._memory.allocate(tensor.nbytes(tuple(context.get_tensor_shape(name))))
                context.set_tensor_address(name, pointer)
                if name in given:
                    self._memory.copy_in(pointer, np.ascontiguousarray(given[name], tensor.dtype), self._stream)
                    self._stream.synchronize()
        self._contexts.append(context)
        enqueue = partial(self._enqueue, context)
        if not replay:
            return partial(self._run, enqueue)
        self._run(enqueue)  # the first run does what cannot be captured
        with self._memory.active():
            graph = CudaGraph.capture(self._stream.handle, enqueue)
        self._graphs.append(graph)
        return partial(self._run, partial(graph.launch, self._stream.handle))

    def close(self) -> None:
        """Free what TensorRT holds; it must go before the memory."""
        with self._memory.active():
            for graph in self._graphs:
                graph.close()
            self._graphs.clear()
            self._contexts.clear()
            self._engine = None

    def _enqueue(self, context: Any) -> None:
        if not context.execute_async_v3(self._stream.handle):
            raise self._api.refuse("run this engine")

    def _run(self, start: Call) -> None:
        with self._memory.active():
            start()
            self._stream.synchronize()


def pytorch_candidates(checkpoint: Path, keeps: Collection[int | None], *, compiled: bool) -> Iterator[Candidate]:
    """The encoder in FP16 on `keeps` patches, None for all; inputs and outputs on the GPU."""
    import torch

    from mae_deploy.weights.load import encoder_of, read_weights

    encoder = encoder_of(read_weights(checkpoint)).to("cuda", torch.float16).eval()
    for engine in ("pytorch", "torch.compile") if compiled else ("pytorch",):
        for keep in keeps:
            row = {"engine": engine, "precision": "fp16", "tokens": "full" if keep is None else "visible"}
            yield {**row, "arrays": "gpu"}, partial(_torch_call, encoder, keep, engine == "torch.compile")


def _torch_call(encoder: Any, keep: int | None, compiled: bool, batch: int) -> Call:
    """A call of the encoder; compiled for this shape alone, at batch 1, where launches cost most, as CUDA graphs."""
    import torch

    config, model = encoder.config, encoder
    if compiled:
        torch._dynamo.config.recompile_limit = 64  # kernels of their own for each shape, not for shapes left open
        model = torch.compile(encoder, dynamic=False, mode="reduce-overhead" if batch == 1 else None)
    images = torch.randn(batch, config.in_chans, *config.image_size, device="cuda", dtype=torch.float16)
    order = torch.rand(batch, config.num_patches, device="cuda").argsort(1)
    ids_keep = None if keep is None else order[:, :keep].contiguous()

    def call() -> None:
        with torch.inference_mode():
            model(images, ids_keep)
        torch.cuda.synchronize()

    for _ in range(3):  # compiles, warms up, records
        call()
    return call


if __name__ == "__main__":
    print(json.dumps(main()))
