"""Checkpoints: `model.safetensors` and a `metadata.json` that says what it is, where it came from and what it may be
used for.

Reading the metadata needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mae_deploy.config import from_dict, to_dict
from mae_deploy.errors import CheckFailed, ConfigError, import_optional
from mae_deploy.file_kinds import look_at
from mae_deploy.files import atomic_path, follow_link, read_json, sha256, write_json
from mae_deploy.progress import notice

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA_VERSION = 1
WEIGHTS = "model.safetensors"
METADATA = "metadata.json"

CheckpointKind = Literal["mae", "encoder", "classifier"]

Positions = Literal["bicubic", "timm", "timm-flexivit", "torchvision"]

OWN_LICENCE = "own"
"""Trained from nothing on the user's own images: the user decides."""
UNKNOWN_LICENCE = "unspecified"
NON_COMMERCIAL = "CC-BY-NC-4.0"
"""The licence of the weights that the MAE authors released."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Metadata:
    """Everything about a checkpoint but its tensors."""

    kind: CheckpointKind
    """mae: encoder and decoder; encoder; classifier: encoder and head."""
    encoder: dict[str, Any]
    """The encoder's config."""
    preprocess: dict[str, Any]
    """Resize, crop and normalisation of its inputs."""
    positions: Positions = "bicubic"
    """How position embeddings are taken to another image size: bicubic, as the original and transformers do, or as
    timm, its FlexiViT or torchvision."""
    decoder: dict[str, Any] | None = None
    """The decoder's config (mae)."""
    norm_pix_loss: bool = True
    """The decoder predicts patches normalised one by one (mae)."""
    objective: dict[str, Any] | None = None
    """What the decoder predicts, and from which encoder; None: pixels, from the visible patches (mae)."""
    pool: str | None = None
    """What the head reads, avg or cls (classifier)."""
    num_classes: int | None = None
    """Width of the head (classifier)."""
    class_names: tuple[str, ...] | None = None
    """Names of the classes in the order of the logits, where known (classifier)."""
    licence: str = UNKNOWN_LICENCE
    """What the weights may be used for; derived weights inherit it."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """The stage that wrote it, its config and data fingerprint, and the record of the checkpoint before it under
    `parent`."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """Figures measured when it was written."""
    step: int = 0
    """Optimiser steps taken."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint folder that was found and whose metadata was read."""

    path: Path
    metadata: Metadata

    @property
    def weights(self) -> Path:
        """The file that holds them."""
        return self.path / WEIGHTS

    def tensors(self) -> dict[str, Tensor]:
        """The state dict, on the CPU.

        Raises:
            CheckFailed: the weights are damaged.
        """
        return read_safetensors(self.weights)[0]

    def record(self) -> dict[str, Any]:
        """What a derived checkpoint or bundle keeps of this one: its provenance, metrics and hash."""
        data = self.metadata
        return {
            "path": str(self.path),
            "sha256": sha256(self.weights),
            "kind": data.kind,
            "metrics": data.metrics,
            **data.provenance,
        }


def save_checkpoint(folder: Path, tensors: dict[str, Tensor], metadata: Metadata) -> None:
    """Write `folder` whole or not at all.

    Args:
        tensors: the state dict.
    """
    with atomic_path(folder) as aside:
        write_checkpoint(aside, tensors, metadata)


def write_checkpoint(folder: Path, tensors: dict[str, Tensor], metadata: Metadata) -> None:
    """Write into a folder that the caller renames when everything is in it."""
    safetensors = import_optional("safetensors.torch", extra="train")
    folder.mkdir(parents=True, exist_ok=True)
    # The licence also stands in the file itself, which may be copied without its folder.
    header = {"format": "pt", "licence": metadata.licence}
    safetensors.save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        folder / WEIGHTS,
        metadata=header,
    )
    write_json(folder / METADATA, {"schema_version": SCHEMA_VERSION, **to_dict(metadata)})


def read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, on the CPU, and the words of its header.

    Raises:
        CheckFailed: there is no such file, or it is damaged or something else.
    """
    safetensors = import_optional("safetensors", extra="train")
    try:
        with safetensors.safe_open(file, framework="pt") as content:
            return {name: content.get_tensor(name) for name in content.keys()}, content.metadata() or {}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        kind = look_at(file) if file.is_file() else None
        if kind is None or kind.weights == "safetensors":
            raise CheckFailed(f"cannot read {file}: {error}") from error
        raise CheckFailed(f"{file} is {kind.words}", hint=kind.hint) from error


def find_checkpoint(path: Path) -> Path | None:
    """The checkpoint folder that `path` means: itself, the best or last of a run folder, or the folder of a weights
    file. Where a run was copied without its links, the newest, and a line says so.
    """
    checkpoints = path / "checkpoints"
    candidates = [path, follow_link(checkpoints / "best"), follow_link(checkpoints / "last")]
    if path.name == WEIGHTS:
        candidates.append(path.parent)
    found = next((folder for folder in candidates if (folder / METADATA).is_file()), None)
    if found is None and (complete := [step for step in steps_in(checkpoints) if (step / METADATA).is_file()]):
        found = complete[-1]
        notice("checkpoint:", f"{checkpoints} has neither best nor last, which are links: taking {found.name}")
    return found


def steps_in(checkpoints: Path) -> list[Path]:
    """The folders `step-N` in a run's folder of checkpoints, by N."""
    steps = [folder for folder in checkpoints.glob("step-*") if folder.name.removeprefix("step-").isdecimal()]
    return sorted(steps, key=lambda folder: int(folder.name.removeprefix("step-")))


def open_checkpoint(path: Path) -> Checkpoint:
    """Find a checkpoint of ours and read its metadata.

    Raises:
        ConfigError: nothing there, or written by a newer version.
    """
    folder = find_checkpoint(path)
    if folder is None:
        raise ConfigError(f"no checkpoint at {path}", hint="give a run folder, a checkpoint folder or a weights file")
    data = read_json(folder / METADATA)
    version = data.pop("schema_version", None) if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise ConfigError(
            f"{folder / METADATA} has schema version {version}, this mae-deploy reads {SCHEMA_VERSION}",
            hint="upgrade mae-deploy",
        )
    return Checkpoint(folder, from_dict(Metadata, data, where="metadata."))


def inherited_licence(*licences: str) -> str:
    """The licence of what was derived from all of these: every one that binds, as an SPDX expression."""
    parts = dict.fromkeys(part for licence in licences for part in licence.split(" AND "))
    return " AND ".join(part for part in parts if part != OWN_LICENCE) or OWN_LICENCE
