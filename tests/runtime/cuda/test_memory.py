"""The packages that give the GPU's memory: which is taken, what is said without them, and cuda-bindings itself on the
stub driver.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mae_deploy.errors import ConfigError, MissingDependency
from mae_deploy.runtime.cuda import driver as cuda
from mae_deploy.runtime.cuda.open_memory import INSTALL, open_memory
from tests.runtime.cuda.stub_driver import NAME, compile_stub


def test_an_unknown_backend() -> None:
    with pytest.raises(ConfigError, match="unknown CUDA backend 'cupy'") as caught:
        open_memory("cupy")
    assert caught.value.hint == "known: auto, pycuda, cuda-bindings"


def test_the_gpu_is_looked_for_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cuda, "LIBRARY", str(tmp_path / "nothing"))
    with pytest.raises(MissingDependency, match="no NVIDIA driver"):
        open_memory()


@pytest.mark.usefixtures("stub_driver")
@pytest.mark.parametrize(
    ("backend", "said"), [("pycuda", ["pycuda"]), ("cuda-bindings", ["cuda"]), ("auto", ["pycuda", "cuda"])]
)
def test_without_the_packages(backend: str, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycuda", None)
    monkeypatch.setitem(sys.modules, "pycuda.driver", None)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    with pytest.raises(MissingDependency) as caught:
        open_memory(backend)
    assert all(f"the package '{name}'" in str(caught.value) for name in said)
    assert caught.value.hint == INSTALL


SCRIPT = """
import atexit, ctypes, sys, threading
import numpy as np
from mae_deploy.runtime.cuda.driver import CudaError
from mae_deploy.runtime.cuda.open_memory import open_memory

driver = ctypes.CDLL("libcuda.so.1")
driver.stub_limit.argtypes = (ctypes.c_long,)
atexit.register(lambda: print(driver.stub_live()))
memory = open_memory(sys.argv[1])
assert memory.backend == sys.argv[1]
assert driver.stub_depth() == 0, "the context is current only inside active()"
with memory.active():
    first, second = memory.allocate(140), memory.allocate(140)
    assert first % 256 == second % 256 == 0
    pinned, stream, event = memory.pinned(140), memory.stream(), memory.event()
    numbers = pinned.view(np.float32).reshape(5, 7)
    numbers[...] = np.arange(35).reshape(5, 7)
    memory.copy_in(first, numbers, stream)
    event.record(stream)
    stream.wait(event)
    memory.copy_device(second, first, 140, stream)
    numbers[...] = 0
    memory.copy_out(numbers[2:], second, stream)
    stream.synchronize()
    assert numbers.reshape(-1).tolist() == [0] * 14 + list(range(21))
    with memory.active():
        assert driver.stub_depth() >= 1
    assert driver.stub_depth() == 1
    memory.allocate(0)
try:
    with memory.active():
        driver.stub_limit(10)
        memory.allocate(11)
except CudaError as error:
    assert "out of memory" in str(error), error
else:
    raise AssertionError("nothing was raised")
def free():
    with memory.active():
        memory.free(first)
for work in (free, memory.close, memory.close):  # from threads that did not make them
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
assert driver.stub_live() == 0, driver.stub_live()
assert driver.stub_depth() == 0
driver.stub_limit(1000)
left_open = open_memory(sys.argv[1])
with left_open.active():
    left_open.allocate(1)
    left_open.stream()
    left_open.pinned(1)
print(driver.stub_live())
"""


def test_cuda_bindings_on_the_stub_driver(tmp_path: Path) -> None:
    pytest.importorskip("cuda.bindings.driver")
    compile_stub(tmp_path, soname=NAME)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "CUDA_STUB_DEVICES": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, "cuda-bindings"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "4\n0\n", "")


def test_the_stub_counts_what_is_not_given_back(stub_driver: ctypes.CDLL) -> None:
    before = stub_driver.stub_live()
    stub_driver.cuDevicePrimaryCtxRetain(ctypes.byref(ctypes.c_void_p()), 0)
    assert stub_driver.stub_live() == before + 1
    stub_driver.cuDevicePrimaryCtxRelease_v2(0)
    assert stub_driver.stub_live() == before
