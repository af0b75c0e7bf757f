"""GPU memory, streams and events behind one small interface, through pycuda or cuda-bindings.

Both use the primary context of the GPU, which other libraries in the process share, and push it on the calling thread
for as long as a block needs it: a context of one's own, as pycuda.autoinit makes, breaks beside PyTorch and in threads
(https://github.com/inducer/pycuda/issues/285).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any

from mae_deploy.images.read import Array

if TYPE_CHECKING:
    from typing_extensions import Self

NON_BLOCKING = 1
"""Streams that do not wait for the default stream: what another thread does there would break the capture of a CUDA
graph."""
DISABLE_TIMING = 2
"""Events that only order work, which costs less than timing it."""


class Event(ABC):
    """A point in a stream's work."""

    @abstractmethod
    def record(self, stream: Any) -> None:
        """Let the event happen when all that is on the stream now is done."""


class Stream(ABC):
    """Work that the GPU does in order, beside that of other streams."""

    handle: int
    """The driver's `CUstream`."""

    @abstractmethod
    def wait(self, event: Any) -> None:
        """Let what comes after wait for an event; one that was never recorded has happened."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until all that is on the stream is done."""


class Memory(ABC):
    """What one GPU's primary context gives out, and takes back when this is closed or forgotten; a context manager that
    closes it.

    Every method but `close` is called inside `with memory.active():`.
    """

    backend: str

    @abstractmethod
    def active(self) -> AbstractContextManager[None]:
        """Make the context current on the calling thread for as long as the block runs; blocks nest.

        Raises:
            CudaError: in place of whatever the package raises inside the block.
        """

    @abstractmethod
    def allocate(self, nbytes: int) -> int:
        """The address of new memory on the GPU, aligned to 256 bytes."""

    @abstractmethod
    def free(self, pointer: int) -> None:
        """Give back what `allocate` gave."""

    @abstractmethod
    def pinned(self, nbytes: int) -> Array:
        """Bytes on the host, uint8 `(nbytes,)`, that the GPU copies from and to by itself; they are gone when the
        memory is closed.
        """

    @abstractmethod
    def stream(self) -> Stream:
        """A new stream, which does not wait for the default stream."""

    @abstractmethod
    def event(self) -> Event:
        """A new event."""

    @abstractmethod
    def copy_in(self, pointer: int, array: Array, stream: Any) -> None:
        """Put a copy from pinned memory to the GPU on the stream."""

    @abstractmethod
    def copy_out(self, array: Array, pointer: int, stream: Any) -> None:
        """Put a copy from the GPU to pinned memory on the stream."""

    @abstractmethod
    def copy_device(self, to: int, source: int, nbytes: int, stream: Any) -> None:
        """Put a copy within the GPU on the stream."""

    @abstractmethod
    def close(self) -> None:
        """Give back everything, then the context, from any thread; nothing may run any more. Closing twice does
        nothing.
        """

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
