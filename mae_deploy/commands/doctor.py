"""`mae-deploy doctor`: what is installed, which engines work here, and what is missing for which command."""

from __future__ import annotations

import os
import platform
import re
from importlib import metadata, util
from typing import Any

from rich.console import Group

from mae_deploy import __version__
from mae_deploy.commands.config import DoctorConfig
from mae_deploy.errors import MissingDependency
from mae_deploy.machine import cache_folder, cpu_features, cpu_name, granted_cores
from mae_deploy.reporting.tables import Column, Table, facts_table, stacked
from mae_deploy.results import Result, as_text
from mae_deploy.runtime.cuda.driver import gpus, require_gpu

_PYCUDA, _CUDA_BINDINGS = "pycuda", "cuda.bindings"
"""Either gives TensorRT its memory."""

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
    "train,openvino": ("export --engine openvino", "report --engine openvino"),
    "trt": ("build-engine", "predict --engine trt"),
    "openvino": ("predict --engine openvino",),
    "parquet": ("predict --out FILE.parquet",),
    "tiff": ("predict on TIFF",),
}
"""The commands that the package itself and its extras are for."""

_MODULES = {
    "pyyaml": "yaml",
    "scikit-learn": "sklearn",
    "pillow": "PIL",
    "mlflow-skinny": "mlflow",
    "cuda-bindings": _CUDA_BINDINGS,
}
"""Of distributions that are imported under another name than they are installed."""

_DISTRIBUTIONS = {module: name for name, module in _MODULES.items()}

_REQUIREMENT = re.compile(r"([\w.-]+)[^;]*(?:;.*extra == [\"'](\w+)[\"'])?")
"""A name and the extra that asks for it, in the words of a package's metadata: `torch>=2.11; extra == "train"`."""


def run_doctor(_: DoctorConfig) -> Result:
    """Look at packages, engines and devices; nothing that is missing makes it fail.

    Raises:
        MissingDependency: the package runs from its sources and is not installed.
    """
    required = requirements()
    needed = {extras: {module for extra in ["", *extras.split(",")] for module in required[extra]} for extras in NEEDS}
    packages = {module: _version(module) for module in sorted({_CUDA_BINDINGS}.union(*needed.values()))}
    absent = {
        module
        for module, version in packages.items()
        if version is None and not (module == _PYCUDA and packages[_CUDA_BINDINGS])
    }
    commands: dict[str, dict[str, Any] | None] = {}
    for extras, names in NEEDS.items():
        missing = sorted(needed[extras] & absent)
        install = f"pip install 'mae-deploy[{extras}]'" if extras else "pip install --force-reinstall mae-deploy"
        commands |= dict.fromkeys(names, {"missing": missing, "install": install} if missing else None)
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
    data = {"machine": machine, "packages": packages, "engines": _engines(packages), "commands": commands}
    return Result(data, _view(data))


def requirements() -> dict[str, list[str]]:
    """The modules of each extra, and under "" those of the package itself, as its own metadata names them.

    Raises:
        MissingDependency: the package runs from its sources and is not installed.
    """
    try:
        lines = metadata.requires("mae-deploy") or []
    except metadata.PackageNotFoundError as error:
        raise MissingDependency(
            "mae-deploy is not installed, and only what is installed says what it needs", hint="pip install -e ."
        ) from error
    found: dict[str, list[str]] = {}
    for line in lines:
        match = _REQUIREMENT.match(line)
        assert match is not None
        name, extra = match.groups(default="")
        found.setdefault(extra, []).append(_MODULES.get(name.lower(), name.replace("-", "_")))
    return found


def _version(module: str) -> str | None:
    try:
        if util.find_spec(module) is None:
            return None
    except ModuleNotFoundError:  # the package around it
        return None
    try:
        return metadata.version(_DISTRIBUTIONS.get(module, module))
    except metadata.PackageNotFoundError:
        return "installed"


def _engines(packages: dict[str, str | None]) -> dict[str, str]:
    engines = {
        "onnxruntime": "not installed: pip install onnxruntime",
        "openvino": "not installed: pip install 'mae-deploy[openvino]'",
        "tensorrt": "not installed: pip install 'mae-deploy[trt]'",
    }
    for name, describe in (("onnxruntime", _onnxruntime), ("openvino", _openvino)):
        if packages[name] is not None:
            try:
                engines[name] = describe()
            except (ImportError, RuntimeError, MissingDependency) as error:
                engines[name] = f"cannot be loaded: {' '.join(str(error).split())}"
    if packages["tensorrt"] is not None:
        engines["tensorrt"] = _tensorrt(packages)
    return engines


def _tensorrt(packages: dict[str, str | None]) -> str:
    """Where it computes, or what it lacks; the package itself is not imported."""
    backend = next((name for name in (_PYCUDA, _CUDA_BINDINGS) if packages[name] is not None), None)
    if backend is None:
        return (
            f"{packages['tensorrt']}, but neither pycuda nor cuda-bindings is installed: pip install 'mae-deploy[trt]'"
        )
    try:
        gpu = require_gpu()
    except MissingDependency as error:
        return f"{packages['tensorrt']} with {backend}, but {error}"
    return f"{packages['tensorrt']} with {backend} on {gpu.name}"


def _onnxruntime() -> str:
    from mae_deploy.runtime.engines.onnxruntime import import_onnxruntime

    providers = import_onnxruntime().get_available_providers()
    return ", ".join(name.removesuffix("ExecutionProvider") for name in providers)


def _openvino() -> str:
    """The CPU as OpenVINO names it, and the precisions that it computes in."""
    from mae_deploy.runtime.engines.openvino import openvino_core

    core = openvino_core()
    capabilities = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return (
        f"{core.get_property('CPU', 'FULL_DEVICE_NAME')}:"
        f" {', '.join(name for name in ('FP32', 'FP16', 'BF16', 'INT8') if name in capabilities)}"
    )


def _view(data: dict[str, Any]) -> Group:
    commands = [
        {
            "command": name,
            "state": "ready" if lacking is None else f"needs {as_text(lacking['missing'])}: {lacking['install']}",
        }
        for name, lacking in data["commands"].items()
    ]
    state = Column("state", "state", colour=lambda text: "green" if text == "ready" else "yellow")
    return stacked(
        [
            facts_table("Machine", {**data["machine"], "gpus": "\n".join(data["machine"]["gpus"]) or None}),
            facts_table("Packages", data["packages"]),
            facts_table("Engines", data["engines"]),
            Table("Commands", (Column("command", "command"), state), commands),
        ]
    )
