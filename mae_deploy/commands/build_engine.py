"""`mae-deploy build-engine`: a TensorRT engine for this machine, or with TensorRT for RTX for others, checked where
that can be, and put into the bundle; torch-free.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mae_deploy.commands.config import BuildEngineConfig
from mae_deploy.errors import ConfigError
from mae_deploy.progress import notice, percentage
from mae_deploy.reporting.bundles import UNVERIFIED, engine_summary
from mae_deploy.reporting.command_line import next_command
from mae_deploy.reporting.tables import facts_table
from mae_deploy.results import Result
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.manifest import EngineEntry, plan_engine
from mae_deploy.runtime.profiles import read_profiles
from mae_deploy.runtime.registry import ALIASES, TENSORRT, TENSORRT_RTX
from mae_deploy.runtime.tensorrt.add_engine import Built, build_engine
from mae_deploy.runtime.tensorrt.api import load_tensorrt
from mae_deploy.runtime.tensorrt.engine import gpu_index
from mae_deploy.runtime.tensorrt.plans import is_verified
from mae_deploy.runtime.tensorrt.rtx import load_builder
from mae_deploy.serving.deepstream import check_bundle
from mae_deploy.serving.write import left_to_serve, refuse_to_serve_over, write_for_servers
from mae_deploy.text import as_size, duration


def run_build_engine(config: BuildEngineConfig) -> Result:
    """Build an engine from a bundle's graph and add it to the bundle.

    Raises:
        ConfigError: no bundle, a precision, sizes or options that are not available, or a server that cannot run what
            is built.
        MissingDependency: no driver, GPU, TensorRT or memory backend.
        CheckFailed: the engine misses parity, or INT8 is not faster than FP16.
        MaeDeployError: TensorRT cannot build it.
    """
    bundle = Bundle.load(config.bundle)
    if (left := _left_to_serve(config, bundle)) is not None:
        return left
    refuse_to_serve_over(bundle.path, triton=config.triton, deepstream=config.deepstream)
    if config.deepstream is not None:
        check_bundle(bundle)
    rtx = ALIASES.get(config.engine, bundle.manifest["engine"]) == TENSORRT_RTX
    for option, server in (("--triton", config.triton), ("--deepstream", config.deepstream)):
        if rtx and server is not None:
            raise ConfigError(
                f"{option} {server}: servers run engines of TensorRT, not of TensorRT for RTX",
                hint="pass --engine trt on the server's own GPU",
            )
    # What is missing is said before a bar is shown.
    _ = load_builder() if rtx else load_tensorrt(gpu_index(config.device))
    with percentage("build") as report:
        built = build_engine(
            bundle,
            precision=config.precision,
            profiles=read_profiles(config.profile),
            options=config.build,
            device=config.device,
            rtx=rtx,
            prefer=config.prefer,
            on_progress=report,
        )
    if built.rejected is not None:
        notice("FP16 is kept:", built.rejected)
    if not is_verified(built.entry):
        notice("not verified:", UNVERIFIED)
    return _written(config, bundle, built, triton=config.triton, deepstream=config.deepstream)


def _left_to_serve(config: BuildEngineConfig, bundle: Bundle) -> Result | None:
    """What is left to do of this very call, which was ended when one server had its engine and the other had not."""
    both = {"triton": config.triton, "deepstream": config.deepstream}
    for entry in bundle.manifest["engines"] if None not in both.values() else ():
        left = left_to_serve(bundle, entry, triton=config.triton, deepstream=config.deepstream)
        missing = [f"--{server}" for server, folder in left.items() if folder is not None]
        if len(missing) == 1 and _is_asked_for(entry, config):
            notice("kept:", f"{entry['file']} and what serves it; {missing[0]} is written now")
            return _written(config, bundle, Built(entry=entry, checks=(), baseline=None, rejected=None), **left)
    return None


def _is_asked_for(entry: EngineEntry, config: BuildEngineConfig) -> bool:
    """Whether an engine of the bundle may be what these settings build."""
    options = config.build
    return config.precision in (None, entry["precision"]) and (
        (entry["hardware_compatible"], entry["version_compatible"], entry["stripped"])
        == (options.hardware_compatible, options.version_compatible, options.strip)
    )


def _written(
    config: BuildEngineConfig, bundle: Bundle, built: Built, *, triton: Path | None, deepstream: Path | None
) -> Result:
    """The engine for servers, and what the command says."""
    written = write_for_servers(bundle, built.entry, triton=triton, deepstream=deepstream)
    for name, folder in written.items():
        notice(f"{name}:", f"written to {folder}")
    return Result(
        {**_data(bundle, built), **({"served": written} if written else {})},
        facts_table(f"{bundle.path / built.entry['file']}", _facts(built)),
        then=next_command("benchmark", config.bundle, engine=plan_engine(built.entry)),
    )


def _data(bundle: Bundle, built: Built) -> dict[str, Any]:
    return {"bundle": str(bundle.path), **built.entry, "rejected": built.rejected}


def _facts(built: Built) -> dict[str, object]:
    entry, record = built.entry, built.entry["build"]
    facts: dict[str, object] = {
        "engine": engine_summary(entry),
        "size": f"{as_size(record['size'])}, built in {duration(record['seconds'])}",
        "kernels": _kernels(record["kernels"]) if plan_engine(entry) == TENSORRT else "made on each device",
        "parity": _parity(entry),
        "warnings": len(record["warnings"]) or "-",
    }
    if built.baseline is not None:
        facts["against FP16"] = f"{built.baseline['latency_ratio']:.2f} of its latency"
    return facts


def _kernels(kernels: dict[str, Any]) -> str:
    counted = ", ".join(f"{number} {name}" for name, number in kernels["precisions"].items())
    return (
        f"{kernels['layers']} layers, {kernels['fused_attention']} of them fused attention;"
        f" {counted or 'no precisions told'}"
    )


def _parity(entry: EngineEntry) -> str:
    records = [entry["parity"]] if plan_engine(entry) == TENSORRT else entry["parity"].values()
    passed = [f"{record['checks']} checks passed: {', '.join(record['sizes'])}" for record in records]
    return "; ".join(passed) or UNVERIFIED
