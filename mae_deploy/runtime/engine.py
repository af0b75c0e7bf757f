"""What runs a bundle's graph: one small interface for every engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from mae_deploy.errors import ConfigError
from mae_deploy.preprocess import Array

if TYPE_CHECKING:
    from typing_extensions import Self


class Engine(ABC):
    """A loaded graph; a context manager that closes it."""

    name: str
    """As `load_engine` and the command line know it."""
    version: str
    """Of the library that runs the graph."""
    device: str
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Run the graph once on `inputs`, each `(B, ...)` under its name, and return the named outputs, or all.

        Raises:
            ConfigError: inputs or outputs that the graph does not have.
            MaeDeployError: the engine refuses the inputs, fails, or is closed.
        """
        if set(inputs) != set(self.input_names):
            raise ConfigError(f"the graph takes the inputs {', '.join(self.input_names)}, not {', '.join(inputs) or 'none'}")
        return self._run(inputs, check_outputs(outputs, self.output_names))

    @abstractmethod
    def _run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]: ...

    @abstractmethod
    def close(self) -> None:
        """Free what the engine holds; closing twice does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def check_outputs(wanted: Sequence[str] | None, known: Sequence[str]) -> tuple[str, ...]:
    """The wanted outputs, each once; all that are known for None.

    Raises:
        ConfigError: none, or one that the graph does not have.
    """
    if wanted is None:
        return tuple(known)
    names = tuple(dict.fromkeys([wanted] if isinstance(wanted, str) else wanted))
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ConfigError(f"no output '{', '.join(unknown)}'" if unknown else "no output was asked for", hint=f"this graph has: {', '.join(known)}")
    return names


def run_in_chunks(engine: Engine, inputs: Mapping[str, Array], *, batch: int | None, outputs: Sequence[str] | None = None) -> dict[str, Array]:
    """Run any number of samples, each input `(B, ...)`, on a graph of the fixed `batch`; None runs all at once.

    The last chunk is filled up with its last sample, and the surplus is cut from the outputs.
    """
    if batch is None:
        return engine.run(inputs, outputs)
    total = min(len(array) for array in inputs.values())
    chunks = [engine.run({name: _fill(array[start : start + batch], batch) for name, array in inputs.items()}, outputs) for start in range(0, total, batch)]
    return {name: np.concatenate([chunk[name] for chunk in chunks])[:total] for name in chunks[0]}


def _fill(samples: Array, batch: int) -> Array:
    missing = batch - len(samples)
    return np.concatenate([samples, np.repeat(samples[-1:], missing, axis=0)]) if missing else samples
