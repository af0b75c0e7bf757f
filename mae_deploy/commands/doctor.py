"""`mae-deploy doctor`: what is installed, which engines work here, and what is missing for which command."""

from __future__ import annotations

import os
import platform
from importlib import metadata, util
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from mae_deploy import __version__
from mae_deploy.commands.config import DoctorConfig
from mae_deploy.errors import MissingDependency
from mae_deploy.machine import cache_folder, cpu_features, cpu_name, granted_cores
from mae_deploy.reporting.tables import facts_table
from mae_deploy.results import Result
from mae_deploy.runtime.cuda.driver import gpus, require_gpu

_TRAIN = (
    "torch",
    "torchvision",
    "timm",
    "accelerate",
    "safetensors",
    "yaml",
    "tensorboard",
    "webdataset",
    "simplejpeg",
)

_PYCUDA, _CUDA_BINDINGS = "pycuda", "cuda.bindings"
"""Either gives TensorRT its memory."""

NEEDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "pretrain": ("train", _TRAIN),
    "pretrain --tracker wandb": ("train,wandb", (*_TRAIN, "wandb")),
    "pretrain --tracker mlflow": ("train,mlflow", (*_TRAIN, "mlflow")),
    "pretrain on Arrow and Parquet": ("train,hf", (*_TRAIN, "pyarrow")),
    "finetune": ("train", _TRAIN),
    "linprobe": ("train", _TRAIN),
    "knn": ("train", ("torch", "torchvision", "timm", "safetensors")),
    "compare": ("train", ("torch", "torchvision", "timm", "safetensors", "matplotlib")),
    "sweep": ("train", (*_TRAIN, "matplotlib")),
    "distill": ("train", _TRAIN),
    "reconstruct": ("train", ("torch", "timm", "safetensors")),
    "import": ("train", ("torch", "timm", "safetensors")),
    "export-weights": ("train", ("torch", "timm", "safetensors")),
    "export": ("train", ("torch", "timm", "safetensors", "onnx", "onnxruntime")),
    "report": ("train", ("torch", "torchvision", "timm", "safetensors", "onnx", "onnxruntime")),
    "report --engine openvino": ("train,openvino", ("torch", "torchvision", "timm", "safetensors", "onnx", "openvino")),
    "quickstart": ("train", (*_TRAIN, "onnx", "onnxruntime", "sklearn")),
    "verify": ("", ("onnxruntime",)),
    "predict": ("", ("onnxruntime",)),
    "eval BUNDLE": ("", ("onnxruntime",)),
    "eval CKPT": ("train", ("torch", "torchvision", "timm", "safetensors")),
    "predict --out FILE.parquet": ("parquet", ("onnxruntime", "pyarrow")),
    "predict on TIFF": ("tiff", ("onnxruntime", "tifffile")),
    "benchmark": ("", ("onnxruntime",)),
    "benchmark-train": ("train", ("torch", "timm", "accelerate")),
    "build-engine": ("trt", ("onnxruntime", "tensorrt", _PYCUDA)),
    "export --engine trt": ("train,trt", ("torch", "timm", "safetensors", "onnx", "onnxruntime", "tensorrt", _PYCUDA)),
    "predict --engine trt": ("trt", ("tensorrt", _PYCUDA)),
    "export --engine openvino": ("train,openvino", ("torch", "timm", "safetensors", "onnx", "openvino")),
    "predict --engine openvino": ("openvino", ("openvino",)),
    "data": ("", ()),
    "info": ("", ()),
}
"""The extra and the modules behind each command."""

_DISTRIBUTIONS = {"yaml": "pyyaml", "sklearn": "scikit-learn", "PIL": "pillow", _CUDA_BINDINGS: "cuda-bindings"}


def run_doctor(_: DoctorConfig) -> Result:
    """Look at packages, engines and devices; always succeeds."""
    modules = sorted(
        {"numpy", "PIL", "typer", "rich"}
        | {module for _, needed in NEEDS.values() for module in needed}
        | {_CUDA_BINDINGS}
    )
    packages = {module: _version(module) for module in modules}
    commands = {
        name: (
            {
                "missing": missing,
                "install": (
                    f"pip install 'mae-deploy[{extra}]'" if extra else "pip install --force-reinstall mae-deploy"
                ),
            }
            if missing
            else None
        )
        for name, (extra, needed) in NEEDS.items()
        for missing in [
            [
                module
                for module in needed
                if packages[module] is None and not (module == _PYCUDA and packages[_CUDA_BINDINGS])
            ]
        ]
    }
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
            except (ImportError, RuntimeError) as error:
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
    import onnxruntime

    return ", ".join(name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers())


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
    commands = Table("command", "state", title="Commands", title_justify="left")
    for name, problem in data["commands"].items():
        state = (
            Text("ready", "green")
            if problem is None
            else Text(f"needs {', '.join(problem['missing'])}: {problem['install']}", "yellow")
        )
        commands.add_row(name, state)
    packages = {name: version or "-" for name, version in data["packages"].items()}
    machine = {**data["machine"], "cpu_features": " ".join(data["machine"]["cpu_features"] or "-")}
    machine["gpus"] = "\n".join(machine["gpus"]) or "-"
    return Group(
        facts_table("Machine", machine),
        facts_table("Packages", packages),
        facts_table("Engines", data["engines"]),
        commands,
    )
