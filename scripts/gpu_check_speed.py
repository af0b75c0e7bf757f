"""Time one model on this machine's GPU: TensorRT engines, PyTorch and ONNX Runtime, as far as they are installed, in
turns in one process.

`gpu_check.py` runs it in a process of its own: `python -m scripts.gpu_check_speed REQUEST`, REQUEST a JSON file; the
rows are printed as JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mae_deploy.errors import ConfigError, MaeDeployError
from mae_deploy.images.read import Array
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.cuda.memory import Memory
from mae_deploy.runtime.cuda.open_memory import open_memory
from mae_deploy.runtime.engines.base import Engine, EngineOptions
from mae_deploy.runtime.manifest import IDS_KEEP, IMAGES
from mae_deploy.runtime.registry import load_engine
from mae_deploy.runtime.tensorrt.api import Api, load_tensorrt
from mae_deploy.runtime.tensorrt.plans import find_plan
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
"""The engine of the rows of `RawCalls`."""


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


# --- TensorRT --------------------------------------------------------------------------------------------------------


def tensorrt_candidates(bundles: list[Bundle], stack: ExitStack) -> Iterator[Candidate]:
    """Every bundle's fitting engine: inputs and outputs on the GPU, inputs and outputs on the host, and TensorRT's bare
    call.
    """
    api = load_tensorrt()
    memory = stack.enter_context(open_memory(index=api.gpu.index))
    for bundle in bundles:
        entry = find_plan(bundle, api.version, api.gpu)
        if entry is None:
            continue
        engine: Any = stack.enter_context(load_engine(bundle, "tensorrt"))
        row = {
            "engine": "tensorrt",
            "version": api.version,
            "precision": entry["precision"],
            "tokens": bundle.token_mode,
        }
        yield {**row, "arrays": "gpu"}, partial(_on_device, engine, bundle, memory)
        yield {**row, "arrays": "host"}, partial(_on_host, engine, bundle)
        if not entry["stripped"]:
            raw = RawCalls(api, memory, bundle.file(entry["file"]).read_bytes())
            stack.callback(raw.close)
            yield {**row, "arrays": "gpu", "engine": BARE}, partial(_bare, raw, bundle)


def _on_device(engine: Any, bundle: Bundle, memory: Memory, batch: int) -> Call | None:
    inputs: dict[str, Any] = random_inputs(bundle, batch)
    inputs[IMAGES] = OnDevice(memory, inputs[IMAGES])  # the indices are small, and of another width on TensorRT 8
    return _if_it_runs(partial(engine.run_on_device, inputs))


def _on_host(engine: Engine, bundle: Bundle, batch: int) -> Call | None:
    return _if_it_runs(partial(engine.run, random_inputs(bundle, batch)))


def _bare(raw: RawCalls, bundle: Bundle, batch: int) -> Call | None:
    return raw.call(random_inputs(bundle, batch))


def _if_it_runs(call: Call) -> Call | None:
    try:
        call()
    except MaeDeployError as error:
        print(error, file=sys.stderr)
        return None
    return call


class RawCalls:
    """One engine as TensorRT's own tool calls it: everything is on the GPU already, one enqueue, one wait."""

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

    def call(self, given: dict[str, Array]) -> Call | None:
        """An enqueue with these inputs; None where no profile holds them."""
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
        return partial(self._run, context)

    def close(self) -> None:
        """Free what TensorRT holds; it must go before the memory."""
        with self._memory.active():
            self._contexts.clear()
            self._engine = None

    def _run(self, context: Any) -> None:
        with self._memory.active():
            if not context.execute_async_v3(self._stream.handle):
                raise self._api.refuse("run this engine")
            self._stream.synchronize()


# --- PyTorch ---------------------------------------------------------------------------------------------------------


def pytorch_candidates(name: str, checkpoint: Path | None, keep: int, compiled: bool) -> Iterator[Candidate]:
    """The encoder in FP16 and BF16, all patches and `keep` of them, eager and compiled; without a checkpoint its
    weights are random.
    """
    import torch

    from mae_deploy.models.config import EncoderConfig
    from mae_deploy.models.vit import Encoder
    from mae_deploy.weights.load import encoder_of, read_weights

    for precision, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        encoder = Encoder(EncoderConfig(name=name)) if checkpoint is None else encoder_of(read_weights(checkpoint))
        model = encoder.to("cuda", dtype).eval()
        variants = {"pytorch": model, **({"torch.compile": torch.compile(model)} if compiled else {})}
        for engine, variant in variants.items():
            for tokens in ("full", "visible"):
                row = {
                    "engine": engine,
                    "version": torch.__version__,
                    "precision": precision,
                    "tokens": tokens,
                    "arrays": "gpu",
                }
                yield row, partial(_torch_call, variant, model.config, keep if tokens == "visible" else None, dtype)


def _torch_call(model: Any, config: Any, keep: int | None, dtype: Any, batch: int) -> Call:
    import torch

    images = torch.randn(batch, config.in_chans, *config.image_size, device="cuda", dtype=dtype)
    ids_keep = (
        None if keep is None else torch.rand(batch, config.num_patches, device="cuda").argsort(1)[:, :keep].contiguous()
    )

    def call() -> None:
        with torch.inference_mode():
            model(images, ids_keep)
        torch.cuda.synchronize()

    call()  # compiles
    return call


# --- ONNX Runtime ----------------------------------------------------------------------------------------------------


def onnxruntime_candidates(bundles: list[Bundle], stack: ExitStack) -> Iterator[Candidate]:
    """FP16 bundles on CUDA; inputs and outputs on the host."""
    for bundle in bundles:
        if bundle.precision == "fp16":
            engine = stack.enter_context(load_engine(bundle, "onnxruntime", EngineOptions(device="cuda")))
            row = {
                "engine": "onnxruntime",
                "version": engine.version,
                "precision": "fp16",
                "tokens": bundle.token_mode,
                "arrays": "host",
            }
            yield row, partial(_on_host, engine, bundle)


# --- all of them -----------------------------------------------------------------------------------------------------


def timed(candidates: list[Candidate], batches: list[int], repeats: int) -> list[dict[str, Any]]:
    """Rows of every candidate at every batch size; those of one batch size take turns."""
    rows = []
    for batch in batches:
        calls = {index: call for index, (_, make) in enumerate(candidates) if (call := make(batch)) is not None}
        timings = measure(calls, repeats=repeats, warmup=max(3, repeats // 5)) if calls else {}
        rows += [
            {**candidates[index][0], "batch": batch, **timing.to_dict(), "images_per_second": batch / timing.median}
            for index, timing in timings.items()
        ]
    return rows


def main(request: dict[str, Any]) -> list[dict[str, Any]]:
    """Time what the request names: bundles, model, checkpoint, keep, parts, compile, batches, repeats."""
    bundles = [Bundle.load(path) for path in request["bundles"]]
    parts = request["parts"]
    with ExitStack() as stack:
        candidates: list[Candidate] = []
        if "tensorrt" in parts:
            candidates += tensorrt_candidates(bundles, stack)
        if "pytorch" in parts:
            checkpoint = Path(request["checkpoint"]) if request["checkpoint"] else None
            candidates += pytorch_candidates(request["model"], checkpoint, request["keep"], request["compile"])
        if "onnxruntime" in parts:
            candidates += onnxruntime_candidates(bundles, stack)
        return timed(candidates, request["batches"], request["repeats"])


if __name__ == "__main__":
    print(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
