"""TensorRT on an NVIDIA GPU: runs a plan that was built on this device or one like it."""

from __future__ import annotations

import re
import traceback
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mae_deploy.errors import ConfigError, MaeDeployError
from mae_deploy.files import mapped
from mae_deploy.images.read import Array
from mae_deploy.runtime.cuda.arrays import DeviceArray
from mae_deploy.runtime.cuda.driver import Gpu
from mae_deploy.runtime.cuda.open_memory import open_memory
from mae_deploy.runtime.engines.base import Engine, EngineOptions
from mae_deploy.runtime.tensorrt.api import Api, load_tensorrt
from mae_deploy.runtime.tensorrt.kernel_cache import kernel_file
from mae_deploy.runtime.tensorrt.rtx import load_rtx
from mae_deploy.runtime.tensorrt.runner import NUM_SLOTS, PlanRunner
from mae_deploy.runtime.tensorrt.slots import Ticket

_DEVICE = re.compile(r"auto|cpu|cuda(?::(\d+))?")


class TensorRtEngine(Engine):
    """A plan on the GPU; calls from several threads overlap one's copies with the other's computation.

    Inputs are NumPy arrays or arrays on the GPU: whatever has `__cuda_array_interface__` or DLPack. A plan is code: the
    caller has checked its hash.
    """

    name = "tensorrt"
    device = "cuda"
    in_flight = NUM_SLOTS
    gpu: Gpu
    plan: Path
    """The file that was loaded."""
    use_graphs: bool
    """Whether runs are replayed as CUDA graphs."""
    _load_library = staticmethod(load_tensorrt)

    def __init__(
        self,
        graph: Path,
        options: EngineOptions,
        *,
        precision: str = "fp32",
        taps: Sequence[str] = (),
        profiles: Sequence[Mapping[str, Sequence[int]]] = (),
        host_code: bool = False,
        weights: Path | None = None,
    ) -> None:
        """Load a plan, as `Engine` does a graph; `taps` must be outputs that it was built with.

        Args:
            options: `device` names a GPU where it is `cuda:1` and so on; else it is the first one.
            host_code: let the plan bring code for the CPU, as a version-compatible one does.
            weights: the ONNX file with the weights of a plan that was built without.
        """
        self._host_code = host_code
        self._weights = weights
        super().__init__(graph, options, precision=precision, taps=taps, profiles=profiles)
        self._again = partial(self._again, host_code=host_code, weights=weights and weights.absolute())

    def run(self, inputs: Mapping[str, Any], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """As that of every engine, and for inputs on the GPU as well."""
        return super().run(inputs, outputs)

    def submit(self, inputs: Mapping[str, Any], outputs: Sequence[str] | None = None) -> Ticket:
        """Start a run and return at once; `result()` of the ticket gives what `run` returns.

        Two runs can be in flight; a third one waits for the first. The inputs on the GPU must stay as they are until
        the result was taken.

        Raises:
            ConfigError: inputs or outputs that the engine does not have, or inputs that no profile covers.
            MaeDeployError: TensorRT or CUDA refuses the run, or the engine is closed.
        """
        return self._start(inputs, self._check(inputs, outputs), on_device=False)

    def run_on_device(
        self, inputs: Mapping[str, Any], outputs: Sequence[str] | None = None, *, stream: int | None = None
    ) -> dict[str, DeviceArray]:
        """As `run`, but the outputs stay on the GPU, complete; the second run after this one may use their memory
        again.

        Args:
            stream: a CUDA stream of the caller's, by its handle, that waits in the caller's place: this returns at
                once. The inputs are read after what is on it now, and what comes on it next finds the outputs complete,
                may write to the inputs, and is done before the memory of outputs is used again by a run with it.

        Raises:
            ConfigError: as `submit`, or an output in BF16.
            MaeDeployError: as `submit`.
        """
        if stream is not None:
            return self._runner.start_beside(
                inputs, self._check(inputs, outputs), holder=self, stream=stream, use_graphs=self.use_graphs
            )
        return self._start(inputs, self._check(inputs, outputs), on_device=True).result()

    def timer(self, inputs: Mapping[str, Any], *, replays: int) -> Callable[[], float]:
        """What gives the GPU's own time for a run of these inputs, in seconds, at each call: the mean of `replays` runs
        in a row, whose inputs and outputs stay on it. The engine must run nothing else until the last call.

        Raises:
            ConfigError: as `submit`.
            MaeDeployError: as `submit`.
        """
        self._check(inputs, None)
        return self._runner.timer(inputs, replays=replays, use_graphs=self.use_graphs)

    def _close(self) -> None:
        """Wait for the runs in flight, and free all that is on the GPU."""
        self._closer()

    def _abandon(self) -> None:
        super()._abandon()
        self._closer.detach()  # it would run at the end of the process

    def _load(self, graph: Path, options: EngineOptions, precision: str, taps: tuple[str, ...]) -> None:
        index = gpu_index(options.device)
        api = self._load_library(index)
        self.version, self.gpu, self.plan = api.version, api.gpu, graph
        self.use_graphs = options.cuda_graphs
        memory = open_memory(options.cuda_memory, index)
        try:
            with memory.active():
                plan = api.deserialize(mapped(graph), host_code=self._host_code, weights=self._weights)
                self._runner = PlanRunner(api, memory, plan, index, kernels=self._kernel_file(api))
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # what TensorRT has made must go before the memory
            memory.close()
            raise
        # Also when the engine is forgotten, and before the interpreter ends: the GPU's memory must go before the
        # packages that know it.
        self._closer = weakref.finalize(self, self._runner.close)
        self.input_names, self.output_names = tuple(self._runner.inputs), tuple(self._runner.outputs)
        missing = [tap for tap in taps if tap not in self.output_names]
        if missing:
            self.close()
            raise MaeDeployError(
                f"the engine {graph} has no output {missing[0]}",
                hint="an inner tensor must be marked as an output when the engine is built",
            )

    def _kernel_file(self, api: Api) -> Path | None:
        return None

    def _run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        return self._start(inputs, outputs, on_device=False).result()

    def _start(self, inputs: Mapping[str, Any], outputs: Sequence[str], *, on_device: bool) -> Ticket:
        return self._runner.start(inputs, outputs, holder=self, on_device=on_device, use_graphs=self.use_graphs)


class TensorRtRtxEngine(TensorRtEngine):
    """A plan of TensorRT for RTX, which makes its kernels on this GPU and keeps them in the folder of caches."""

    name = "tensorrt-rtx"
    _load_library = staticmethod(load_rtx)

    def _kernel_file(self, api: Api) -> Path:
        return kernel_file(api, self.plan)


def gpu_index(device: str) -> int:
    """Which GPU `EngineOptions.device` means: the first, unless it is `cuda:1` and so on.

    Raises:
        ConfigError: no such device.
    """
    found = _DEVICE.fullmatch(device)
    if found is None:
        raise ConfigError(f"unknown device '{device}'", hint="cuda is the first GPU, cuda:1 the second")
    return int(found[1] or 0)
