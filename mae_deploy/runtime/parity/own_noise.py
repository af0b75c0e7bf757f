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
from mae_deploy.runtime.parity.compare import Comparison

GOLDEN_DB = "golden_db"
"""In the manifest's record: the SQNR of each output, of the golden samples by its name, of other trials behind
theirs."""

CHANNELS_DB = "channels_db"
"""The same of the channel that is off most."""

BLOCKS_DB = "blocks_db"
"""The same after each block, in their order; None where nothing differs."""

_MACHINE = "machine"


def noise_record(outputs: Mapping[str, Comparison], blocks: list[float] | None) -> dict[str, Any]:
    """What the manifest's `parity` says of this machine, in dB."""
    figures = {
        GOLDEN_DB: {name: comparison.sqnr_db for name, comparison in outputs.items()},
        CHANNELS_DB: {name: comparison.channel_sqnr_db for name, comparison in outputs.items()},
    }
    record: dict[str, Any] = {
        _MACHINE: _machine(),
        **{kind: {name: db for name, db in found.items() if math.isfinite(db)} for kind, found in figures.items()},
    }
    if blocks is not None:
        record[BLOCKS_DB] = [db if math.isfinite(db) else None for db in blocks]
    return record


def own_noise(bundle: Bundle, engine: Engine) -> dict[str, Any]:
    """What `noise_record` wrote, unless there is a reason against it."""
    if reason_against_own_noise(bundle, engine) is not None:
        return {}
    record = _record(bundle)
    return {name: record[name] for name in (GOLDEN_DB, CHANNELS_DB, BLOCKS_DB) if name in record}


def reason_against_own_noise(bundle: Bundle, engine: Engine) -> str | None:
    """Why the noise at export says nothing of this engine here: it was on another engine, another version of it or
    another CPU, which round otherwise, or the export emulated what its engine had not got; None where it does.
    """
    record = _record(bundle)
    if GOLDEN_DB not in record or "emulated" in record:
        return "the export did not measure it"
    here = {"engine": engine.name, "engine_version": engine.version, "device": engine.device}
    if any(record.get(name) != value for name, value in here.items()):
        return f"the export measured it on {record.get('engine')} {record.get('engine_version')}"
    return (
        None if record.get(_MACHINE) == _machine() else f"the export measured it on another CPU, {record[_MACHINE][0]}"
    )


def _record(bundle: Bundle) -> dict[str, Any]:
    found: dict[str, Any] = bundle.manifest["parity"].get(f"onnx-{bundle.precision}", {})
    return found


def _machine() -> list[str]:
    return [cpu_name(), *(cpu_features() or ())]
