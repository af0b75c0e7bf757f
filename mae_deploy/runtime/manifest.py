"""The shape of a bundle's `manifest.json`, written by export and read strictly by everyone else."""

from __future__ import annotations

import dataclasses
import re
import typing
from pathlib import Path
from typing import Any, Literal, TypedDict

from mae_deploy import __version__
from mae_deploy.errors import ConfigError
from mae_deploy.files import sha256
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.runtime.json_types import check, check_keys
from mae_deploy.runtime.tolerance import Tolerance

SCHEMA_VERSION = 2
MANIFEST_FILE = "manifest.json"
GRAPH_FILE = "encoder.onnx"
GOLDEN_FILE = "golden.npz"

IMAGES = "images"
IDS_KEEP = "ids_keep"
NUM_KEEP = "num_keep"

Dim = int | str
"""A fixed size, or the name of a dynamic one."""

TokenMode = Literal["full", "visible", "ragged", "reconstruct"]

Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8"]

QUANTIZED = ("int8", "fp8")
"""The precisions whose bundle has a record of quantization."""

TOKEN_INPUTS: dict[str, tuple[str, ...]] = {
    "full": (),
    "visible": (IDS_KEEP,),
    "ragged": (IDS_KEEP, NUM_KEEP),
    "reconstruct": (IDS_KEEP,),
}
"""What a graph of each token mode takes beside the images; all int64."""

BLOCKS = "blocks"
"""The array of the golden file that holds PyTorch's tokens after each block."""

_BLOCK_OUTPUT = re.compile(r"block_(0|[1-9]\d*)")


class _Bands(TypedDict, total=False):
    band_groups: list[list[int]]
    """Groups of channels, each with patches of its own; absent without."""


class ModelEntry(_Bands):
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
    shape: list[Dim]
    """A name stands for a dynamic size: `["B", 3, 224, 224]`."""


class GraphEntry(TypedDict):
    """The ONNX graph; its external data is found through the graph itself and must be listed in `files`."""

    file: str
    opset: int
    inputs: list[TensorEntry]
    """`images` is float32 or float16 `(B, C, H, W)`, normalised, or uint8 `(B, H, W, C)`, which the graph
    normalises."""
    outputs: list[TensorEntry]
    blocks: list[str]
    """The graph's tensors after each encoder block, `(B, 1 + K, D)` or `(B * (1 + K), D)`; empty where the golden file
    has no `blocks`."""


class GoldenEntry(TypedDict):
    """Sample inputs with PyTorch's FP32 outputs, as an npz under the graph's own names for inputs and outputs.

    `blocks` in it is float32 `(S', L, T', D)`: PyTorch's first T' tokens (CLS first) after each of L blocks for the
    first S' samples.
    """

    file: str
    source: str
    """Where the images come from."""
    num_samples: int


class EngineEntry(TypedDict):
    """A TensorRT engine that was built from the graph, its plan a file of the bundle."""

    file: str
    """`engines/<TensorRT version>-<GPU>-<precision>.plan`."""
    tensorrt: str
    """The version that built it."""
    gpu: str
    """The GPU's name, as its driver gives it."""
    compute_capability: list[int]
    """Major and minor."""
    precision: Precision
    profiles: list[dict[str, list[int]]]
    """Smallest, usual and largest B and K of each optimisation profile; at least one."""
    hardware_compatible: Literal["none", "same", "ampere"]
    """On which other GPUs it runs: none, all of the same compute capability, all from 8.0 on."""
    version_compatible: bool
    """Whether later versions of the same major run it."""
    stripped: bool
    """Whether its weights are those of the graph in `build.graph`, and not in the plan."""
    created: str
    """ISO 8601, UTC."""
    build: dict[str, Any]
    """How it was built: graph and its hash, options, seconds, kernels, warnings."""
    parity: dict[str, Any]
    """The checks that it passed."""
    latency_ms: float | None
    """Median of a call at the first profile's usual size, the inputs copied to the GPU and the outputs left there."""
    layers: str | None
    """The file of TensorRT's report on every layer."""


class FileEntry(TypedDict):
    """What a file of the bundle must be."""

    sha256: str
    size: int


class ToleranceEntry(TypedDict, total=False):
    """What every output must meet; see `mae_deploy.runtime.tolerance.Tolerance`. What is null or absent is not
    judged.
    """

    cosine: float | None
    max_abs: float | None
    max_relative: float | None
    centred_cosine: float | None
    sqnr_db: float | None
    top1_agreement: float | None


class Manifest(TypedDict):
    """`manifest.json`. All keys are needed; keys that this version does not know are left alone."""

    schema_version: int
    mae_deploy_version: str
    created: str
    """ISO 8601, UTC."""
    kind: Literal["encoder", "classifier", "mae"]
    model: ModelEntry
    decoder: dict[str, Any] | None
    """Depth, width and heads of the decoder of a `reconstruct` graph."""
    class_names: list[str] | None
    """In the order of the logits."""
    token_mode: TokenMode
    num_patches: int
    """Patches that `ids_keep` counts: those of the grid, of each group of bands."""
    batch: int | None
    """None: dynamic."""
    keep: int | None
    """The fixed K of `ids_keep (B, K)`; None: dynamic, or a full graph."""
    profile: dict[str, list[int]]
    """Smallest, usual and largest B and K for which the graph was proven; a full graph has no K."""
    precision: Precision
    typing: Literal["weak", "strong"]
    """strong: the types in the graph say what is computed in what; weak: the engine is told the precision."""
    engine: Literal["onnxruntime", "openvino", "tensorrt"]
    """On which the bundle was proven."""
    quantization: dict[str, Any] | None
    """How INT8 or FP8 was chosen: policy, layers, calibration; None in other precisions.

    `baseline` in it names the graph of the same weights in FP16, in the bundle's typing, with which a TensorRT engine
    is compared."""
    graph: GraphEntry
    preprocess: dict[str, Any]
    """The fields of `mae_deploy.images.preprocess.Preprocess`."""
    provenance: dict[str, Any]
    licence: str
    tolerance: ToleranceEntry
    parity: dict[str, Any]
    golden: GoldenEntry
    engines: list[EngineEntry]
    """TensorRT engines built from the graph; empty without."""
    files: dict[str, FileEntry]
    """Every file but the manifest, by its POSIX path inside the bundle."""


def follows_keep(name: str) -> bool:
    """Whether an output is `(B, K, D)`, a row for each patch of `ids_keep` in its order."""
    return name == "tokens" or _BLOCK_OUTPUT.fullmatch(name) is not None


def file_entry(path: Path) -> FileEntry:
    """The record of a file for `files`."""
    return {"sha256": sha256(path), "size": path.stat().st_size}


def read_preprocess(values: dict[str, Any]) -> Preprocess:
    """The preprocessing that a manifest describes; a field that this version does not know would change the pixels, and
    is refused.

    Raises:
        ConfigError: a field is missing, unknown or of the wrong type.
    """
    hints = typing.get_type_hints(Preprocess)
    names = [field.name for field in dataclasses.fields(Preprocess)]
    unknown = [name for name in values if name not in names]
    if unknown:
        raise ConfigError(
            f"manifest: unknown preprocessing '{unknown[0]}'",
            hint="the bundle needs a newer mae-deploy: pip install --upgrade mae-deploy",
        )
    check_keys(values, {name: hints[name] for name in names}, frozenset(names) - {"pixel_max"}, "preprocess.")
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }
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
    check(value, Manifest, "")
    manifest = typing.cast(Manifest, value)
    for problem in (
        _reason_against_model,
        _reason_against_sizes,
        _reason_against_graph,
        _reason_against_outputs,
        _reason_against_files,
        _reason_against_engines,
        _reason_against_tolerance,
    ):
        if message := problem(manifest):
            raise ConfigError(f"manifest: {message}", hint="export the bundle again")
    return manifest


def _reason_against_model(manifest: Manifest) -> str | None:
    model, preprocess = manifest["model"], read_preprocess(manifest["preprocess"])
    size, patch = model["image_size"], model["patch_size"]
    if len(size) != 2 or patch < 1 or min(size) < patch or any(side % patch for side in size):
        return f"image size {size} is not a height and a width in multiples of the patch size {patch}"
    groups = model.get("band_groups")
    num_patches = (size[0] // patch) * (size[1] // patch) * (1 if groups is None else len(groups))
    if groups is not None and sorted(band for group in groups for band in group) != list(range(model["in_chans"])):
        return f"the groups of bands {groups} do not have each of {model['in_chans']} channels once"
    if manifest["num_patches"] != num_patches:
        of_groups = "" if groups is None else f" in {len(groups)} groups of bands"
        return (
            f"num_patches is {manifest['num_patches']}, but image size {size} has {num_patches} patches of"
            f" {patch}{of_groups}"
        )
    if list(preprocess.image_size) != size or preprocess.channels != model["in_chans"]:
        return (
            f"preprocess makes {preprocess.channels} x {preprocess.image_size}, the model takes {model['in_chans']} x"
            f" {size}"
        )
    if (manifest["precision"] in QUANTIZED) != (manifest["quantization"] is not None):
        return (
            f"precision {manifest['precision']} {'without' if manifest['quantization'] is None else 'with'} a record of"
            " quantization"
        )
    return None


def _reason_against_sizes(manifest: Manifest) -> str | None:
    mode, num_patches, profile = manifest["token_mode"], manifest["num_patches"], manifest["profile"]
    fixed = {"B": manifest["batch"], "K": manifest["keep"]}
    if fixed["B"] is not None and fixed["B"] < 1:
        return f"batch {fixed['B']} is less than 1"
    if fixed["K"] is not None and (mode == "full" or not 1 <= fixed["K"] <= num_patches):
        return f"keep {fixed['K']} does not fit token mode '{mode}' with {num_patches} patches"
    sizes = {"B"} if mode == "full" else {"B", "K"}
    if set(profile) != sizes:
        return (
            f"the profile of token mode '{mode}' is of {', '.join(sorted(sizes))}, not of"
            f" {', '.join(profile) or 'nothing'}"
        )
    for name, numbers in profile.items():
        if len(numbers) != 3 or not 1 <= numbers[0] <= numbers[1] <= numbers[2]:
            return f"the profile {numbers} of {name} is not a smallest, usual and largest size"
        if fixed[name] is not None and set(numbers) != {fixed[name]}:
            return f"the profile {numbers} of {name} does not fit its fixed size {fixed[name]}"
    if "K" in profile and profile["K"][2] > num_patches:
        return f"the profile {profile['K']} of K has more than {num_patches} patches"
    return None


def _reason_against_graph(manifest: Manifest) -> str | None:
    model, mode, graph = manifest["model"], manifest["token_mode"], manifest["graph"]
    inputs = {entry["name"]: entry for entry in graph["inputs"]}
    names = (IMAGES, *TOKEN_INPUTS[mode])
    if len(graph["inputs"]) != len(names) or set(inputs) != set(names):
        return (
            f"a graph of token mode '{mode}' has the inputs {', '.join(names)}, not"
            f" {', '.join(entry['name'] for entry in graph['inputs'])}"
        )
    C, (H, W) = model["in_chans"], model["image_size"]
    B: Dim = manifest["batch"] or "B"
    layouts: dict[str, list[Dim]] = {"float32": [B, C, H, W], "float16": [B, C, H, W], "uint8": [B, H, W, C]}
    wanted = {IDS_KEEP: ("int64", [B, manifest["keep"] or "K"]), NUM_KEEP: ("int64", [B])}
    for name, entry in inputs.items():
        dtype, shape = wanted.get(name) or (entry["dtype"], layouts.get(entry["dtype"], []))
        if entry["dtype"] != dtype or not _fits(entry["shape"], shape):
            return (
                f"the input {name} is {entry['dtype']} {entry['shape']}, not {dtype} {shape}"
                if shape
                else f"the input {name} cannot be {entry['dtype']}"
            )
    blocks = graph["blocks"]
    if blocks and (len(blocks) != model["depth"] or len(set(blocks)) != len(blocks)):
        return f"graph.blocks has {len(set(blocks))} names for {model['depth']} blocks"
    return None


def _reason_against_outputs(manifest: Manifest) -> str | None:
    entries, model = manifest["graph"]["outputs"], manifest["model"]
    inputs = [entry["name"] for entry in manifest["graph"]["inputs"]]
    names = [entry["name"] for entry in entries]
    if not names or len({*names, *inputs}) != len(names) + len(inputs):
        return f"the outputs {names} must be at least one name, each once and none of an input"
    for entry in entries:
        block = _BLOCK_OUTPUT.fullmatch(entry["name"])
        if block is not None and int(block[1]) >= model["depth"]:
            return f"there is no {entry['name']} in {model['depth']} blocks"
        shape = _output_shape(manifest, entry["name"])
        if shape is not None and not _fits(entry["shape"], shape):
            return f"the output {entry['name']} has the shape {entry['shape']}, not {shape}"
        if entry["dtype"] not in ("float32", "float16"):
            return f"the output {entry['name']} is {entry['dtype']}, not float32 or float16"
    return None


def _output_shape(manifest: Manifest, name: str) -> list[Dim] | None:
    """The shape of an output whose name this version knows; a word stands for a size that is not."""
    model = manifest["model"]
    B: Dim = manifest["batch"] or "B"
    K: Dim = manifest["num_patches"] if manifest["token_mode"] == "full" else manifest["keep"] or "K"
    P, C, D = model["patch_size"], model["in_chans"], model["embed_dim"]
    if follows_keep(name):
        return [B, K, D]
    classes = manifest["class_names"]
    grid = [side // P for side in model["image_size"]]
    shapes: dict[str, list[Dim]] = {
        "cls": [B, D],
        "pooled": [B, D],
        "logits": [B, "classes" if classes is None else len(classes)],
        "feature_map": [B, D, *grid],
        "pixels": [B, manifest["num_patches"], P * P * C],
        **{level: [B, "channels", "height", "width"] for level in ("p2", "p3", "p4", "p5")},
    }
    return shapes.get(name)


def _fits(found: list[Dim], wanted: list[Dim]) -> bool:
    """Whether a shape is the wanted one: a dynamic B or K has a name, every other size is a number."""
    if len(found) != len(wanted):
        return False
    return all(
        (
            isinstance(size, str)
            if name in ("B", "K")
            else isinstance(size, int) and size >= 1 and (isinstance(name, str) or size == name)
        )
        for size, name in zip(found, wanted, strict=True)
    )


def _reason_against_files(manifest: Manifest) -> str | None:
    for key, name in (("graph", manifest["graph"]["file"]), ("golden", manifest["golden"]["file"])):
        if name not in manifest["files"]:
            return f"{key}.file '{name}' is not listed in files"
    for name, entry in manifest["files"].items():
        if not re.fullmatch("[0-9a-f]{64}", entry["sha256"]):
            return f"files['{name}'].sha256 {entry['sha256']!r} is no SHA-256 in lower-case hexadecimals"
    if manifest["golden"]["num_samples"] < 1:
        return f"golden.num_samples {manifest['golden']['num_samples']} is less than 1"
    return None


def _reason_against_engines(manifest: Manifest) -> str | None:
    for index, entry in enumerate(manifest["engines"]):
        where = f"engines[{index}]"
        for name in (entry["file"], entry["layers"]):
            if name is not None and name not in manifest["files"]:
                return f"{where}: '{name}' is not listed in files"
        if not re.fullmatch(r"\d+(\.\w+)+", entry["tensorrt"]):
            return f"{where}: '{entry['tensorrt']}' is no version of TensorRT"
        if len(entry["compute_capability"]) != 2:
            return f"{where}: the compute capability {entry['compute_capability']} is not a major and a minor number"
        if not entry["profiles"]:
            return f"{where} has no profile"
        for profile in entry["profiles"]:
            if set(profile) != set(manifest["profile"]) or any(
                len(sizes) != 3 or not 1 <= sizes[0] <= sizes[1] <= sizes[2] for sizes in profile.values()
            ):
                return (
                    f"{where}: the profile {profile} does not give a smallest, usual and largest"
                    f" {' and '.join(manifest['profile'])}"
                )
    return None


def _reason_against_tolerance(manifest: Manifest) -> str | None:
    unknown = [name for name in manifest["tolerance"] if name not in ToleranceEntry.__annotations__]
    if unknown:  # what cannot be judged must not pass
        return f"unknown tolerance '{unknown[0]}'"
    Tolerance(**manifest["tolerance"])
    return None
