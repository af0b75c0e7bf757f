"""How near to PyTorch a bundle was where it was exported: its own rounding, beside which a fault stands out that the
precision's tolerance would let through.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mae_deploy.machine import cpu_features, cpu_name
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.engines.base import Engine

GOLDEN_DB = "golden_db"
"""In the manifest's record: the SQNR of each output of the golden samples, by name."""

BLOCKS_DB = "blocks_db"
"""The same after each block, in their order; None where nothing differs."""

_MACHINE = "machine"


def noise_record(outputs: Mapping[str, float], blocks: list[float] | None) -> dict[str, Any]:
    """What the manifest's `parity` says of this machine, in dB."""
    record: dict[str, Any] = {
        _MACHINE: _machine(),
        GOLDEN_DB: {name: db for name, db in outputs.items() if math.isfinite(db)},
    }
    if blocks is not None:
        record[BLOCKS_DB] = [db if math.isfinite(db) else None for db in blocks]
    return record


def own_noise(bundle: Bundle, engine: Engine) -> dict[str, Any]:
    """What `noise_record` wrote, if that was on this engine, this version of it and this CPU; else nothing: another one
    rounds otherwise. Nothing either where the export emulated what its engine had not got.
    """
    record: dict[str, Any] = bundle.manifest["parity"].get(f"onnx-{bundle.precision}", {})
    here = {"engine": engine.name, "engine_version": engine.version, "device": engine.device, _MACHINE: _machine()}
    same = "emulated" not in record and {name: record.get(name) for name in here} == here
    return {name: record[name] for name in (GOLDEN_DB, BLOCKS_DB) if same and name in record}


def _machine() -> list[str]:
    return [cpu_name(), *(cpu_features() or ())]
