"""Checkpoints: `model.safetensors` and a `metadata.json` that says what it is, where it came from and what it may be
used for.

Reading the metadata needs no torch.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mae_deploy import __version__
from mae_deploy.config import from_dict, to_dict
from mae_deploy.errors import CheckFailed, ConfigError, import_optional
from mae_deploy.file_kinds import AGAIN, HEADER_WORDS, is_special, look_at, safetensors_header
from mae_deploy.files import atomic_path, follow_link, read_json, sha256, write_json
from mae_deploy.packages import upgrade
from mae_deploy.progress import notice
from mae_deploy.text import parse_json

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA_VERSION = 1
WEIGHTS = "model.safetensors"
METADATA = "metadata.json"
OWN_RECORD = "mae_deploy"
"""Under this word, weights files that we write hold the metadata of their checkpoint."""
_OURS = "blocks.0.attn.qkv.weight"
"""A tensor of every state dict under our names."""

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
    """What the head reads: avg, cls, mean or map (classifier; see models.vit.Pool)."""
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
    """A checkpoint that was found and whose metadata was read."""

    path: Path
    """Its folder, or its weights file where that was copied without the folder."""
    metadata: Metadata

    @property
    def weights(self) -> Path:
        """The file that holds them."""
        return self.path if self.path.is_file() else self.path / WEIGHTS

    def check(self) -> None:
        """Whether the weights are whole, by the header and length of their file; needs neither torch nor safetensors.

        Raises:
            CheckFailed: they are not.
        """
        if not self.weights.is_file():
            raise CheckFailed(f"{self.weights} is missing, or is no file", hint="copy the whole checkpoint folder")
        if (kind := look_at(self.weights)).weights != "safetensors":
            raise CheckFailed(f"cannot read {self.weights}: it is {kind.words}", hint=kind.hint)

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
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / WEIGHTS, tensors, record_words(metadata))
    write_json(folder / METADATA, _record(metadata))


def record_words(metadata: Metadata) -> dict[str, str]:
    """The words of a weights file's header, which may be copied without its folder: our whole record, and the licence
    for other readers.
    """
    record = json.dumps(_record(metadata), default=str)
    return {"format": "pt", "licence": metadata.licence, OWN_RECORD: record}


def save_tensors(file: Path, tensors: Mapping[str, Tensor], words: Mapping[str, str] | None = None) -> None:
    """Write tensors from any device.

    Raises:
        OSError: the disk is full, say; safetensors has an error of its own for it.
    """
    safetensors = import_optional("safetensors.torch", extra="train")
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        safetensors.save_file(plain, file, metadata=None if words is None else dict(words))
    except import_optional("safetensors", extra="train").SafetensorError as error:
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1]))) from error


def write_safetensors(file: Path, tensors: Mapping[str, Tensor], words: Mapping[str, str]) -> None:
    """Write tensors from any device and the words of the header, to the same bytes each time."""
    save_tensors(file, tensors, words)
    # safetensors writes the words in another order each time, of the same length in any order
    header = {**safetensors_header(file), HEADER_WORDS: dict(words)}
    content = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    with file.open("r+b") as opened:
        length = int.from_bytes(opened.read(8), "little")
        assert len(content) <= length, "safetensors' JSON is not as compact as Python's"
        opened.write(content.ljust(length))


def _record(metadata: Metadata) -> dict[str, Any]:
    return {"schema_version": SCHEMA_VERSION, **to_dict(metadata)}


def read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, on the CPU, and the words of its header.

    Raises:
        CheckFailed: there is no such file, or it is damaged or something else.
    """
    with _opened(file) as content:
        return {name: content.get_tensor(name) for name in content.keys()}, content.metadata() or {}  # noqa: SIM118


def check_safetensors(file: Path) -> None:
    """Whether a file is whole, by its header and its length.

    Raises:
        CheckFailed: as `read_safetensors`.
    """
    with _opened(file):
        return


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    safetensors = import_optional("safetensors", extra="train")
    if is_special(file):
        raise CheckFailed(f"cannot read {file}: it is no file")
    try:
        with safetensors.safe_open(file, framework="pt") as content:
            yield content
    except (safetensors.SafetensorError, OSError) as error:
        kind = look_at(file) if file.is_file() else None
        if kind is None or kind.weights == "safetensors":
            raise CheckFailed(f"cannot read {file}: {error}") from error
        raise CheckFailed(f"cannot read {file}: it is {kind.words}", hint=kind.hint) from error


def find_checkpoint(path: Path) -> Path | None:
    """The checkpoint folder that `path` means: itself, the best or last of a run folder, or the folder of a weights
    file; without its folder, a weights file itself where it holds our record. Where a run was copied without its links,
    the newest, and a line says so.
    """
    checkpoints = path / "checkpoints"
    candidates = [path, follow_link(checkpoints / "best"), follow_link(checkpoints / "last")]
    if path.name == WEIGHTS:
        candidates.append(path.parent)
    found = next((folder for folder in candidates if (folder / METADATA).is_file()), None)
    if found is None:
        found = next((file for file in (path, path / WEIGHTS) if file.is_file() and _has_record(file)), None)
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
    if folder.is_file():
        return Checkpoint(folder, read_record(_record_in(folder), folder))
    metadata = read_record(read_json(folder / METADATA), folder / METADATA)
    _check_beside(metadata, folder)
    return Checkpoint(folder, metadata)


def read_record(data: Any, file: Path) -> Metadata:
    """Metadata as they were written.

    Raises:
        ConfigError: it has unknown values, or was written by a newer version.
    """
    version = data.pop("schema_version", None) if isinstance(data, dict) else None
    if type(version) is not int or version != SCHEMA_VERSION:
        newer = type(version) is int and version > SCHEMA_VERSION
        raise ConfigError(
            f"{file}: schema version {version!r}; mae-deploy {__version__} reads version {SCHEMA_VERSION}",
            hint=upgrade(data.get("mae_deploy_version")) if newer else "it is no checkpoint of mae-deploy's",
        )
    provenance = data.get("provenance")
    # written before the rule was
    if "positions" not in data and isinstance(provenance, dict) and provenance.get("layout") == "timm":
        data["positions"] = timm_positions(str(provenance.get("architecture")))
    return from_dict(Metadata, data, where="metadata.")


def timm_positions(architecture: str) -> Positions:
    """How timm takes a model of its own to another image size."""
    return "timm-flexivit" if "flexi" in architecture else "timm"


def _record_in(file: Path) -> Any:
    """Our record in the header of a weights file; None: it has none.

    Raises:
        ConfigError: it is not JSON.
    """
    if not file.is_file():
        return None  # whoever reads the weights says so
    try:
        words = safetensors_header(file).get(HEADER_WORDS)
        record = words.get(OWN_RECORD) if isinstance(words, dict) else None
        return parse_json(record) if isinstance(record, str) else None
    except OSError:
        return None  # whoever reads the weights says why
    except ValueError as error:
        raise ConfigError(f"cannot read {file}: the record in its header is not JSON: {error}", hint=AGAIN) from error


def _has_record(file: Path) -> bool:
    """Whether a weights file tells all of itself: ours, under our names, and in no model folder of another library."""
    return (
        _record_in(file) is not None
        and _OURS in safetensors_header(file)
        and not file.with_name("config.json").is_file()
    )


def _check_beside(metadata: Metadata, folder: Path) -> None:
    """A weights file may have been copied over another; older ones have no record that would tell."""
    inside, beside = _record_in(folder / WEIGHTS), to_dict(metadata)
    if inside is None:
        return
    if not isinstance(inside, dict):
        raise CheckFailed(f"{folder / WEIGHTS} has a record in its header that is no mapping", hint=AGAIN)
    for name in ("kind", "encoder", "decoder", "objective", "pool", "num_classes"):
        if inside.get(name) != beside[name]:
            raise CheckFailed(
                f"{folder / WEIGHTS} is not the file that the {METADATA} beside it describes: {name} {inside.get(name)}"
                f" and {beside[name]}",
                hint="put the weights file into a folder of its own: it tells what it is",
            )


def inherited_licence(*licences: str) -> str:
    """The licence of what was derived from all of these: every one that binds, as an SPDX expression."""
    parts = dict.fromkeys(part for licence in licences for part in licence.split(" AND "))
    return " AND ".join(part for part in parts if part != OWN_LICENCE) or OWN_LICENCE
