"""Runs of a TensorRT engine: two in flight, so that the copies of one overlap the computation of the other, and
replayed as CUDA graphs.

A slot has a stream, and memory for the inputs and outputs of one run on the GPU and pinned on the host, for the largest
shapes. Shapes of inputs get an execution context of their own, since TensorRT allows no change to a context whose work
was captured: the first ones that a slot meets, and from then on those that come back soon, in place of what was not
used for longest. Others share a context and run without a graph. All contexts use the same memory for activations, so
what computes, or chooses its profile, waits for what computed before. A run allocates nothing on the GPU unless its
shapes are new.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mae_deploy.errors import ConfigError, MaeDeployError
from mae_deploy.images.read import Array
from mae_deploy.runtime.cuda.arrays import DeviceArray, DeviceView, is_on_device, view_of
from mae_deploy.runtime.cuda.driver import CudaGraph, seconds_on, wait_for_stream
from mae_deploy.runtime.cuda.memory import Memory
from mae_deploy.runtime.tensorrt.api import Api
from mae_deploy.runtime.tensorrt.slots import Prepared, Slot, Ticket
from mae_deploy.runtime.tensorrt.tensors import (
    ProfileRange,
    Shape,
    Tensor,
    activation_bytes,
    check_dtype,
    check_shapes,
    choose_profile,
    create_context,
    read_profiles,
    read_tensors,
    runtime_config,
)

NUM_SLOTS = 2
MOST_CONTEXTS = 16
"""Shapes of inputs that have a context and a graph of their own in a slot, which costs some milliseconds once, and a
little memory; and how many others are remembered, to give one to those that come back."""

_log = logging.getLogger(__name__)


class PlanRunner:
    """A deserialised engine with its memory; calls from several threads take turns to start a run."""

    def __init__(self, api: Api, memory: Memory, engine: Any, index: int, *, kernels: Path | None = None) -> None:
        """Take over `memory`, whose context is current, and `engine`: `close` frees both.

        Args:
            kernels: TensorRT for RTX only, the file in which kernels are kept that were compiled here.
        """
        self._api = api
        self._memory = memory
        self._engine = engine
        self._index = index
        self._turn = threading.Lock()
        self.inputs, self.outputs = read_tensors(api.module, engine)
        self.profiles: list[ProfileRange] = read_profiles(engine, self.inputs)
        self._config, self._kernels = runtime_config(api.module, engine, kernels)
        self._activation_bytes = activation_bytes(engine)
        self._activations = memory.allocate(self._activation_bytes)
        tensors = {**self.inputs, **self.outputs}
        largest = self._largest(tensors)
        self._slots = [Slot(memory, tensors, largest, index=index) for _ in range(NUM_SLOTS)]
        """What was used last stands last."""

    def start(
        self, inputs: Mapping[str, Any], outputs: Sequence[str], *, holder: object, on_device: bool, use_graphs: bool
    ) -> Ticket:
        """Put a run on the GPU; where two are in flight already, the first of them is waited for.

        Args:
            inputs: all of them, on the host or on the GPU.
            holder: what must live as long as outputs on the GPU are used.
            on_device: leave the outputs on the GPU.

        Raises:
            ConfigError: inputs that no profile covers or of another type, or BF16 outputs that shall stay on the GPU.
            MaeDeployError: the engine is closed, or TensorRT or CUDA refuses the run.
        """
        if on_device:
            self._check_stays(outputs)
        with self._turn:
            slot = self._free_slot()
            prepared = self._begin(slot, inputs, () if on_device else outputs, use_graphs=use_graphs)
            ticket = Ticket(slot, prepared, inputs, outputs, holder, on_device=on_device)
            slot.hold(ticket)
            return ticket

    def start_beside(
        self, inputs: Mapping[str, Any], outputs: Sequence[str], *, holder: object, stream: int, use_graphs: bool
    ) -> dict[str, DeviceArray]:
        """Put a run on the GPU between what is on a stream of the caller's now and what comes there next, and return
        its outputs, which are complete for that stream.

        Raises:
            ConfigError, MaeDeployError: as `start`.
        """
        self._check_stays(outputs)
        with self._turn:
            slot = self._free_slot()
            with self._memory.active():
                wait_for_stream(slot.stream.handle, stream)
                prepared = self._begin(slot, inputs, (), use_graphs=use_graphs)
                wait_for_stream(stream, slot.stream.handle)
            slot.hold(Ticket(slot, prepared, inputs, outputs, holder, on_device=True), inputs)
            return slot.on_device(outputs, prepared, holder, stream)

    def timer(self, inputs: Mapping[str, Any], *, replays: int, use_graphs: bool) -> Callable[[], float]:
        """Run these inputs, and return what runs them again: the GPU's seconds for one of `replays` runs in a row,
        whose inputs and outputs stay on it; nothing else may run in between.

        Raises:
            ConfigError, MaeDeployError: as `start`; the latter where the time is taken, too.
        """
        with self._turn:
            slot = self._free_slot()
            prepared = self._begin(slot, inputs, (), use_graphs=use_graphs)
            slot.wait()

        def enqueue() -> None:
            for _ in range(replays):
                self._enqueue(prepared, slot, use_graphs=use_graphs)

        def seconds() -> float:
            with self._turn:
                self._check_open()
                with self._memory.active():
                    return seconds_on(slot.stream.handle, enqueue) / replays

        return seconds

    def close(self) -> None:
        """Wait for the runs in flight, and free everything; closing twice does nothing."""
        with self._turn:
            if self._engine is None:
                return
            for slot in self._slots:
                slot.finish()
            with self._memory.active():
                for slot in self._slots:
                    slot.close()
                self._keep_kernels()
                self._kernels = self._config = self._engine = None
            self._memory.close()

    def _check_stays(self, outputs: Sequence[str]) -> None:
        if any(self.outputs[name].bfloat16 for name in outputs):
            raise ConfigError("outputs in BF16 cannot stay on the GPU", hint="take them as NumPy arrays")

    def _check_open(self) -> None:
        if self._engine is None:
            raise MaeDeployError("this engine is closed", hint="load the bundle again")

    def _begin(self, slot: Slot, inputs: Mapping[str, Any], copied_out: Sequence[str], *, use_graphs: bool) -> Prepared:
        """Put a run on a free slot's stream; where that fails, nothing of it is left there."""
        with self._memory.active():
            try:
                return self._launch(slot, inputs, copied_out, use_graphs=use_graphs)
            except BaseException:
                slot.stream.synchronize()  # what was begun must not meet the next run
                raise

    def _free_slot(self) -> Slot:
        """A free slot, the one that was used last unless its outputs are being read on the GPU; else that whose run was
        started first, after that run.
        """
        self._check_open()
        free = [slot for slot in reversed(self._slots) if slot.is_free] or self._slots[:1]
        slot = next((slot for slot in free if not slot.is_lent), free[-1])
        slot.finish()
        self._slots.remove(slot)
        self._slots.append(slot)
        return slot

    def _launch(
        self, slot: Slot, inputs: Mapping[str, Any], copied_out: Sequence[str], *, use_graphs: bool
    ) -> Prepared:
        memory, stream = self._memory, slot.stream
        given = {name: self._as_input(tensor, inputs[name], stream.handle) for name, tensor in self.inputs.items()}
        prepared = self._prepare(slot, {name: array.shape for name, array in given.items()})
        slot.use_again()
        for name, array in given.items():
            if isinstance(array, DeviceView):
                if array.stream is not None:
                    wait_for_stream(stream.handle, array.stream)
                memory.copy_device(slot.pointers[name], array.pointer, prepared.host[name].nbytes, stream)
            else:
                np.copyto(prepared.host[name], array, casting="unsafe")  # check_dtype has looked at it
                memory.copy_in(slot.pointers[name], prepared.host[name], stream)
        self._wait_for_others(slot)
        self._enqueue(prepared, slot, use_graphs=use_graphs)
        slot.computed.record(stream)
        for name in copied_out:
            memory.copy_out(prepared.host[name], slot.pointers[name], stream)
        return prepared

    def _wait_for_others(self, slot: Slot) -> None:
        """Let what comes on a slot's stream wait for what the others compute, in the same memory."""
        for other in self._slots:
            if other is not slot:
                slot.stream.wait(other.computed)

    def _as_input(self, tensor: Tensor, value: Any, stream: int) -> Array | DeviceView:
        if not is_on_device(value):
            array = np.asarray(value)
            check_dtype(tensor, array)
            return array
        view = view_of(value, tensor.name, index=self._index, stream=stream)
        if view.dtype != tensor.dtype:
            raise ConfigError(
                f"the input {tensor.name} on the GPU is {view.dtype}, the engine takes {tensor.dtype}",
                hint=f"give {tensor.dtype}",
            )
        return view

    def _enqueue(self, prepared: Prepared, slot: Slot, *, use_graphs: bool) -> None:
        handle = slot.stream.handle
        if use_graphs and prepared.graph is not None:
            prepared.graph.launch(handle)
            return

        def execute() -> None:
            if not prepared.context.execute_async_v3(handle):
                raise self._api.refuse("run this engine")

        execute()
        if use_graphs and prepared.can_be_captured:
            slot.stream.synchronize()  # the first run does what cannot be captured
            try:
                prepared.graph = CudaGraph.capture(handle, execute)
            except MaeDeployError as error:
                prepared.can_be_captured = False
                _log.warning("TensorRT runs without a CUDA graph: %s", error)
            self._keep_kernels()  # now: a service is rather killed than closed

    def _keep_kernels(self) -> None:
        if self._kernels is not None:
            self._kernels.keep()

    # --- contexts
    # ------------------------------------------------------------------------------------------------------

    def _prepare(self, slot: Slot, shapes: dict[str, Shape]) -> Prepared:
        """The context for inputs of these shapes in a slot."""
        key = tuple(shapes.values())
        prepared = slot.find(key)
        if prepared is not None:
            return prepared
        profile = choose_profile(self.profiles, shapes)
        is_own = slot.has_room_for(key, most=MOST_CONTEXTS)
        context = None if is_own else slot.shared.get(profile.index)
        if context is None:
            self._wait_for_others(slot)
            context = self._create_context(profile, slot.stream.handle)
            for name, pointer in slot.pointers.items():
                if not context.set_tensor_address(name, pointer):
                    raise self._api.refuse(f"use the memory of {name}")
        outputs = self._set_shapes(context, shapes)
        prepared = Prepared(context, outputs, slot.host_views({**shapes, **outputs}), can_be_captured=is_own)
        if is_own:
            slot.prepared[key] = prepared
        else:
            slot.shared[profile.index] = context
        return prepared

    def _create_context(self, profile: ProfileRange, stream: int) -> Any:
        self._api.said.clear()
        context = create_context(
            self._api.module, self._engine, self._activations, self._activation_bytes, self._config
        )
        if context is None:
            raise self._api.refuse("make an execution context")
        hint = "build the engine again: mae-deploy build-engine BUNDLE"
        with self._api.explained(f"use profile {profile.index} in another context", hint=hint):
            context.set_optimization_profile_async(profile.index, stream)
        return context

    def _set_shapes(self, context: Any, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """Give the inputs their shapes, and return those of the outputs."""
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                raise self._api.refuse(f"take {name} of shape {shape}")
        given = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        with self._api.explained(f"tell the shapes of the outputs for {given}"):
            missing = context.infer_shapes()
        outputs = {name: tuple(context.get_tensor_shape(name)) for name in self.outputs}
        check_shapes(missing, outputs)
        return outputs

    def _largest(self, tensors: Mapping[str, Tensor]) -> dict[str, int]:
        """The most bytes of each tensor in any profile."""
        most = dict.fromkeys(tensors, 0)
        stream = self._memory.stream()
        for profile in self.profiles:
            context = self._create_context(profile, stream.handle)
            for name, shape in {**profile.most, **self._set_shapes(context, profile.most)}.items():
                most[name] = max(most[name], tensors[name].nbytes(shape))
            stream.synchronize()  # the choice of a profile may copy; the context goes now
        return most
