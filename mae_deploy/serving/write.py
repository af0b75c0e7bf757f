"""What a server reads, written from a bundle: a model for Triton Inference Server, and DeepStream's files."""

from __future__ import annotations

from pathlib import Path

from mae_deploy.files import refuse_to_overwrite, sha256
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.manifest import EngineEntry, FileEntry
from mae_deploy.serving.deepstream import PLAN_FILE, write_deepstream
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


def left_to_serve(
    bundle: Bundle, engine: EngineEntry | None, *, triton: Path | None, deepstream: Path | None
) -> dict[str, Path | None]:
    """Of the folders that are asked for, those that do not serve this plan, or the graph, yet: a call that was ended
    between two has written the others. The arguments of `write_for_servers`.
    """
    kind = "onnx" if engine is None else "plan"
    own = bundle.manifest["files"][bundle.manifest["graph"]["file"] if engine is None else engine["file"]]
    if triton is not None:
        model = triton / bundle.path.resolve().name / "1" / f"model.{kind}"
        triton = None if _is(model / model.name if model.is_dir() else model, own) else triton
    if deepstream is not None:
        deepstream = None if _is(deepstream / PLAN_FILE, own) else deepstream
    return {"triton": triton, "deepstream": deepstream}


def _is(path: Path, entry: FileEntry) -> bool:
    """Whether it is this file of the bundle."""
    return path.is_file() and path.stat().st_size == entry["size"] and sha256(path) == entry["sha256"]


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
