"""What a server reads, written from a bundle: a model for Triton Inference Server, and DeepStream's files."""

from __future__ import annotations

from pathlib import Path

from mae_deploy.files import refuse_to_overwrite
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.manifest import EngineEntry
from mae_deploy.serving.deepstream import write_deepstream
from mae_deploy.serving.triton import model_folder, write_triton


def refuse_to_serve_over(bundle: Path, *, triton: Path | None, deepstream: Path | None) -> None:
    """Say before the work begins that something is where the files would go.

    Raises:
        ConfigError: a Triton model of the bundle's name, or a folder of DeepStream's files, is there.
    """
    if triton is not None:
        model_folder(bundle, triton)
    if deepstream is not None:
        refuse_to_overwrite(deepstream, option="--deepstream")


def write_for_servers(
    bundle: Bundle, engine: EngineEntry | None, *, triton: Path | None, deepstream: Path | None
) -> dict[str, str]:
    """Write what is asked for; returns the folders, under `triton` and `deepstream`.

    Args:
        engine: the bundle's plan to serve; None: the graph, which only Triton serves.

    Raises:
        ConfigError: something is there, or the server cannot run it.
        CheckFailed: a file of the bundle is not the one that was exported.
    """
    written = {}
    if triton is not None:
        written["triton"] = str(write_triton(bundle, triton, engine))
    if deepstream is not None and engine is not None:
        written["deepstream"] = str(write_deepstream(bundle, deepstream, engine))
    return written
