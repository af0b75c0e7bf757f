"""`mae-deploy doctor`: what is installed, which engines work here, and what is missing for which command."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import metadata, util
from typing import Any

import numpy as np
from rich.console import Group

from mae_deploy import __version__
from mae_deploy.commands.config import DoctorConfig
from mae_deploy.commands.rates import MEASURED, advice, measure_rates, rates_table
from mae_deploy.errors import ConfigError, MaeDeployError, MissingDependency, import_optional
from mae_deploy.files import temporary_folder
from mae_deploy.machine import cache_folder, cpu_features, cpu_name, granted_cores
from mae_deploy.packages import PACKAGE, distributions, is_hollow_spec, remedy
from mae_deploy.packages import requirements as package_requirements
from mae_deploy.reporting.tables import Column, Table, facts_table, stacked
from mae_deploy.results import Result, as_text
from mae_deploy.runtime.alone import Died, run_alone
from mae_deploy.runtime.cuda.driver import gpus, require_gpu
from mae_deploy.runtime.cuda.open_memory import INSTALL
from mae_deploy.runtime.engines.base import EngineOptions
from mae_deploy.runtime.onnx_file import write_products
from mae_deploy.runtime.registry import open_graph
from mae_deploy.runtime.tensorrt.api import load_tensorrt
from mae_deploy.runtime.tensorrt.rtx import find_gpu, import_rtx

_PYCUDA, _CUDA_BINDINGS = "pycuda", "cuda.bindings"
"""Either gives TensorRT its memory."""

_RTX = "tensorrt_rtx_bindings"

NEEDS: dict[str, tuple[str, ...]] = {
    "": ("verify", "predict", "eval BUNDLE", "benchmark", "data", "info", "schema"),
    "train": (
        "pretrain",
        "finetune",
        "linprobe",
        "knn",
        "compare",
        "sweep",
        "distill",
        "reconstruct",
        "import",
        "export-weights",
        "export",
        "report",
        "quickstart",
        "eval CKPT",
        "benchmark-train",
    ),
    "train,wandb": ("pretrain --tracker wandb",),
    "train,mlflow": ("pretrain --tracker mlflow",),
    "train,hf": ("pretrain on Arrow and Parquet",),
    "train,trt": ("export --engine trt",),
    "train,trt-rtx": ("export --engine trt-rtx",),
    "train,openvino": ("export --engine openvino", "report --engine openvino"),
    "trt": ("build-engine", "predict --engine trt"),
    "trt-rtx": ("build-engine --engine trt-rtx", "predict --engine trt-rtx"),
    "openvino": ("predict --engine openvino",),
    "hub": ("push",),
    "parquet": ("predict --out FILE.parquet", "embed"),
    "cluster": ("embed --ray",),
    "sign": ("sign", "verify --signature"),
    "search": ("search",),
    "tiff": ("predict on TIFF",),
    "video": ("stream", "stream-eval"),
    "serve": ("serve",),
}
"""The commands that the package itself and its extras are for."""

_USERS: dict[str, Callable[[str, str], bool]] = {
    "onnxruntime": lambda name, extras: (
        name == "eval BUNDLE"
        or (
            name.split()[0]
            in (
                "verify",
                "predict",
                "embed",
                "search",
                "stream",
                "stream-eval",
                "serve",
                "benchmark",
                "export",
                "report",
                "quickstart",
            )
            and "openvino" not in extras
            and extras not in ("trt", "trt-rtx")
        )
    ),
    "openvino": lambda name, extras: "openvino" in extras,
    "torch": lambda name, extras: "train" in extras,
    "tensorrt": lambda name, extras: "trt" in extras.split(","),
    "tensorrt_rtx_bindings": lambda name, extras: "trt-rtx" in extras.split(","),
}
"""Whether a command, by its name and extras, is lost where a library is there and does not work."""

_MODULES = {
    "pyyaml": "yaml",
    "python-multipart": "python_multipart",
    "scikit-learn": "sklearn",
    "pillow": "PIL",
    "mlflow-skinny": "mlflow",
    "markdown-it-py": "markdown_it",
    "cuda-bindings": _CUDA_BINDINGS,
    "tensorrt-rtx-cu13-bindings": _RTX,
    "onnxruntime-ep-nv-tensorrt-rtx-cu13": "onnxruntime_ep_nv_tensorrt_rtx",
}
"""Of distributions that are imported under another name than they are installed."""

_DISTRIBUTIONS = {module: name for name, module in _MODULES.items()}

_SIDE = 64
"""Of the matrices that each library multiplies."""

_LIMIT = 60.0
"""Seconds that a library has to load and to compute one product."""


def run_doctor(config: DoctorConfig) -> Result:
    """Look at packages, and at each engine in a process of its own; nothing that is missing makes it fail.

    Raises:
        MissingDependency: the package runs from its sources and is not installed.
    """
    required = requirements()
    needed = {
        extras: {module for extra in ["", *extras.split(",")] for module in required.get(extra, [])} for extras in NEEDS
    }
    packages = {module: _version(module) for module in sorted({_CUDA_BINDINGS, _RTX}.union(*needed.values()))}
    absent = {
        module
        for module, version in packages.items()
        if version is None and not (module == _PYCUDA and packages[_CUDA_BINDINGS])
    }
    engines, broken = _engines(packages)
    commands: dict[str, dict[str, Any] | None] = {}
    for extras, names in NEEDS.items():
        missing = sorted(needed[extras] & absent)
        install = f"pip install 'mae-deploy[{extras}]'" if extras else "pip install --force-reinstall mae-deploy"
        gone = {module: remedy(module, install, absent=True) for module in missing}
        if any(extra not in required for extra in filter(None, extras.split(","))):  # installed before there was one
            gone[PACKAGE] = "pip install -e ."
        for name in names:
            lost = gone | {module: hint for module, hint in broken.items() if _USERS[module](name, extras)}
            hints = list(dict.fromkeys(lost.values()))
            commands[name] = {"missing": sorted(lost), "install": "; ".join(hints)} if lost else None
    machine = {
        "mae_deploy": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpu_cores": os.cpu_count(),
        "granted_cores": granted_cores(),
        "cpu_features": cpu_features(),
        "cache": str(cache_folder("")),
        "nvidia_gpus": len(gpus()),
        "gpus": [
            f"{gpu.name}, compute capability {'.'.join(map(str, gpu.compute_capability))}, CUDA {gpu.driver}"
            for gpu in gpus()
        ],
    }
    working = [name for name in MEASURED if packages[name] is not None and name not in broken]
    features = cpu_features()
    rates = measure_rates(working, features) if config.rates else {}
    data = {
        "machine": machine,
        "packages": packages,
        "engines": engines,
        "gflops": rates,
        "advice": advice(rates, features),
        "commands": commands,
    }
    return Result(data, _view(data))


def requirements() -> dict[str, list[str]]:
    """The modules of each extra, and under "" those of the package itself, as its own metadata names them.

    Raises:
        MissingDependency: the package runs from its sources and is not installed.
    """
    found: dict[str, list[str]] = {}
    try:
        for name, _, extra in package_requirements():
            found.setdefault(extra, []).append(_MODULES.get(name.lower(), name.replace("-", "_")))
    except metadata.PackageNotFoundError as error:
        raise MissingDependency(
            f"{PACKAGE} is not installed, and only what is installed says what it needs", hint="pip install -e ."
        ) from error
    return found


def _version(module: str) -> str | None:
    """Of what gives the module; None where nothing does, or only its folder is left."""
    try:
        spec = util.find_spec(module)
    except ModuleNotFoundError:  # the package around it
        return None
    if spec is None or is_hollow_spec(spec):
        return None
    name = _DISTRIBUTIONS.get(module, module)
    found = distributions(module)
    if {other.lower().replace("-", "_") for other in found} - {name.lower().replace("-", "_")}:
        return ", ".join(f"{version} ({other})" for other, version in found.items())
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "installed"


def _engines(packages: dict[str, str | None]) -> tuple[dict[str, str], dict[str, str]]:
    """What each library that computes says of itself, and of those that are there and do not work the remedy."""
    installs = {
        "onnxruntime": "pip install onnxruntime",
        "openvino": "pip install 'mae-deploy[openvino]'",
        "tensorrt": INSTALL,
        _RTX: "pip install 'mae-deploy[trt-rtx]'",
        "torch": "pip install 'mae-deploy[train]'",
    }
    trials: dict[str, Callable[[], str]] = {
        "onnxruntime": partial(run_alone, _onnxruntime, timeout=_LIMIT),
        "openvino": partial(run_alone, _openvino, timeout=_LIMIT),
        "tensorrt": partial(_tensorrt, packages),
        _RTX: partial(_tensorrt_rtx, packages),
        "torch": partial(run_alone, _torch, timeout=_LIMIT),
    }
    there = [name for name in trials if packages[name] is not None]
    with ThreadPoolExecutor() as pool:
        tried = dict(zip(there, pool.map(partial(_try, trials), there), strict=True))
    engines, broken = {}, {}
    for name, install in installs.items():
        if name not in tried:
            engines[name] = f"not installed: {remedy(name, install, absent=True)}"
            continue
        engines[name], error = tried[name]
        if error is not None:
            broken[name] = error.hint or remedy(name, install)
            engines[name] = f"{'' if isinstance(error, Died) else 'does not work: '}{error}; {broken[name]}"
        elif len(distributions(name)) > 1:
            engines[name] += f"; of several distributions: {remedy(name, install)}"
    return engines, broken


def _try(trials: dict[str, Callable[[], str]], name: str) -> tuple[str, MaeDeployError | None]:
    try:
        return trials[name](), None
    except MaeDeployError as error:
        return "", error


def _tensorrt(packages: dict[str, str | None]) -> str:
    """Where it computes, or what it lacks, in which case the package itself is not imported."""
    backend = next((name for name in (_PYCUDA, _CUDA_BINDINGS) if packages[name] is not None), None)
    if backend is None:
        return f"{packages['tensorrt']}, but neither pycuda nor cuda-bindings is installed: {INSTALL}"
    try:
        gpu = require_gpu()
    except MissingDependency as error:
        return f"{packages['tensorrt']} with {backend}, but {error}"
    if util.find_spec("tensorrt") is not None:
        run_alone(load_tensorrt, timeout=_LIMIT)
    return f"{packages['tensorrt']} with {backend} on {gpu.name}"


def _tensorrt_rtx(packages: dict[str, str | None]) -> str:
    """Where it runs what it builds; it builds without a GPU."""
    builds = f"{run_alone(_rtx_version, timeout=_LIMIT)} builds engines"
    try:
        gpu = find_gpu()
    except (MissingDependency, ConfigError) as error:
        return f"{builds}; {error}"
    if packages[_CUDA_BINDINGS] is None and packages[_PYCUDA] is None:
        return f"{builds}; to run them on {gpu.name}, pip install cuda-bindings"
    return f"{builds}, and runs them on {gpu.name}"


def _rtx_version() -> str:
    return str(import_rtx().__version__)


def _onnxruntime() -> str:
    from mae_deploy.runtime.engines.onnxruntime import import_onnxruntime

    providers = import_onnxruntime().get_available_providers()
    _multiply("onnxruntime")
    return ", ".join(name.removesuffix("ExecutionProvider") for name in providers)


def _openvino() -> str:
    """The CPU as OpenVINO names it, and the precisions that it computes in."""
    from mae_deploy.runtime.engines.openvino import openvino_core

    core = openvino_core()
    capabilities = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    _multiply("openvino")
    return (
        f"{core.get_property('CPU', 'FULL_DEVICE_NAME')}:"
        f" {', '.join(name for name in ('FP32', 'FP16', 'BF16', 'INT8') if name in capabilities)}"
    )


def _torch() -> str:
    torch = import_optional("torch", extra="train")
    x = torch.ones(_SIDE, _SIDE)
    (x @ x).sum().item()
    return f"CPU{', CUDA' if torch.cuda.is_available() else ''}"


def _multiply(engine: str) -> None:
    """A product on the engine: a library for another CPU may load, and die of its first instruction."""
    with temporary_folder() as folder:
        graph = folder / "product.onnx"
        write_products(graph, _SIDE, 1)
        with open_graph(graph, engine, EngineOptions(threads=1)) as loaded:
            loaded.run({"x": np.ones((_SIDE, _SIDE), np.float32)})


def _view(data: dict[str, Any]) -> Group:
    commands = [
        {
            "command": name,
            "state": "ready" if lacking is None else f"needs {as_text(lacking['missing'])}: {lacking['install']}",
        }
        for name, lacking in data["commands"].items()
    ]
    state = Column("state", "state", colour=lambda text: "green" if text == "ready" else "yellow")
    machine = {name.replace("_", " "): value for name, value in data["machine"].items() if name != "mae_deploy"}
    return stacked(
        [
            facts_table(f"mae-deploy {__version__}", {**machine, "gpus": "\n".join(machine["gpus"]) or None}),
            facts_table("Packages", data["packages"]),
            facts_table("Engines", data["engines"]),
            *([rates_table(data["gflops"], data["advice"])] if data["gflops"] else []),
            Table("Commands", (Column("command", "command"), state), commands),
        ]
    )
