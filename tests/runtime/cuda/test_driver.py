"""Which GPUs there are and why there are none, and CUDA graphs, on a stub of the driver."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from ctypes import byref, c_void_p
from pathlib import Path

import pytest

from mae_deploy.errors import MissingDependency
from mae_deploy.runtime.cuda import driver as cuda
from mae_deploy.runtime.cuda.driver import CudaError, CudaGraph, Gpu, gpus, require_gpu, seconds_on, wait_for_stream
from tests.runtime.cuda.stub_driver import StubMemory, calls

GPU = Gpu(index=0, name="Stub GPU 0", compute_capability=(9, 0), memory_bytes=7 << 30, driver="12.4")


def test_a_gpu(stub_driver: ctypes.CDLL) -> None:
    assert gpus() == [GPU]
    assert require_gpu() == GPU
    stub_driver.stub_configure(0, 2)
    assert require_gpu(1).name == "Stub GPU 1"
    assert "retain" not in calls(stub_driver), "no context is made"


def test_no_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cuda, "LIBRARY", str(tmp_path / "libcuda.so.1"))
    assert gpus() == []
    with pytest.raises(
        MissingDependency, match=r"there is no NVIDIA driver here: .*libcuda\.so\.1 cannot be loaded"
    ) as caught:
        require_gpu()
    assert "--gpus all" in (caught.value.hint or "")


def test_a_library_that_is_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "LIBRARY", "libc.so.6")
    assert gpus() == []
    with pytest.raises(MissingDependency, match=r"the NVIDIA driver is too old .*cuInit"):
        require_gpu()


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (100, "the NVIDIA driver sees no GPU"),
        (34, "stand-in that the CUDA toolkit brings"),
        (999, r"the NVIDIA driver does not start: unknown error \(error 999\)"),
        (803, r"the NVIDIA driver does not start: unknown error \(error 803\)"),
    ],
)
def test_a_driver_that_does_not_start(stub_driver: ctypes.CDLL, status: int, message: str) -> None:
    stub_driver.stub_configure(status, 1)
    assert gpus() == []
    with pytest.raises(MissingDependency, match=message):
        require_gpu()


def test_a_driver_without_a_gpu(stub_driver: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    stub_driver.stub_configure(0, 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(MissingDependency, match="sees no GPU") as caught:
        require_gpu()
    assert caught.value.hint == "nvidia-smi lists the GPUs of this machine"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(MissingDependency, match="sees no GPU") as caught:
        require_gpu()
    assert caught.value.hint == "CUDA_VISIBLE_DEVICES is '', which may hide them"


@pytest.mark.parametrize("index", [1, -1])
def test_a_gpu_that_is_not_there(stub_driver: ctypes.CDLL, index: int) -> None:
    with pytest.raises(MissingDependency, match=f"there is no GPU {index}") as caught:
        require_gpu(index)
    assert caught.value.hint == "this machine has: 0 (Stub GPU 0)"


# --- graphs ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def memory(stub_driver: ctypes.CDLL) -> Iterator[StubMemory]:
    """The stub's memory, with its context current."""
    with StubMemory(stub_driver) as memory, memory.active():
        yield memory


def test_a_graph_is_captured_and_launched(memory: StubMemory) -> None:
    driver, stream = memory.driver, memory.stream()
    launched: list[int] = []
    callback = ctypes.CFUNCTYPE(None, ctypes.c_long)(launched.append)
    driver.stub_on_launch(callback)
    driver.stub_capture.argtypes, driver.stub_capture.restype = (c_void_p,), ctypes.c_long
    captured: list[int] = []
    before = driver.stub_live()
    graph = CudaGraph.capture(stream.handle, lambda: captured.append(driver.stub_capture(stream.handle)))
    assert driver.stub_live() == before + 1, "the template is freed"
    assert driver.stub_capture(stream.handle) == 0
    for _ in range(3):
        graph.launch(stream.handle)
    assert captured == launched[:1]
    assert len(launched) == 3
    graph.close()
    graph.close()
    assert driver.stub_live() == before
    with pytest.raises(CudaError, match="CUDA cannot launch a CUDA graph"):
        graph.launch(stream.handle)


def test_what_fails_in_a_capture_ends_it(memory: StubMemory) -> None:
    stream = memory.stream()

    def fail() -> None:
        raise KeyError("mine")

    before = memory.driver.stub_live()
    with pytest.raises(KeyError, match="mine"):
        CudaGraph.capture(stream.handle, fail)
    with pytest.raises(CudaError, match=r"CUDA cannot capture a CUDA graph: .*901"):
        CudaGraph.capture(stream.handle, memory.driver.stub_break_capture)
    assert memory.driver.stub_live() == before
    CudaGraph.capture(stream.handle, lambda: None).close()


def test_the_default_stream_cannot_be_captured(memory: StubMemory) -> None:
    with pytest.raises(CudaError, match="CUDA cannot begin a CUDA graph"):
        CudaGraph.capture(0, lambda: None)


def test_a_stream_waits_for_another(memory: StubMemory) -> None:
    stream = memory.stream()
    before = memory.driver.stub_live()
    calls(memory.driver)
    wait_for_stream(stream.handle, 0)
    assert calls(memory.driver) == ["record", "wait"]
    assert memory.driver.stub_live() == before
    with pytest.raises(CudaError, match="record an event"):
        wait_for_stream(stream.handle, 12345)


def test_time_by_the_gpus_clock(memory: StubMemory) -> None:
    stream = memory.stream()
    before = memory.driver.stub_live()
    memory.driver.stub_work(5000)
    assert seconds_on(stream.handle, lambda: memory.driver.stub_work(250)) == pytest.approx(250e-6)
    assert seconds_on(stream.handle, lambda: None) == 0
    with pytest.raises(CudaError, match="record an event"):
        seconds_on(12345, lambda: None)
    assert memory.driver.stub_live() == before


def test_pop_context(stub_driver: ctypes.CDLL) -> None:
    with StubMemory(stub_driver) as memory:
        stub_driver.cuCtxPushCurrent_v2(memory._context)
        cuda.pop_context()
        assert stub_driver.stub_depth() == 0
        with pytest.raises(CudaError, match="leave a context"):
            cuda.pop_context()
    assert stub_driver.cuCtxPopCurrent_v2(byref(c_void_p())) != 0
