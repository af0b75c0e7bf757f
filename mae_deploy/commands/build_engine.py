"""`mae-deploy build-engine`: a TensorRT engine for this machine, checked and put into the bundle; torch-free."""

from __future__ import annotations

from typing import Any

from mae_deploy.commands.config import BuildEngineConfig
from mae_deploy.progress import notice, percentage
from mae_deploy.reporting.bundles import engine_summary
from mae_deploy.reporting.tables import facts_table
from mae_deploy.results import Result
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.profiles import read_profiles
from mae_deploy.runtime.tensorrt.add_engine import Built, build_engine
from mae_deploy.runtime.tensorrt.api import load_tensorrt
from mae_deploy.runtime.tensorrt.engine import gpu_index
from mae_deploy.serving.deepstream import check_bundle
from mae_deploy.serving.write import refuse_to_serve_over, write_for_servers


def run_build_engine(config: BuildEngineConfig) -> Result:
    """Build an engine from a bundle's graph and add it to the bundle.

    Raises:
        ConfigError: no bundle, or a precision, sizes or options that are not available.
        MissingDependency: no driver, GPU, TensorRT or memory backend.
        CheckFailed: the engine misses parity, or INT8 is not faster than FP16.
        MaeDeployError: TensorRT cannot build it.
    """
    bundle = Bundle.load(config.bundle)
    refuse_to_serve_over(bundle.path, triton=config.triton, deepstream=config.deepstream)
    if config.deepstream is not None:
        check_bundle(bundle)
    load_tensorrt(gpu_index(config.device))  # what is missing is said before a bar is shown
    with percentage("build") as report:
        built = build_engine(
            bundle,
            precision=config.precision,
            profiles=read_profiles(config.profile),
            options=config.build,
            device=config.device,
            prefer=config.prefer,
            on_progress=report,
        )
    if built.rejected is not None:
        notice("FP16 is kept:", built.rejected)
    written = write_for_servers(bundle, built.entry, triton=config.triton, deepstream=config.deepstream)
    for server, folder in written.items():
        notice(f"{server}:", f"written to {folder}")
    return Result(
        {**_data(bundle, built), **({"served": written} if written else {})},
        facts_table(f"{bundle.path / built.entry['file']}", _facts(built)),
    )


def _data(bundle: Bundle, built: Built) -> dict[str, Any]:
    return {"bundle": str(bundle.path), **built.entry, "rejected": built.rejected}


def _facts(built: Built) -> dict[str, object]:
    entry, record = built.entry, built.entry["build"]
    kernels = record["kernels"]
    counted = ", ".join(f"{number} {name}" for name, number in kernels["precisions"].items())
    facts: dict[str, object] = {
        "engine": engine_summary(entry),
        "size": f"{record['size'] / 1e6:.1f} MB, built in {record['seconds']:.0f} s",
        "kernels": (
            f"{kernels['layers']} layers, {kernels['fused_attention']} of them fused attention;"
            f" {counted or 'no precisions told'}"
        ),
        "parity": f"{entry['parity']['checks']} checks passed: {', '.join(entry['parity']['sizes'])}",
        "warnings": len(record["warnings"]) or "-",
    }
    if built.baseline is not None:
        facts["against FP16"] = f"{built.baseline['latency_ratio']:.2f} of its latency"
    return facts
