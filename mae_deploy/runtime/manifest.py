"""The shape of a bundle's `manifest.json`, written by export and read strictly by everyone else."""

from __future__ import annotations

import dataclasses
import re
import typing
from pathlib import Path
from typing import Any, Literal, TypedDict

from mae_deploy.errors import ConfigError
from mae_deploy.files import sha256
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.runtime.json_types import check_keys

SCHEMA_VERSION = 2
MANIFEST_FILE = "manifest.json"
GRAPH_FILE = "encoder.onnx"
GOLDEN_FILE = "golden.npz"

IMAGES = "images"
IDS_KEEP = "ids_keep"
NUM_KEEP = "num_keep"

PATCHES = "patches"
"""What a cached graph takes in place of `images`: the pixels of the kept patches."""
CACHE_MASK = "cache_mask"
"""float32 `(B, R)`: 1 where attention sees a row of the cache, 0 where it is recomputed or was never computed."""
REST = "rest"
"""float32 `(B, D)`: the sum of the final tokens of the patches that are not recomputed; for means over all."""
OLD_TOKENS = "old_tokens"
"""float32 `(B, R, D)`: the final tokens that go with the rows of the cache; for attention that pools all."""
NEW_ROWS = "new_rows"
"""What a cached graph gives for the cache: the rows of CLS and the recomputed patches, T, of all keys and values in the
order of `cache_names`: `(B, 2 L H, T, d)`."""
UPDATES = "updates"
"""Of golden samples of a cached graph: int64 `(S, U)`, how many of a sample's patches each of its updates takes."""

Dim = int | str
"""A fixed size, or the name of a dynamic one."""

TokenMode = Literal["full", "visible", "ragged", "reconstruct", "cached"]

Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8"]

QUANTIZED = ("int8", "fp8")
"""The precisions whose bundle has a record of quantization."""

TOKEN_INPUTS: dict[str, tuple[str, ...]] = {
    "full": (),
    "visible": (IDS_KEEP,),
    "ragged": (IDS_KEEP, NUM_KEEP),
    "reconstruct": (IDS_KEEP,),
    "cached": (IDS_KEEP,),
}
"""What a graph of each token mode takes beside the images, or the patches in their place; all int64. A cached graph
also takes the cache."""

CLASS_OUTPUTS = ("logits", "probs")
"""The outputs of a classifier's head, one value a class: as they are, and their softmax."""

BLOCKS = "blocks"
"""The array of the golden file that holds PyTorch's tokens after each block."""

FRAME, FRAME_IMAGE = "frame", "frame_image"
"""The arrays of the golden file that hold a frame and what preprocessing made of it (see `GoldenEntry`)."""

PLANNED = ("tensorrt", "tensorrt-rtx")
"""The engines that do not read the graph, but plans that were built from it."""

_BLOCK_OUTPUT = re.compile(r"block_(0|[1-9]\d*)")

_LATER = {"pixel_max", "crop_mode"}
"""Fields of the preprocessing that manifests lack where they say nothing."""


class _Bands(TypedDict, total=False):
    band_groups: list[list[int]]
    """Groups of channels, each with patches of its own; absent without."""


class _BeyondPlain(TypedDict, total=False):
    """Where today's families differ from the original's ViT (see `EncoderConfig`); absent where they do not."""

    rotary: str
    rotary_base: float
    rotary_offset: float
    rotary_reference: list[int]
    position_table: bool
    class_token: bool
    num_registers: int
    activation: str
    qk_norm: bool
    attn_norm: bool
    mlp_norm: bool
    pre_norm: bool
    final_norm: bool
    norm_eps: float
    pool_norm: bool
    pool_heads: int
    pool_mlp_ratio: float
    pool_prefix: bool


class ModelEntry(_Bands, _BeyondPlain):
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


def num_prefix(model: ModelEntry) -> int:
    """Tokens before the patches, P: CLS and registers."""
    return int(model.get("class_token", True)) + model.get("num_registers", 0)


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
    """The graph's tensors after each encoder block, `(B, P + K, D)` or `(B * (P + K), D)`; empty where the golden file
    has no `blocks`."""


class GoldenEntry(TypedDict):
    """Sample inputs with PyTorch's FP32 outputs, as an npz under the graph's own names for inputs and outputs.

    `blocks` in it is float32 `(S', L, T', D)`: PyTorch's first T' tokens (CLS and registers first) after each of L
    blocks for the first S' samples. `frame` is a synthetic image `(h, w, C)` of another size and shape than the
    model's, `frame_image` float32 `(C, H, W)` what preprocessing made of it at export; bundles of older versions lack
    both.
    """

    file: str
    source: str
    """Where the images come from."""
    num_samples: int


class EngineEntry(TypedDict):
    """A TensorRT engine that was built from the graph, its plan a file of the bundle; see `plan_engine` for those of
    TensorRT for RTX."""

    file: str
    """`engines/<TensorRT version>-<GPU>-<precision>.plan`."""
    tensorrt: str
    """The version that built it."""
    gpu: str
    """The GPU's name, as its driver gives it; RTX for a plan of TensorRT for RTX, which is for many."""
    compute_capability: list[int]
    """Major and minor; of a plan of TensorRT for RTX the least that it runs on."""
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
    """The checks that it passed; of a plan of TensorRT for RTX, whose kernels are made on the device, those of each
    GPU by its name, and empty until one has checked it."""
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
    checked.
    """

    cosine: float | None
    max_abs: float | None
    max_relative: float | None
    centred_cosine: float | None
    sqnr_db: float | None
    top1_agreement: float | None


class _Certified(TypedDict, total=False):
    certificate: dict[str, Any]
    """What the graph was worth beside FP32 on the machine of the export, see `runtime.parity.certificate`; absent in
    bundles of older versions."""


class Manifest(_Certified):
    """`manifest.json`. All other keys are needed; keys that this version does not know are left alone."""

    schema_version: int
    mae_deploy_version: str
    created: str
    """ISO 8601, UTC."""
    kind: Literal["encoder", "classifier", "mae"]
    model: ModelEntry
    decoder: dict[str, Any] | None
    """Depth, width and heads of the decoder of a `reconstruct` graph."""
    class_names: list[str] | None
    """In the order of the logits and probabilities."""
    token_mode: TokenMode
    num_patches: int
    """Patches that `ids_keep` counts: those of the grid, of each group of bands."""
    batch: int | None
    """None: dynamic."""
    keep: int | None
    """The fixed K of `ids_keep (B, K)`; None: dynamic, or a full graph."""
    profile: dict[str, list[int]]
    """Smallest, usual and largest B and K for which the graph was checked; a full graph has no K."""
    precision: Precision
    typing: Literal["weak", "strong"]
    """strong: the types in the graph say what is computed in what; weak: the engine is told the precision."""
    engine: Literal["onnxruntime", "openvino", "tensorrt", "tensorrt-rtx"]
    """On which the bundle was checked."""
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
    parity: dict[str, dict[str, Any]]
    golden: GoldenEntry
    engines: list[EngineEntry]
    """TensorRT engines built from the graph; empty without."""
    files: dict[str, FileEntry]
    """Every file but the manifest, by its POSIX path inside the bundle."""


def plan_engine(entry: EngineEntry) -> str:
    """Which of `PLANNED` runs a plan: TensorRT for RTX has versions of its own, which begin with 1."""
    return PLANNED[entry["tensorrt"].startswith("1.")]


def follows_keep(name: str) -> bool:
    """Whether an output is `(B, K, D)`, a row for each patch of `ids_keep` in its order."""
    return name == "tokens" or _BLOCK_OUTPUT.fullmatch(name) is not None


def pools_mean(manifest: Manifest) -> bool:
    """Whether `pooled` of a cached graph is the mean of the tokens, and nothing else is done to it."""
    inputs = [entry["name"] for entry in manifest["graph"]["inputs"]]
    return REST in inputs and not manifest["model"].get("pool_norm")


def cache_names(depth: int) -> tuple[str, ...]:
    """The keys and values that a cached graph takes, block by block, each `(B, H, R, d)`."""
    return tuple(f"{part}_{index}" for index in range(depth) for part in ("keys", "values"))


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
    check_keys(values, {name: hints[name] for name in names}, frozenset(names) - _LATER, "preprocess.")
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }
    return Preprocess(**fields)
