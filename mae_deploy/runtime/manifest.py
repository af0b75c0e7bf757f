"""The shape of a bundle's `manifest.json`, written by export and read strictly by everyone else."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypedDict, Union, get_args, get_origin

from mae_deploy import __version__
from mae_deploy.errors import ConfigError
from mae_deploy.files import sha256
from mae_deploy.preprocess import Preprocess
from mae_deploy.runtime.parity import Tolerance

SCHEMA_VERSION = 1
MANIFEST_FILE = "manifest.json"
GRAPH_FILE = "encoder.onnx"
GOLDEN_FILE = "golden.npz"

IMAGES = "images"
IDS_KEEP = "ids_keep"
INPUTS = {"full": {IMAGES: "float32"}, "visible": {IMAGES: "float32", IDS_KEEP: "int64"}}
"""The inputs and their dtypes that a graph of each token mode has."""


class ModelEntry(TypedDict):
    """The encoder's numbers."""

    name: str
    image_size: list[int]
    """Height and width in pixels."""
    patch_size: int
    in_chans: int
    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float


class TensorEntry(TypedDict):
    """One input or output of the graph."""

    name: str
    dtype: str
    shape: list[str | int]
    """A name stands for a dynamic size: `["B", 3, 224, 224]`."""


class GraphEntry(TypedDict):
    """The ONNX graph; its external data is found through the graph itself and must be listed in `files`."""

    file: str
    opset: int
    inputs: list[TensorEntry]
    outputs: list[TensorEntry]


class GoldenEntry(TypedDict):
    """Sample inputs with PyTorch's FP32 outputs, as an npz under the graph's own names for inputs and outputs."""

    file: str
    source: str
    """Where the images come from."""
    num_samples: int


class FileEntry(TypedDict):
    """What a file of the bundle must be."""

    sha256: str
    size: int


class ToleranceBase(TypedDict):
    """What every output must meet; see `mae_deploy.runtime.parity.Tolerance`."""

    cosine: float
    max_abs: float


class ToleranceEntry(ToleranceBase, total=False):
    """Further limits, where the precision asks for them."""

    centred_cosine: float
    sqnr_db: float
    top1_agreement: float


class Manifest(TypedDict):
    """`manifest.json`. All keys are needed; keys that this version does not know are left alone."""

    schema_version: int
    mae_deploy_version: str
    created: str
    """ISO 8601, UTC."""
    kind: Literal["encoder", "classifier", "mae"]
    model: ModelEntry
    class_names: list[str] | None
    """In the order of the logits."""
    token_mode: Literal["full", "visible"]
    num_patches: int
    batch: int | None
    """None: dynamic."""
    keep: int | None
    """The fixed K of a visible graph; None: dynamic, or a full graph."""
    precision: str
    graph: GraphEntry
    preprocess: dict[str, Any]
    """The fields of `mae_deploy.preprocess.Preprocess`."""
    provenance: dict[str, Any]
    licence: str
    tolerance: ToleranceEntry
    parity: dict[str, Any]
    golden: GoldenEntry
    engines: list[dict[str, Any]]
    """Engines built from the graph; empty without."""
    files: dict[str, FileEntry]
    """Every file but the manifest, by its POSIX path inside the bundle."""


def file_entry(path: Path) -> FileEntry:
    """The record of a file for `files`."""
    return {"sha256": sha256(path), "size": path.stat().st_size}


def read_preprocess(values: dict[str, Any]) -> Preprocess:
    """The preprocessing that a manifest describes; a field that this version does not know would change the pixels, and is refused.

    Raises:
        ConfigError: a field is missing, unknown or of the wrong type.
    """
    hints = typing.get_type_hints(Preprocess)
    names = [field.name for field in dataclasses.fields(Preprocess)]
    unknown = [name for name in values if name not in names]
    if unknown:
        raise ConfigError(f"manifest: unknown preprocessing '{unknown[0]}'", hint="the bundle needs a newer mae-deploy: pip install --upgrade mae-deploy")
    _check_keys(values, {name: hints[name] for name in names}, frozenset(names), "preprocess.")
    fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return Preprocess(**fields)


def validate_manifest(value: Any) -> Manifest:
    """Return `value` if it is a manifest that this version can read and that does not contradict itself.

    Raises:
        ConfigError: another schema version, a missing key, a wrong type, or two entries that disagree.
    """
    if not isinstance(value, dict):
        raise ConfigError(f"manifest: must be a mapping, not {type(value).__name__}")
    version = value.get("schema_version")
    if type(version) is not int or version != SCHEMA_VERSION:  # True == 1, so isinstance does not do
        newer = type(version) is int and version > SCHEMA_VERSION
        raise ConfigError(
            f"manifest: schema version {version!r}; mae-deploy {__version__} reads version {SCHEMA_VERSION}",
            hint="pip install --upgrade mae-deploy" if newer else "export the bundle again",
        )
    _check(value, Manifest, "")
    manifest = typing.cast(Manifest, value)
    for problem in (_model_problem, _graph_problem, _files_problem, _tolerance_problem):
        if message := problem(manifest):
            raise ConfigError(f"manifest: {message}", hint="export the bundle again")
    return manifest


def _model_problem(manifest: Manifest) -> str | None:
    model, preprocess = manifest["model"], read_preprocess(manifest["preprocess"])
    size, patch = model["image_size"], model["patch_size"]
    if len(size) != 2 or patch < 1 or min(size) < patch or any(side % patch for side in size):
        return f"image size {size} is not a height and a width in multiples of the patch size {patch}"
    num_patches = (size[0] // patch) * (size[1] // patch)
    if manifest["num_patches"] != num_patches:
        return f"num_patches is {manifest['num_patches']}, but image size {size} has {num_patches} patches of {patch}"
    if list(preprocess.image_size) != size or preprocess.channels != model["in_chans"]:
        return f"preprocess makes {preprocess.channels} x {preprocess.image_size}, the model takes {model['in_chans']} x {size}"
    if manifest["batch"] is not None and manifest["batch"] < 1:
        return f"batch {manifest['batch']} is less than 1"
    keep = manifest["keep"]
    if keep is not None and (manifest["token_mode"] != "visible" or not 1 <= keep <= num_patches):
        return f"keep {keep} does not fit token mode '{manifest['token_mode']}' with {num_patches} patches"
    return None


def _graph_problem(manifest: Manifest) -> str | None:
    model, mode = manifest["model"], manifest["token_mode"]
    inputs = {entry["name"]: entry for entry in manifest["graph"]["inputs"]}
    found = {name: entry["dtype"] for name, entry in inputs.items()}
    if found != INPUTS[mode]:
        return f"a graph of token mode '{mode}' has the inputs {INPUTS[mode]}, not {found}"
    if inputs[IMAGES]["shape"][1:] != [model["in_chans"], *model["image_size"]]:
        return f"the input shape {inputs[IMAGES]['shape']} does not fit {model['in_chans']} x {model['image_size']}"
    names = [entry["name"] for entry in manifest["graph"]["outputs"]]
    if not names or len({*names, *inputs}) != len(names) + len(inputs):
        return f"the outputs {names} must be at least one name, each once and none of an input"
    for entry in manifest["graph"]["outputs"]:
        classes = manifest["class_names"]
        if entry["name"] == "logits" and classes is not None and entry["shape"][-1:] != [len(classes)]:
            return f"logits have the shape {entry['shape']} for {len(classes)} class names"
    return None


def _files_problem(manifest: Manifest) -> str | None:
    for key, name in (("graph", manifest["graph"]["file"]), ("golden", manifest["golden"]["file"])):
        if name not in manifest["files"]:
            return f"{key}.file '{name}' is not listed in files"
    for name, entry in manifest["files"].items():
        if not re.fullmatch("[0-9a-f]{64}", entry["sha256"]):
            return f"files['{name}'].sha256 {entry['sha256']!r} is no SHA-256 in lower-case hexadecimals"
    if manifest["golden"]["num_samples"] < 1:
        return f"golden.num_samples {manifest['golden']['num_samples']} is less than 1"
    return None


def _tolerance_problem(manifest: Manifest) -> str | None:
    unknown = [name for name in manifest["tolerance"] if name not in ToleranceEntry.__annotations__]
    if unknown:  # what cannot be judged must not pass
        return f"unknown tolerance '{unknown[0]}'"
    Tolerance(**manifest["tolerance"])
    return None


# --- types -----------------------------------------------------------------------------------------------------------


def _check_keys(value: Any, hints: dict[str, Any], required: frozenset[str], where: str) -> None:
    for name, kind in hints.items():
        if name in value:
            _check(value[name], kind, where + name)
        elif name in required:
            raise ConfigError(f"manifest: '{where}{name}' is missing", hint="export the bundle again")


def _check(value: Any, kind: Any, where: str) -> None:
    """Raise ConfigError unless the JSON value is of the annotated kind."""
    if typing.is_typeddict(kind) and isinstance(value, dict):
        _check_keys(value, typing.get_type_hints(kind), kind.__required_keys__, f"{where}." if where else "")
    elif get_origin(kind) is list and isinstance(value, list):
        for index, item in enumerate(value):
            _check(item, get_args(kind)[0], f"{where}[{index}]")
    elif get_origin(kind) is dict and isinstance(value, dict):
        for key, item in value.items():
            _check(item, get_args(kind)[1], f"{where}['{key}']")
    elif not _is_plain(value, kind):
        wanted = re.sub(r"<class '(\w+)'>|mae_deploy\.runtime\.manifest\.|typing\.", r"\1", str(kind)).replace("NoneType", "null")
        raise ConfigError(f"manifest: '{where}' must be {wanted}, not {value!r:.80}", hint="export the bundle again")


def _is_plain(value: Any, kind: Any) -> bool:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return any(_is_plain(value, option) for option in arguments)
    if origin is list:
        return isinstance(value, list) and all(_is_plain(item, arguments[0]) for item in value)
    if origin is tuple:  # JSON has lists only
        kinds = arguments[:1] * len(value) if isinstance(value, list) and arguments[-1] is Ellipsis else arguments
        return isinstance(value, list) and len(value) == len(kinds) and all(map(_is_plain, value, kinds))
    if origin is Literal:
        return isinstance(value, str) and value in arguments
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    return kind is Any or (kind in (str, bool, type(None)) and isinstance(value, kind))
