"""What a graph costs from nothing: load time and peak memory of a process that loads it, runs it and does nothing
else.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mae_deploy.errors import MaeDeployError
from mae_deploy.files import temporary_folder
from mae_deploy.images.read import Array
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.engines.base import Engine, EngineOptions
from mae_deploy.runtime.manifest import PLANNED
from mae_deploy.runtime.registry import TENSORRT_RTX, load_engine, open_graph

_TIMEOUT = 900.0
"""Seconds after which a process is given up."""

_INPUTS = "inputs.npz"
_STATUS = Path("/proc/self/status")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """What one process found."""

    load_seconds: float
    """From the file to an engine that can run, without the import of the engine's package."""
    peak_mib: float | None
    """The most memory that the process held, Python and the engine's package included; None where the system does not
    say."""


def probe_graph(
    graph: Path,
    engine: str,
    options: EngineOptions,
    inputs: Mapping[str, Array],
    *,
    precision: str = "fp32",
    bundle: Path | None = None,
) -> Probe:
    """Load an ONNX file, or with TensorRT the engine of a bundle, and run it once on `inputs`, in a process of its own.

    Args:
        engine: the name of an engine, not `auto`.
        bundle: the bundle that the graph is of; needed for TensorRT alone.

    Raises:
        MaeDeployError: the process cannot be started, fails, or does not end.
    """
    with temporary_folder() as folder:
        np.savez(folder / _INPUTS, *inputs.values())
        request = {
            "graph": str(graph.absolute()),
            "bundle": None if bundle is None else str(bundle.absolute()),
            "engine": engine,
            "options": dataclasses.asdict(options),
            "precision": precision,
            "inputs": list(inputs),
        }
        command = [sys.executable, "-m", __name__, str(folder), json.dumps(request)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT)
            if done.returncode == 0:
                return Probe(**json.loads(done.stdout.splitlines()[-1]))
        except (OSError, subprocess.SubprocessError, ValueError, TypeError, IndexError) as error:
            raise MaeDeployError(f"a process of its own fails: {' '.join(str(error).split())}") from error
    said = done.stderr.strip().splitlines()
    raise MaeDeployError(f"a process of its own ends with {done.returncode}: {said[-1] if said else 'it says nothing'}")


def peak_memory() -> float | None:
    """The most memory that this process ever held, in MiB; None where the system does not say (Linux does)."""
    # Not getrusage: its maximum survives exec, so that a child of a large process would report its parent's.
    lines = _STATUS.read_text().splitlines() if _STATUS.is_file() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")), None)


def memory_of_workers(pids: Sequence[int]) -> float | None:
    """What processes hold together, in MiB, what they share counted once; None where the system does not say (Linux
    does).
    """
    rollups = [Path(f"/proc/{pid}/smaps_rollup") for pid in pids]
    try:
        lines = [line for rollup in rollups for line in rollup.read_text().splitlines() if line.startswith("Pss:")]
    except OSError:
        return None
    return sum(int(line.split()[1]) for line in lines) / 1024


def _measure(
    folder: Path,
    graph: str,
    bundle: str | None,
    engine: str,
    options: dict[str, object],
    precision: str,
    inputs: list[str],
) -> Probe:
    with np.load(folder / _INPUTS) as archive:
        arrays = {name: archive[f"arr_{index}"] for index, name in enumerate(inputs)}
    if engine == TENSORRT_RTX:
        from mae_deploy.runtime.tensorrt.rtx import import_rtx

        import_rtx()
    else:
        importlib.import_module(engine)
    settings = EngineOptions(**options)  # type: ignore[arg-type]
    start = time.perf_counter()
    with _open(Path(graph), bundle, engine, settings, precision) as loaded:
        load_seconds = time.perf_counter() - start
        loaded.run(arrays)
    return Probe(load_seconds=load_seconds, peak_mib=peak_memory())


def _open(graph: Path, bundle: str | None, engine: str, options: EngineOptions, precision: str) -> Engine:
    if bundle is not None and engine in PLANNED:
        return load_engine(Bundle.load(bundle), engine, options, prove=False)
    return open_graph(graph, engine, options, precision=precision)


if __name__ == "__main__":
    print(json.dumps(dataclasses.asdict(_measure(Path(sys.argv[1]), **json.loads(sys.argv[2])))))
