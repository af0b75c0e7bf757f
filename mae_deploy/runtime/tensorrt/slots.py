"""Room for the runs of a TensorRT engine: memory, a stream, and what is prepared for each shape; and the ticket that
the caller of a run holds.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from mae_deploy.images.read import Array
from mae_deploy.runtime.cuda.arrays import DeviceArray, Lease
from mae_deploy.runtime.cuda.driver import CudaError, CudaGraph
from mae_deploy.runtime.cuda.memory import Memory
from mae_deploy.runtime.tensorrt.tensors import Shape, Tensor, to_numpy


class Prepared:
    """An execution context whose inputs have their shapes, and its work as a CUDA graph once it has run."""

    def __init__(
        self, context: Any, outputs: Mapping[str, Shape], host: dict[str, Array], *, can_be_captured: bool
    ) -> None:
        self.context: Any = context
        self.outputs = outputs
        self.host = host
        """Pinned memory in the tensors' shapes and types."""
        self.graph: CudaGraph | None = None
        self.can_be_captured = can_be_captured

    def close(self) -> None:
        """Free the graph, then the context, while the CUDA context is current."""
        if self.graph is not None:
            self.graph.close()
        self.context = None


class Ticket:
    """A run that was started; whoever holds it keeps the engine open."""

    def __init__(
        self,
        slot: Slot,
        prepared: Prepared,
        inputs: Mapping[str, Any],
        outputs: Sequence[str],
        holder: object,
        *,
        on_device: bool,
    ) -> None:
        self._slot = slot
        self._prepared = prepared
        self._inputs = tuple(inputs.values())  # arrays on the GPU are read until the run is done
        self._outputs = outputs
        self._holder = holder
        self._on_device = on_device
        self._found: dict[str, Any] = {}
        self._failure: CudaError | None = None

    def result(self) -> dict[str, Any]:
        """Wait for the run, and return its outputs; the same ones at each call.

        Raises:
            CudaError: it failed on the GPU.
        """
        self._slot.finish(self)
        if self._failure is not None:
            raise self._failure
        return self._found

    def collect(self) -> None:
        """Wait for the run and take its outputs from the slot, which still holds them."""
        try:
            self._slot.wait()
            take = self._slot.on_device if self._on_device else self._slot.on_host
            self._found = take(self._outputs, self._prepared, self._holder)
        except CudaError as error:
            self._failure = error
        self._inputs = ()


class Slot:
    """Room for one run."""

    def __init__(self, memory: Memory, tensors: Mapping[str, Tensor], nbytes: Mapping[str, int], *, index: int) -> None:
        self._memory = memory
        self._tensors = tensors
        self._index = index
        self._lock = threading.Lock()
        self._ticket: weakref.ref[Ticket] | None = None
        self._inputs: Mapping[str, Any] | None = None
        self._lease: weakref.ref[Lease] | None = None
        self._pinned = {name: memory.pinned(size) for name, size in nbytes.items()}
        self.pointers = {name: memory.allocate(size) for name, size in nbytes.items()}
        self.stream = memory.stream()
        self.computed = memory.event()
        """When the last run's outputs were there."""
        self.prepared: dict[tuple[Shape, ...], Prepared] = {}
        """By the shapes of the inputs; what was used last stands last."""
        self._others: dict[tuple[Shape, ...], None] = {}
        """Shapes that ran in a shared context, in the order in which they came."""
        self.shared: dict[int, Any] = {}
        """A context for all further shapes, by profile."""

    @property
    def is_free(self) -> bool:
        """Whether no run is in it, or its outputs were taken."""
        return self._ticket is None

    def hold(self, ticket: Ticket, inputs: Mapping[str, Any] | None = None) -> None:
        """Remember the run that was started, not to keep it: nobody waits for one that was dropped. Its inputs are kept
        where they are given: nobody else does until it is done.
        """
        self._ticket, self._inputs = weakref.ref(ticket), inputs

    def finish(self, ticket: Ticket | None = None) -> None:
        """Wait for a run, or for whichever is in the slot, and leave the slot free."""
        with self._lock:
            held = None if self._ticket is None else self._ticket()
            if self._ticket is None or (ticket is not None and ticket is not held):
                return
            if held is None:
                self.wait()
            else:
                held.collect()
            self._inputs = None
            self._ticket = None  # not before: another thread would wait here while the other slot is free

    def wait(self) -> None:
        """Wait until all that is on the stream is done."""
        with self._memory.active():
            self.stream.synchronize()

    @property
    def is_lent(self) -> bool:
        """Whether somebody may still read the outputs of the last run where they lie."""
        return self._lease is not None and self._lease() is not None

    def use_again(self) -> None:
        """From now on the outputs of the last run are gone."""
        lease = None if self._lease is None else self._lease()
        if lease is not None:
            lease.valid = False
        self._lease = None

    def on_host(self, names: Sequence[str], prepared: Prepared, _: object) -> dict[str, Array]:
        """Outputs of the run in the slot, in memory of their own."""
        return {name: to_numpy(self._tensors[name], prepared.host[name]) for name in names}

    def on_device(
        self, names: Sequence[str], prepared: Prepared, holder: object, stream: int | None = None
    ) -> dict[str, DeviceArray]:
        """Outputs of the run in the slot, where they lie; complete, or for what is on a stream from now on."""
        lease = Lease()
        self._lease = weakref.ref(lease)
        return {
            name: DeviceArray(
                self.pointers[name],
                prepared.outputs[name],
                self._tensors[name].dtype,
                index=self._index,
                lease=lease,
                owner=holder,
                stream=stream,
            )
            for name in names
        }

    def find(self, shapes: tuple[Shape, ...]) -> Prepared | None:
        """What is prepared for inputs of these shapes, which are now the last used."""
        prepared = self.prepared.pop(shapes, None)
        if prepared is not None:
            self.prepared[shapes] = prepared
        return prepared

    def has_room_for(self, shapes: tuple[Shape, ...], *, most: int) -> bool:
        """Whether new shapes get a context of their own: where fewer than `most` have one, or where they are among the
        last `most` that did not, in place of the shapes that were not used for longest. The slot must be free.
        """
        if len(self.prepared) < most:
            return True
        if shapes in self._others:
            del self._others[shapes]
            self.prepared.pop(next(iter(self.prepared))).close()
            return True
        self._others[shapes] = None
        if len(self._others) > most:
            del self._others[next(iter(self._others))]
        return False

    def host_views(self, shapes: Mapping[str, Shape]) -> dict[str, Array]:
        """The start of each tensor's pinned memory, in its shape and type."""
        tensors = self._tensors
        return {
            name: self._pinned[name][: tensors[name].nbytes(shape)].view(tensors[name].dtype).reshape(shape)
            for name, shape in shapes.items()
        }

    def close(self) -> None:
        """Free the graphs and contexts; the run in it must be finished, and the CUDA context current."""
        self.use_again()
        for prepared in self.prepared.values():
            prepared.close()
        self.prepared.clear()
        self.shared.clear()
