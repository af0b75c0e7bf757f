"""What this machine multiplies how fast, by engine and precision, and what to choose from that."""

from __future__ import annotations

import io
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr

import numpy as np

from mae_deploy.errors import MaeDeployError
from mae_deploy.files import temporary_folder
from mae_deploy.reporting.tables import Column, Table
from mae_deploy.runtime.alone import run_alone
from mae_deploy.runtime.engines.base import EngineOptions
from mae_deploy.runtime.onnx_file import write_int8_products, write_products
from mae_deploy.runtime.registry import open_graph

Rates = Mapping[str, Mapping[str, float]]
"""GFLOP/s by engine and precision."""

MEASURED = {"onnxruntime": ("fp32", "int8"), "openvino": ("fp32", "bf16", "int8")}
"""The engines of a CPU, and what their bundles compute in."""

NATIVE_BF16 = ("avx512_bf16", "amx_bf16", "bf16")
"""Of a CPU's features, those that are products in BF16; without one it is emulated."""

_NAMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
_SIZE, _LENGTH = 768, 4
"""The width of a ViT-B, for as many tokens, and products in a row."""
_SECONDS = 0.3
"""How long each is repeated for."""
_LIMIT = 60.0
"""Seconds that an engine has for all of its precisions."""
_NOTABLE = 1.1
"""From this many times FP32's rate on, another precision is worth choosing for its speed."""


def measure_rates(engines: Sequence[str], features: Sequence[str] | None) -> dict[str, dict[str, float]]:
    """One engine after another, each in a process of its own; one that does not come to an end has no rates.

    Args:
        features: the CPU's; BF16 is measured where it is among them.
    """
    native = features is not None and any(name in features for name in NATIVE_BF16)
    found = {}
    for engine in engines:
        precisions = tuple(name for name in MEASURED.get(engine, ()) if name != "bf16" or native)
        try:
            found[engine] = run_alone(rates_of, engine, precisions, timeout=_LIMIT) if precisions else {}
        except MaeDeployError:  # what the engine lacks is said where it was tried
            found[engine] = {}
    return {engine: rates for engine, rates in found.items() if rates}


def rates_of(engine: str, precisions: Sequence[str]) -> dict[str, float]:
    """GFLOP/s of square products on all granted cores, the fastest of its calls, by precision."""
    found = {}
    x = np.random.default_rng(0).standard_normal((_SIZE, _SIZE), np.float32)
    with temporary_folder() as folder:
        for precision in precisions:
            graph = folder / f"{precision}.onnx"
            write = write_int8_products if precision == "int8" else write_products
            write(graph, _SIZE, _LENGTH)
            said = redirect_stderr(io.StringIO())  # that INT8 is computed in FP32 here: its rate says so
            with said, open_graph(graph, engine, EngineOptions(), precision=precision) as loaded:
                loaded.run({"x": x})
                seconds: list[float] = []
                while sum(seconds) < _SECONDS:
                    before = time.perf_counter()
                    loaded.run({"x": x})
                    seconds.append(time.perf_counter() - before)
            found[precision] = 2 * _LENGTH * _SIZE**3 / min(seconds) / 1e9
    return found


def advice(rates: Rates, features: Sequence[str] | None) -> list[str]:
    """What to choose here, in one or two lines; nothing where nothing was measured."""
    fp32 = {engine: found["fp32"] for engine, found in rates.items() if "fp32" in found}
    if not fp32:
        return []
    best = max(fp32, key=lambda engine: fp32[engine])
    words = []
    for precision in ("int8", "bf16"):
        found = {engine: of_engine[precision] for engine, of_engine in rates.items() if precision in of_engine}
        fastest = max(found, key=lambda engine: found[engine], default=None)
        if fastest is None:
            continue
        times = found[fastest] / fp32[best]
        name = f"{precision.upper()} on {_NAMES[fastest]}"
        words.append(
            f"{name}: {times:.1f} times FP32"
            if times >= _NOTABLE
            else f"{name} is not faster than FP32 ({times:.1f} times)"
        )
    words.append(f"the engine for FP32 is {_NAMES[best]}")
    if features is not None and not any(name in features for name in NATIVE_BF16):
        words.append("BF16 is emulated by this CPU: don't")
    return ["; ".join(words) + "."]


def rates_table(rates: Rates, lines: Sequence[str]) -> Table:
    """A row for each engine."""
    columns = (
        Column("engine", "engine"),
        *(Column(f"{name.upper()} GFLOP/s", name, "{:.0f}") for name in ("fp32", "bf16", "int8")),
    )
    rows = [{"engine": _NAMES[engine], **found} for engine, found in rates.items()]
    return Table("Speed", columns, rows, lines)
