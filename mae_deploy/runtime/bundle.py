"""A bundle: a folder with a graph, its manifest and golden samples, in which no file is parsed before its hash is
checked.
"""

from __future__ import annotations

import mmap
import os
import re
import shutil
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any
from weakref import finalize

from mae_deploy.errors import CheckFailed, ConfigError
from mae_deploy.file_kinds import look_at
from mae_deploy.files import is_inside, read_json, sha256, temporary_folder
from mae_deploy.hub import local
from mae_deploy.images.npz_file import read_npz
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.images.read import Array
from mae_deploy.runtime.check_manifest import validate_manifest
from mae_deploy.runtime.graph.check import GraphCheck
from mae_deploy.runtime.graph.of_bundle import check_graph_of
from mae_deploy.runtime.manifest import (
    BLOCKS,
    CLASS_OUTPUTS,
    IDS_KEEP,
    IMAGES,
    MANIFEST_FILE,
    NEW_ROWS,
    PATCHES,
    UPDATES,
    Manifest,
    ModelEntry,
    TensorEntry,
    TokenMode,
    read_preprocess,
)
from mae_deploy.runtime.tolerance import Tolerance

_EXTERNAL_DATA = re.compile(rb"\n\x08location\x12([\x80-\xff]*[\x00-\x7f])")
"""Where an ONNX file names external data: a protobuf key 'location', then the value's tag and its length as a
varint."""


class Bundle:
    """What `mae-deploy export` writes; `Bundle.load` reads it."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._checked: dict[str, Path] = {}
        self.checks: dict[str, GraphCheck] = {}
        self._golden: dict[str, Array] | None = None
        self._beside: Path | None = None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Bundle:
        """Read the manifest of the bundle in a folder, or at `hf://ORG/NAME`; the other files are read when they are
        needed.

        Raises:
            ConfigError: no bundle is there, its manifest is broken, or it needs a newer mae-deploy.
        """
        folder = local(path)
        if not (folder / MANIFEST_FILE).is_file():
            if folder.is_file():
                raise ConfigError(
                    f"{folder} is {look_at(folder).words}, not the folder of a bundle",
                    hint="'mae-deploy export' makes a bundle of weights",
                )
            raise ConfigError(
                f"no bundle at {folder}: there is no {MANIFEST_FILE}",
                hint="a bundle is the folder that 'mae-deploy export' writes",
            )
        return cls(folder, validate_manifest(read_json(folder / MANIFEST_FILE)))

    def reload(self) -> None:
        """Read the manifest again, after an engine was added; every file is checked anew."""
        self.manifest = type(self).load(self.path).manifest
        self._checked.clear()
        self.checks.clear()
        self._golden = None

    @property
    def model(self) -> ModelEntry:
        """The encoder's numbers: image and patch size, width, depth, heads."""
        return self.manifest["model"]

    @property
    def token_mode(self) -> TokenMode:
        """`full` (every patch), `visible` (K patches of each image), `ragged` (of each image its own number),
        `reconstruct` (K patches to all pixels), `cached` (K patches of a stream's next frame).
        """
        return self.manifest["token_mode"]

    @property
    def precision(self) -> str:
        """In what the graph computes: fp32, fp16, bf16, int8 or fp8."""
        return self.manifest["precision"]

    @property
    def arithmetic(self) -> str:
        """The precision as an `Engine` takes it: BF16 in place of the graph's FP32 only where the bundle was checked
        so.
        """
        if self.precision == "int8":
            return int8_arithmetic(self.manifest["quantization"] or {})
        weak_bf16 = self.manifest["typing"] == "weak" and self.manifest["engine"] == "openvino"
        return "fp32" if self.precision == "bf16" and not weak_bf16 else self.precision

    @property
    def baseline(self) -> str | None:
        """The file of the FP16 graph that an INT8 or FP8 graph for TensorRT is compared with; None without."""
        return (self.manifest["quantization"] or {}).get("baseline")

    @property
    def fixed_batch(self) -> int | None:
        """The batch size that the graph is fixed to; None: any."""
        return self.manifest["batch"]

    @property
    def largest_batch(self) -> int:
        """The largest batch for which the graph was checked."""
        return self.fixed_batch or self.manifest["profile"]["B"][2]

    @property
    def fixed_keep(self) -> int | None:
        """The K of `ids_keep (B, K)` that the graph is fixed to; None: any, or a full graph."""
        return self.manifest["keep"]

    @property
    def keep_range(self) -> tuple[int, int]:
        """The smallest and the largest number of an image's patches for which the graph was checked; N and N for a full
        graph.
        """
        smallest, _, largest = self.manifest["profile"].get("K", [self.num_patches] * 3)
        if (
            self.token_mode == "ragged" and self.fixed_keep is not None
        ):  # the rows have one length, what is real in them is free
            smallest = 1
        return smallest, largest

    @property
    def image_dtype(self) -> str:
        """float32 or float16: `(B, C, H, W)`, normalised; uint8: `(B, H, W, C)`, which the graph normalises. Of
        a cached graph, that of the patches.
        """
        return next(entry["dtype"] for entry in self.inputs if entry["name"] in (IMAGES, PATCHES))

    @property
    def num_patches(self) -> int:
        """Number of patches of an image, N."""
        return self.manifest["num_patches"]

    @cached_property
    def preprocess(self) -> Preprocess:
        """What makes the graph's input of an image."""
        return read_preprocess(self.manifest["preprocess"])

    @property
    def inputs(self) -> list[TensorEntry]:
        """The graph's inputs, in its order."""
        return self.manifest["graph"]["inputs"]

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the graph's inputs, in its order."""
        return tuple(entry["name"] for entry in self.inputs)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of what the graph computes of images, in its order."""
        return tuple(name for name in self.graph_outputs if name != NEW_ROWS)

    @property
    def graph_outputs(self) -> tuple[str, ...]:
        """Names of the graph's outputs, in its order: those, and of a cached graph the new rows of its cache."""
        return tuple(entry["name"] for entry in self.manifest["graph"]["outputs"])

    @property
    def sample_names(self) -> tuple[str, ...]:
        """What a golden sample has beside the outputs: the graph's inputs; of a cached graph a few updates of a
        stream.
        """
        return (PATCHES, IDS_KEEP, UPDATES) if self.token_mode == "cached" else self.input_names

    @property
    def blocks(self) -> tuple[str, ...]:
        """The graph's tensors after each encoder block; empty where the golden samples do not cover them."""
        return tuple(self.manifest["graph"]["blocks"])

    @property
    def class_output(self) -> str | None:
        """The output that tells classes: logits, else probs; None without either."""
        return next((name for name in CLASS_OUTPUTS if name in self.output_names), None)

    @property
    def class_names(self) -> list[str] | None:
        """Names in the order of the logits, where there are any."""
        return self.manifest["class_names"]

    @property
    def licence(self) -> str:
        """What the weights may be used for."""
        return self.manifest["licence"]

    @property
    def tolerance(self) -> Tolerance:
        """How far an engine's outputs may be from PyTorch's."""
        return Tolerance(**self.manifest["tolerance"])

    def file(self, name: str) -> Path:
        """The path of a file of the bundle, after its content has been checked against the manifest (once for each
        Bundle).

        Raises:
            CheckFailed: not listed in the manifest, outside of the bundle's folder, missing, or not the file that was
                exported.
        """
        if name not in self._checked:
            self._checked[name] = self._check(name)
        return self._checked[name]

    def graph(self, name: str | None = None) -> Path:
        """The path of the ONNX graph, or of another one by the name of its file, after it and all external data that it
        names have been checked, and that it ends.

        Raises:
            CheckFailed: as `file`.
            ConfigError: operators, memory or work that no such network needs.
        """
        name = name or self.manifest["graph"]["file"]
        path = self.file(name)
        if name not in self.checks:
            self.checks[name] = check_graph_of(self.manifest, path)
        folder = PurePosixPath(name).parent
        files = [path, *(self.file(str(folder / location)) for location in external_data(path))]
        return path if len(files) == 1 or not any(map(_leads_out, files)) else self._gathered(path, files)

    def _gathered(self, graph: Path, files: list[Path]) -> Path:
        """A graph and its external data without links, which engines refuse, for as long as the bundle is there."""
        if self._beside is None:
            folder = temporary_folder()
            self._beside = folder.__enter__()
            finalize(self, folder.__exit__, None, None, None)
        for path in files:
            copy = self._beside / path.relative_to(self.path)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.unlink(missing_ok=True)
            try:
                os.link(path.resolve(), copy)
            except OSError:  # another disk, or a file system without hard links
                shutil.copyfile(path, copy)
        return self._beside / graph.relative_to(self.path)

    def check_files(self) -> None:
        """Check every file that the manifest lists.

        Raises:
            CheckFailed: as `file`.
        """
        for name in self.manifest["files"]:
            self.file(name)

    def golden(self) -> dict[str, Array]:
        """The golden samples: inputs and PyTorch's outputs under the graph's names, each `(num_samples, ...)`, and
        `blocks` (see `GoldenEntry`); read once, so the arrays are read-only.

        Raises:
            CheckFailed: as `file`, or an array is missing or of another length or type than the manifest says.
        """
        if self._golden is None:
            self._golden = self._read_golden()
        return dict(self._golden)

    def _read_golden(self) -> dict[str, Array]:
        golden = self.manifest["golden"]
        path = self.file(golden["file"])
        try:
            arrays = read_npz(path)
        except ValueError as error:
            raise CheckFailed(f"{path} holds no arrays: {error}", hint="export the bundle again") from error
        for name in (*self.sample_names, *self.output_names):
            if name not in arrays or arrays[name].shape[:1] != (golden["num_samples"],):
                found = f"has the shape {arrays[name].shape}" if name in arrays else "is missing"
                raise CheckFailed(
                    f"{path}: '{name}' {found}; the manifest promises {golden['num_samples']} samples",
                    hint="export the bundle again",
                )
        types = {**{entry["name"]: entry["dtype"] for entry in self.inputs}, UPDATES: "int64"}
        for name in self.sample_names:
            if arrays[name].dtype != types[name]:
                raise CheckFailed(
                    f"{path}: '{name}' is {arrays[name].dtype}, not {types[name]}", hint="export the bundle again"
                )
        if (
            UPDATES in self.sample_names
            and not 0 <= arrays[IDS_KEEP].min() <= arrays[IDS_KEEP].max() < self.num_patches
        ):
            raise CheckFailed(
                f"{path}: '{IDS_KEEP}' has {arrays[IDS_KEEP].min()} to {arrays[IDS_KEEP].max()} of"
                f" {self.num_patches} patches",
                hint="export the bundle again",
            )
        if UPDATES in self.sample_names and not are_updates(arrays[UPDATES], arrays[IDS_KEEP]):
            raise CheckFailed(
                f"{path}: '{UPDATES}' {arrays[UPDATES][:1].tolist()} does not divide the {arrays[IDS_KEEP].shape[1]}"
                " patches of each sample",
                hint="export the bundle again",
            )
        shape: tuple[int, ...] = arrays[BLOCKS].shape if BLOCKS in arrays else ()
        if self.blocks and not (
            len(shape) == 4
            and 1 <= shape[0] <= golden["num_samples"]
            and shape[1::2] == (len(self.blocks), self.model["embed_dim"])
        ):
            found = f"has the shape {shape}" if shape else "is missing"
            raise CheckFailed(
                f"{path}: '{BLOCKS}' {found}; the manifest promises {len(self.blocks)} blocks",
                hint="export the bundle again",
            )
        for array in arrays.values():
            array.flags.writeable = False
        return arrays

    def _check(self, name: str) -> Path:
        entry = self.manifest["files"].get(name)
        if entry is None:
            raise CheckFailed(
                f"'{name}' is not among the files of the bundle {self.path}: {', '.join(self.manifest['files'])}"
            )
        path = self.path / name
        if not is_inside(name):
            raise CheckFailed(f"'{name}' is outside of the bundle {self.path}", hint="its files are inside its folder")
        if not path.is_file():
            if path.is_symlink():
                raise CheckFailed(
                    f"{path} is a link to {os.readlink(path)}, which is not there",
                    hint="fetch it: git annex get, dvc pull, hf download",
                )
            raise CheckFailed(f"{path} is missing", hint="copy the whole bundle folder, or export it again")
        size = path.stat().st_size
        try:
            # of another size, it need not be read, however large it is
            found = sha256(path) if size == entry["size"] else "another"
        except OSError as error:
            raise CheckFailed(f"cannot read {path}: {error.strerror}") from error
        if found != entry["sha256"]:
            if (kind := look_at(path)).stands_in:
                raise CheckFailed(f"{path} is {kind.words}", hint=kind.hint)
            raise CheckFailed(
                f"{path} is not the file that was exported: expected SHA-256 {entry['sha256']} ({entry['size']} bytes),"
                f" found {found} ({size} bytes)",
                hint="copy the bundle again, or export it again",
            )
        return path


def int8_arithmetic(quantization: Mapping[str, Any]) -> str:
    """What an INT8 graph computes in, as an `Engine` takes it.

    Args:
        quantization: the manifest's record; older ones have weights of 8 bits and no `weight_bits`.
    """
    weights = "-w7" if quantization.get("weight_bits") == 7 else ""
    return f"int8{weights}{'-bf16' if quantization.get('rest') == 'bf16' else ''}"


def are_updates(updates: Array, ids_keep: Array) -> bool:
    """Whether every sample has the same updates, of at least one patch each, and they take all patches."""
    return bool(
        updates.ndim == ids_keep.ndim == 2
        and (updates == updates[:1]).all()
        and (updates > 0).all()
        and (updates.sum(axis=1) == ids_keep.shape[1]).all()
    )


def _leads_out(path: Path) -> bool:
    """Whether a file, or a folder that it lies in, is a link to another folder."""
    return path.resolve().parent != path.parent.resolve()


def external_data(graph: Path) -> list[str]:
    """The file names of external data in an ONNX file, found in its bytes: the device has no ONNX parser of its own."""
    if graph.stat().st_size == 0:
        return []
    names: dict[str, None] = {}
    with graph.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for match in _EXTERNAL_DATA.finditer(content):
            length = sum((byte & 0x7F) << (7 * place) for place, byte in enumerate(match[1]))
            names[content[match.end() : match.end() + length].decode("utf-8", "replace")] = None
    return list(names)
