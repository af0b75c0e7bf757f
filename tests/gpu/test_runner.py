"""The engine on a GPU: what it computes, from several threads and from arrays on the GPU, and that nothing is left
behind. What it costs: scripts/measure_gpu.py.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mae_deploy.errors import ConfigError, MaeDeployError
from mae_deploy.runtime.cuda.driver import LIBRARY
from mae_deploy.runtime.cuda.memory import Memory, Stream
from mae_deploy.runtime.cuda.open_memory import BACKENDS
from mae_deploy.runtime.engines.base import EngineOptions
from mae_deploy.runtime.tensorrt.api import Api
from mae_deploy.runtime.tensorrt.engine import TensorRtEngine
from tests.gpu.tiny_plan import C, D, H, W, build, inputs, reference

pytestmark = pytest.mark.gpu

ATOL = 1e-5
"""FP32 without TF32, sums of at most 35 numbers near 1."""

WIDE = ({"B": (1, 8, 32), "K": (2, 49, 196)}, {"B": (1, 1, 1), "K": (49, 49, 49)})
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def plans(api: Api, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Plans by what they are for."""
    folder = tmp_path_factory.mktemp("plans")
    contents = {
        "dynamic": build(api),
        "fixed": build(api, {"B": (2, 2, 2), "K": (3, 3, 3)}),
        "wide": build(api, *WIDE),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return {name: folder / name for name in contents}


@pytest.fixture(params=tuple(BACKENDS))
def options(request: pytest.FixtureRequest, memory_packages: dict[str, bool]) -> EngineOptions:
    """Options with each backend that is installed."""
    if not memory_packages[request.param]:
        pytest.skip(f"{request.param} is not installed")
    return EngineOptions(cuda_memory=request.param)


@pytest.fixture(scope="session")
def memory_packages() -> dict[str, bool]:
    """Which of the packages that give the GPU's memory can be imported."""
    found = {}
    for backend, module in zip(BACKENDS, ("pycuda.driver", "cuda.bindings.driver"), strict=True):
        try:
            __import__(module)
        except ImportError:
            found[backend] = False
        else:
            found[backend] = True
    return found


@pytest.fixture(autouse=True)
def no_context_is_left_current(api: Api) -> Iterator[None]:
    """The calling thread has the context after a test that it had before."""
    before = current_context()
    yield
    if "torch" not in sys.modules:
        assert current_context() == before


def current_context() -> int | None:
    context = ctypes.c_void_p()
    assert ctypes.CDLL(LIBRARY).cuCtxGetCurrent(ctypes.byref(context)) == 0
    return context.value


def check(found: dict[str, Any], given: dict[str, Any]) -> None:
    expected = reference(**given)
    for name, values in found.items():
        np.testing.assert_allclose(values, expected[name], atol=ATOL)


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("ids", [np.int32, np.int64])
def test_runs(plans: dict[str, Path], options: EngineOptions, graphs: bool, ids: type) -> None:
    with TensorRtEngine(plans["dynamic"], replace(options, cuda_graphs=graphs)) as engine:
        assert (set(engine.input_names), set(engine.output_names)) == ({"images", "ids_keep"}, {"pooled", "tokens"})
        for seed in range(4):
            for batch, keep in ((2, 3), (1, 13), (4, 2)):
                given = inputs(batch, keep, seed)
                check(engine.run({**given, "ids_keep": given["ids_keep"].astype(ids)}), given)
        prepared = [prepared for slot in engine._runner._slots for prepared in slot.prepared.values()]
        assert {prepared.graph is not None for prepared in prepared} == {graphs}, (
            "a graph was captured where it should be"
        )


def test_a_plan_of_fixed_shapes(plans: dict[str, Path], options: EngineOptions) -> None:
    with TensorRtEngine(plans["fixed"], options) as engine:
        for seed in range(3):
            check(engine.run(inputs(2, 3, seed)), inputs(2, 3, seed))
        with pytest.raises(ConfigError, match=r"this engine takes no images \(1, 3, 5, 7\)"):
            engine.run(inputs(1, 3))


def test_two_profiles(plans: dict[str, Path], options: EngineOptions) -> None:
    with TensorRtEngine(plans["wide"], options) as engine:
        for _ in range(2):
            for batch, keep in ((1, 49), (1, 2), (32, 196), (7, 49), (1, 49)):
                check(engine.run(inputs(batch, keep)), inputs(batch, keep))
        with pytest.raises(ConfigError, match="it takes images"):
            engine.run(inputs(33, 49))
        assert len(engine._runner.profiles) == 2


def test_more_shapes_than_get_a_graph(plans: dict[str, Path]) -> None:
    with TensorRtEngine(plans["wide"], EngineOptions()) as engine:
        for _ in range(2):
            for keep in range(2, 40):
                check(engine.run(inputs(3, keep, keep)), inputs(3, keep, keep))


def test_threads(plans: dict[str, Path], options: EngineOptions) -> None:
    with TensorRtEngine(plans["wide"], options) as engine:
        failures: list[BaseException] = []

        def work(seed: int) -> None:
            try:
                for step in range(50):
                    given = inputs(1 + seed % 4, 2 + (seed + step) % 5, 100 * seed + step)
                    check(engine.run(given), given)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []


def test_two_in_flight(plans: dict[str, Path], options: EngineOptions) -> None:
    with TensorRtEngine(plans["wide"], options) as engine:
        tickets = [engine.submit(inputs(3, 49, seed)) for seed in range(6)]
        for seed in (5, 0, 3, 1, 4, 2):
            check(tickets[seed].result(), inputs(3, 49, seed))


# --- on the GPU ------------------------------------------------------------------------------------------------------


class OnGpu:
    """An array in memory of the test's own, shown through the CUDA array interface."""

    def __init__(self, memory: Memory, stream: Stream, array: Any) -> None:
        self.memory, self.stream, self.array = memory, stream, array
        with memory.active():
            self.pointer = memory.allocate(array.nbytes)
            pinned = memory.pinned(array.nbytes).view(array.dtype).reshape(array.shape)
            pinned[...] = array
            memory.copy_in(self.pointer, pinned, stream)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.array.shape,
            "typestr": self.array.dtype.str,
            "data": (self.pointer, False),
            "version": 3,
            "stream": self.stream.handle,
        }


def read(memory: Memory, array: Any) -> Any:
    interface = array.__cuda_array_interface__
    dtype, shape = np.dtype(interface["typestr"]), interface["shape"]
    with memory.active():
        pinned, stream = memory.pinned(int(np.prod(shape)) * dtype.itemsize).view(dtype).reshape(shape), memory.stream()
        memory.copy_out(pinned, interface["data"][0], stream)
        stream.synchronize()
    return pinned.copy()


def test_arrays_on_the_gpu(plans: dict[str, Path], memory: Memory) -> None:
    given = inputs(4, 13)
    with TensorRtEngine(plans["dynamic"], EngineOptions(cuda_memory=memory.backend)) as engine:
        with memory.active():
            stream = memory.stream()
        on_gpu = {name: OnGpu(memory, stream, array) for name, array in given.items()}
        for _ in range(3):
            check(engine.run(on_gpu), given)
            check(engine.run({**given, "images": on_gpu["images"]}), given)
            check({name: read(memory, array) for name, array in engine.run_on_device(on_gpu).items()}, given)
        first, second = (engine.run_on_device(given)["pooled"] for _ in range(2))
        np.testing.assert_array_equal(read(memory, first), read(memory, second))
        engine.run(given)
        with pytest.raises(MaeDeployError, match="this output is gone"):
            _ = first.pointer


def test_its_speed_by_the_gpus_clock(plans: dict[str, Path]) -> None:
    with TensorRtEngine(plans["dynamic"], EngineOptions()) as engine:
        timer = engine.timer(inputs(4, 13), replays=3)
        assert all(0 < timer() < 1 for _ in range(3))
        check(engine.run(inputs(4, 13)), inputs(4, 13))


def test_torch_gives_and_takes(plans: dict[str, Path]) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    given = inputs(4, 13)
    tensors = {name: torch.from_numpy(array).cuda() for name, array in given.items()}
    with TensorRtEngine(plans["dynamic"], EngineOptions()) as engine:
        for _ in range(3):
            found = engine.run_on_device({**tensors, "images": tensors["images"] * 2 / 2})
            check({name: torch.from_dlpack(array).cpu().numpy() for name, array in found.items()}, given)
            check({name: torch.as_tensor(array, device="cuda").cpu().numpy() for name, array in found.items()}, given)
            images = tensors["images"] * 1
            found = engine.run_on_device({**tensors, "images": images}, stream=torch.cuda.current_stream().cuda_stream)
            images.zero_()  # after the run has read them
            check({name: torch.from_dlpack(array).cpu().numpy() for name, array in found.items()}, given)
        with pytest.raises(ConfigError, match="strides"):
            engine.run({**tensors, "images": tensors["images"].transpose(2, 3)})
    assert float((tensors["images"] * 1).sum()) == pytest.approx(float(given["images"].sum()), rel=1e-3), (
        "torch's context is whole"
    )


# --- what it leaves behind -------------------------------------------------------------------------------------------


def free_bytes(memory: Memory) -> int:
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    with memory.active():
        assert ctypes.CDLL(LIBRARY).cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)) == 0
    return free.value


def test_the_steady_state_allocates_nothing(plans: dict[str, Path], memory: Memory) -> None:
    with TensorRtEngine(plans["wide"], EngineOptions(cuda_memory=memory.backend)) as engine:
        shapes = [(1, 49), (8, 49), (32, 196)]

        def work() -> None:
            for batch, keep in shapes:
                for ticket in [engine.submit(inputs(batch, keep)) for _ in range(3)]:
                    ticket.result()

        for _ in range(3):
            work()
        before = free_bytes(memory)
        for _ in range(30):
            work()
        assert free_bytes(memory) == before


def test_closing_gives_everything_back(plans: dict[str, Path], memory: Memory) -> None:
    def once() -> None:
        with TensorRtEngine(plans["wide"], EngineOptions(cuda_memory=memory.backend)) as engine:
            for keep in (2, 49, 196):
                engine.run(inputs(32, keep))

    once()  # TensorRT keeps some for the next engine
    once()
    before = free_bytes(memory)
    for _ in range(5):
        once()
    assert free_bytes(memory) >= before - (4 << 20)  # what a leak of one engine's buffers a turn would exceed


# --- the end ---------------------------------------------------------------------------------------------------------


LEFT_OPEN = """
import sys, threading
from pathlib import Path
from mae_deploy.runtime.engines.base import EngineOptions
from mae_deploy.runtime.tensorrt.engine import TensorRtEngine
from tests.gpu.tiny_plan import inputs
engine = TensorRtEngine(Path(sys.argv[1]), EngineOptions(cuda_memory=sys.argv[2]))
thread = threading.Thread(target=lambda: engine.run(inputs(2, 3)))
thread.start()
thread.join()
ticket, output = engine.submit(inputs(2, 3)), engine.run_on_device(inputs(2, 3))
print("done")
"""


def test_an_engine_left_open_leaves_no_word_behind(plans: dict[str, Path], options: EngineOptions) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", LEFT_OPEN, str(plans["dynamic"]), options.cuda_memory]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_what_is_no_plan(api: Api, tmp_path: Path) -> None:
    (tmp_path / "a.plan").write_bytes(b"this is no plan" * 1000)
    with pytest.raises(MaeDeployError, match=f"TensorRT {api.version} cannot load this engine: .+") as caught:
        TensorRtEngine(tmp_path / "a.plan", EngineOptions())
    assert "build-engine" in (caught.value.hint or "")


def test_sizes_are_those_of_the_network(plans: dict[str, Path]) -> None:
    with TensorRtEngine(plans["dynamic"], EngineOptions()) as engine:
        found = engine.run(inputs(4, 13))
        assert {name: array.shape for name, array in found.items()} == {"pooled": (4, D), "tokens": (4, 13, D)}
        (profile,) = engine._runner.profiles
        assert profile.most == {"images": (4, C, H, W), "ids_keep": (4, 13)}
