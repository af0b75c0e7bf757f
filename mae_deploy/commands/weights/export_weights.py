"""`mae-deploy export-weights`: a checkpoint as the original implementation, timm or transformers loads it, checked
before anything is left behind.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mae_deploy.checkpoint import WEIGHTS, write_safetensors
from mae_deploy.commands.weights.config import ExportWeightsConfig
from mae_deploy.errors import ConfigError
from mae_deploy.files import atomic_path, refuse_to_overwrite, write_json, write_text
from mae_deploy.reporting.licence import say_licence
from mae_deploy.reporting.tables import facts_table
from mae_deploy.results import Result
from mae_deploy.weights.load import read_weights
from mae_deploy.weights.write.card import model_card
from mae_deploy.weights.write.check import check_round_trip
from mae_deploy.weights.write.foreign import (
    ForeignModel,
    Library,
    foreign_model,
    header,
    original_content,
    plain_tensors,
)


def run_export_weights(config: ExportWeightsConfig) -> Result:
    """Convert, write, check; returns the report.

    Raises:
        ConfigError: that library's models do not compute what this one does.
        CheckFailed: read back, or run in that library, the model differs.
    """
    refuse_to_overwrite(config.out, file=config.to == "original")
    if config.to == "original" and config.out.suffix != ".pth":
        raise ConfigError(
            f"--out {config.out} is not called .pth",
            hint="the original implementation loads a file, such as checkpoints/mae.pth",
        )
    loaded = read_weights(config.checkpoint)
    model = foreign_model(loaded, config.to)
    with atomic_path(config.out) as aside:
        proof = _write(aside, model, config.to, config.seed)
    say_licence(model.loaded.metadata.licence, "what was written")
    report = _report(config, model, proof)
    return Result(report, facts_table(f"{config.checkpoint} → {config.out}", report))


def _write(path: Path, model: ForeignModel, library: Library, seed: int) -> dict[str, Any]:
    if library == "original":
        with path.open("wb") as file:  # of a path, torch.save would write the name into the file
            torch.save(original_content(model), file)
        return check_round_trip(path, model, library, seed)
    path.mkdir()
    write_safetensors(path / WEIGHTS, plain_tensors(model), header(model))
    for name, content in model.configs.items():
        write_json(path / name, content)
    proof = check_round_trip(path, model, library, seed)
    write_text(path / "README.md", model_card(model, library, proof))
    return proof


def _report(config: ExportWeightsConfig, model: ForeignModel, proof: dict[str, Any]) -> dict[str, Any]:
    metadata = model.loaded.metadata
    return {
        "out": str(config.out),
        "to": config.to,
        "kind": metadata.kind,
        "model": model.loaded.encoder_config.name,
        "files": [config.out.name] if config.to == "original" else ["model.safetensors", *model.configs, "README.md"],
        "tensors": len(model.tensors),
        "parameters": sum(tensor.numel() for tensor in model.tensors.values()),
        "left_out": model.left_out,
        "proof": proof,
        "licence": metadata.licence,
    }
