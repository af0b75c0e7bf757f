"""What figures depend on: the processor, its threads, the GPU and the versions."""

from __future__ import annotations

import platform
from typing import Any

import numpy as np

from mae_deploy.machine import cpu_features, cpu_name, granted_cores
from mae_deploy.reporting.tables import Table, facts_table
from mae_deploy.results import as_text
from mae_deploy.runtime.cuda.driver import gpus
from mae_deploy.runtime.engines.base import EngineOptions
from mae_deploy.runtime.manifest import PLANNED


def describe_machine(
    engines: dict[str, str], *, threads: int | None, affinity: tuple[int, ...] | None
) -> dict[str, Any]:
    """This machine as JSON values.

    Args:
        engines: names and versions of those that computed.
        threads: what was asked for.
    """
    cores = granted_cores()
    return {
        "cpu": cpu_name(),
        "instructions": cpu_features() or [],
        "cores": cores,
        "threads": EngineOptions(threads=threads, affinity=affinity).num_threads or cores,
        "affinity": ",".join(map(str, affinity)) if affinity else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "gpu": ", ".join(f"{gpu.name}, CUDA {gpu.driver}" for gpu in gpus()[:1])
        if set(PLANNED) & set(engines)
        else None,
        "engines": engines,
    }


def machine_table(report: dict[str, Any], **more: str) -> Table:
    """The machine of a report that holds `machine`, the version and the date, and what else is known of it."""
    machine = report["machine"]
    bound = f", bound to {machine['affinity']}" if machine["affinity"] else ""
    versions = {
        "mae-deploy": report["mae_deploy"],
        "Python": machine["python"],
        "NumPy": machine["numpy"],
        **machine["engines"],
    }
    return facts_table(
        "Machine",
        {
            "CPU": [machine["cpu"], *machine["instructions"]],
            "threads": f"{machine['threads']} of {machine['cores']} cores{bound}",
            **({"GPU": machine["gpu"]} if machine["gpu"] else {}),
            "system": machine["system"],
            "versions": as_text(versions),
            **more,
            "date": report["created"],
        },
    )
