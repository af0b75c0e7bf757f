"""The driver, its memory and CUDA graphs on a GPU, without TensorRT."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from mae_deploy.runtime.cuda.driver import CudaError, CudaGraph, Gpu, gpus, wait_for_stream
from mae_deploy.runtime.cuda.memory import Memory
from mae_deploy.runtime.cuda.open_memory import open_memory

pytestmark = pytest.mark.gpu

NUMBERS = np.arange(35, dtype=np.float32).reshape(5, 7)


@pytest.fixture
def active(memory: Memory) -> Iterator[Memory]:
    """The memory with its context current."""
    with memory.active():
        yield memory


def pinned(memory: Memory, value: float | np.ndarray[Any, Any]) -> Any:
    array = memory.pinned(NUMBERS.nbytes).view(np.float32).reshape(NUMBERS.shape)
    array[...] = value
    return array


def test_what_the_driver_says(gpu: Gpu) -> None:
    assert gpu in gpus()
    assert gpu.name
    assert gpu.compute_capability >= (5, 0)
    assert gpu.memory_bytes > 1 << 28
    assert float(gpu.driver) >= 11.4


def test_copies(active: Memory) -> None:
    there, elsewhere, stream = active.allocate(NUMBERS.nbytes), active.allocate(NUMBERS.nbytes), active.stream()
    assert there % 256 == elsewhere % 256 == 0
    back = pinned(active, 0)
    active.copy_in(there, pinned(active, NUMBERS), stream)
    active.copy_device(elsewhere, there, NUMBERS.nbytes, stream)
    active.copy_out(back, elsewhere, stream)
    stream.synchronize()
    np.testing.assert_array_equal(back, NUMBERS)


def test_a_graph_repeats_what_was_captured(active: Memory) -> None:
    source, target, stream = active.allocate(NUMBERS.nbytes), active.allocate(NUMBERS.nbytes), active.stream()
    given, back = pinned(active, NUMBERS), pinned(active, 0)
    active.copy_in(target, back, stream)
    active.copy_in(source, given, stream)
    stream.synchronize()
    graph = CudaGraph.capture(stream.handle, lambda: active.copy_device(target, source, NUMBERS.nbytes, stream))
    active.copy_out(back, target, stream)
    stream.synchronize()
    assert not back.any(), "a capture computes nothing"
    for factor in (1, 2):
        given[...] = NUMBERS * factor
        active.copy_in(source, given, stream)
        graph.launch(stream.handle)
        active.copy_out(back, target, stream)
        stream.synchronize()
        np.testing.assert_array_equal(back, NUMBERS * factor)
    graph.close()


def test_what_cannot_be_captured(active: Memory) -> None:
    stream = active.stream()
    with pytest.raises(CudaError), active.active():
        CudaGraph.capture(stream.handle, stream.synchronize)
    stream.synchronize()
    with pytest.raises(CudaError, match="begin a CUDA graph"):
        CudaGraph.capture(0, lambda: None)


def test_streams_and_events(active: Memory) -> None:
    first, second, event = active.stream(), active.stream(), active.event()
    assert first.handle != second.handle
    second.wait(event)
    there, back = active.allocate(NUMBERS.nbytes), pinned(active, 0)
    active.copy_in(there, pinned(active, NUMBERS), first)
    event.record(first)
    second.wait(event)
    wait_for_stream(second.handle, first.handle)
    wait_for_stream(second.handle, 0)
    active.copy_out(back, there, second)
    second.synchronize()
    np.testing.assert_array_equal(back, NUMBERS)


def test_more_than_there_is(gpu: Gpu, memory: Memory) -> None:
    with pytest.raises(CudaError, match="out of memory"), memory.active():
        memory.allocate(2 * gpu.memory_bytes)


def test_another_thread_frees_and_closes(memory: Memory) -> None:
    with memory.active():
        pointer = memory.allocate(1000)
        memory.pinned(1000)
        memory.stream()
        memory.event()

    def work() -> None:
        with memory.active():
            memory.free(pointer)
        memory.close()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    with open_memory(memory.backend) as again, again.active():
        again.stream().synchronize()
