"""A bundle with a graph of a few nodes that has an encoder's inputs and outputs in every token mode, and the same
arithmetic in NumPy as its reference.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from mae_deploy.images.read import Array
from mae_deploy.runtime.manifest import (
    BLOCKS,
    FRAME,
    FRAME_IMAGE,
    GOLDEN_FILE,
    GRAPH_FILE,
    file_entry,
    read_preprocess,
)
from mae_deploy.runtime.tolerance import TOLERANCES

# Unequal, so that a transposed or mixed-up axis does not fit.
C, P, GRID = 3, 2, (3, 7)
H, W, N = GRID[0] * P, GRID[1] * P, GRID[0] * GRID[1]
D, CLASSES, DEPTH = 13, 11, 2
SAMPLES, K = 5, 4

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
_PREPROCESS = {
    "image_size": [H, W],
    "channels": C,
    "crop_pct": 1.0,
    "interpolation": "bilinear",
    "mean": list(MEAN),
    "std": list(STD),
}
CLASS_NAMES = [f"class-{index}" for index in range(CLASSES)]
OUTPUTS = {"cls": ["B", D], "tokens": ["B", "K", D], "pooled": ["B", D], "logits": ["B", CLASSES]}
MORE_OUTPUTS = {
    "probs": ["B", CLASSES],
    "block_0": ["B", "K", D],
    "feature_map": ["B", D, *GRID],
    "pixels": ["B", N, P * P * C],
}
"""What a graph gives where it is asked for."""

BLOCK_TENSORS = ["block_0_tokens", "block_1_tokens"]
BLOCK_ROWS = ["block_0_rows", "block_1_rows"]
"""The same tokens as `(B * (1 + K), D)`; a bundle names the one or the other."""

CLS_VALUE = 0.5
"""What every channel of the CLS token is before the first block."""

_ALL_OUTPUTS: dict[str, list[Any]] = {**OUTPUTS, **MORE_OUTPUTS}
_TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "uint8": TensorProto.UINT8}


def weights(seed: int = 0) -> dict[str, Array]:
    """The graph's weights; those of `seed` 0 are the reference's."""
    rng = np.random.default_rng(seed)
    shapes = {
        "patch_weight": (P * P * C, D),
        "pos_embed": (N, D),
        "cls_weight": (D, D),
        "head_weight": (D, CLASSES),
        "block_weight": (D, D),
        "pixel_weight": (D, P * P * C),
    }
    return {name: rng.normal(size=shape, scale=0.5).astype(np.float32) for name, shape in shapes.items()}


def rounded(values: Array, bits: int) -> Array:
    """The weights as integers of so many bits would hold them."""
    step = np.abs(values).max() / (2 ** (bits - 1) - 1)
    nearest: Array = np.round(values / step) * step
    return nearest.astype(np.float32)


def reference_blocks(images: Array, ids_keep: Array | None = None) -> Array:
    """The tokens after each block, CLS first: `(B, DEPTH, 1 + K, D)`."""
    w = weights()
    B = len(images)
    if images.dtype == np.uint8:
        images = ((images / 255 - MEAN) / STD).transpose(0, 3, 1, 2)
    patches = (
        images.astype(np.float32).reshape(B, C, GRID[0], P, GRID[1], P).transpose(0, 2, 4, 3, 5, 1).reshape(B, N, -1)
    )
    embedded = patches @ w["patch_weight"] + w["pos_embed"]
    if ids_keep is not None:
        embedded = np.stack([row[ids] for row, ids in zip(embedded, ids_keep, strict=True)])
    first = np.tanh(np.concatenate([np.full((B, 1, D), CLS_VALUE, np.float32), embedded], axis=1))
    return np.stack([first, first + np.tanh(first @ w["block_weight"])], axis=1)


def reference(
    images: Array,
    ids_keep: Array | None = None,
    num_keep: Array | None = None,
    *,
    outputs: Sequence[str] = tuple(OUTPUTS),
) -> dict[str, Array]:
    """What the graph computes, in NumPy: images as the graph takes them and `ids_keep (B, K)` to the named outputs;
    padding may hold anything.
    """
    w = weights()
    ids = np.broadcast_to(np.arange(N), (len(images), N)) if ids_keep is None else ids_keep
    real = np.arange(ids.shape[1]) < (np.full(len(ids), ids.shape[1]) if num_keep is None else num_keep)[:, None]
    blocks = (
        reference_blocks(images, np.where(real, ids, 0))
        * np.pad(real, ((0, 0), (1, 0)), constant_values=True)[:, None, :, None]
    )
    tokens = blocks[:, -1, 1:]
    pooled = tokens.sum(axis=1) / real.sum(axis=1, keepdims=True)
    placed = np.zeros((len(images), N, D), np.float32)
    for row, values, patches, kept in zip(placed, tokens, ids, real, strict=True):
        row[patches[kept]] = values[kept]
    found = {
        "cls": np.tanh(pooled @ w["cls_weight"]),
        "tokens": tokens,
        "pooled": pooled,
        "logits": pooled @ w["head_weight"],
        "probs": _softmax(pooled @ w["head_weight"]),
        "block_0": blocks[:, 0, 1:],
        "feature_map": placed.transpose(0, 2, 1).reshape(-1, D, *GRID),
        "pixels": (placed + w["pos_embed"]) @ w["pixel_weight"],
    }
    return {name: found[name].astype(np.float32) for name in outputs}


def _softmax(logits: Array) -> Array:
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares: Array = exponents / exponents.sum(axis=1, keepdims=True)
    return shares


def golden_inputs(*, visible: bool, keep: int = K, ragged: bool = False, images: str = "float32") -> dict[str, Any]:
    """Random samples: images, and patches that differ by sample; ragged: mixed lengths, and padding that no graph may
    read.
    """
    rng = np.random.default_rng(1)
    pixels = rng.normal(size=(SAMPLES, C, H, W)).astype(np.float32)
    inputs: dict[str, Any] = {"images": pixels}
    if images == "uint8":
        inputs["images"] = (40 * pixels.transpose(0, 2, 3, 1) + 128).clip(0, 255).astype(np.uint8)
    elif images == "float16":
        inputs["images"] = pixels.astype(np.float16)
    if visible or ragged:
        inputs["ids_keep"] = np.stack([rng.permutation(N)[:keep] for _ in range(SAMPLES)]).astype(np.int64)
    if ragged:
        inputs["num_keep"] = np.linspace(keep, 1, SAMPLES).round().astype(np.int64)
        inputs["ids_keep"][np.arange(keep) >= inputs["num_keep"][:, None]] = -999
    return inputs


def graph(
    *,
    token_mode: str,
    batch: int | None,
    keep: int | None,
    flaw: str | None,
    weights_seed: int,
    bits: int | None,
    outputs: Sequence[str],
    images: str,
    features: str,
) -> onnx.ModelProto:
    """The ONNX graph, right or with one flaw that a verification must find."""
    chosen = token_mode != "full"
    nodes = [
        *_normalised(images),
        helper.make_node("Reshape", ["normalised", "split_shape"], ["split"]),
        helper.make_node("Transpose", ["split"], ["ordered"], perm=[0, 2, 4, 3, 5, 1]),
        helper.make_node("Reshape", ["ordered", "patches_shape"], ["patches"]),
        helper.make_node("MatMul", ["patches", "patch_weight"], ["projected"]),
        helper.make_node("Add", ["projected", "pos_embed"], ["embedded"]),
        *_gather(token_mode, flaw),
        helper.make_node("Pad", ["kept", "front", "cls_value"], ["sequence"]),
        helper.make_node("Tanh", ["sequence"], [BLOCK_TENSORS[0]]),
        helper.make_node("MatMul", [BLOCK_TENSORS[0], "block_weight"], ["mixed"]),
        helper.make_node("Tanh", ["mixed"], ["update"]),
        helper.make_node("Add", [BLOCK_TENSORS[0], "update"], ["second"]),
        helper.make_node(
            *(("Div", ["second", "zero"]) if flaw == "block" else ("Identity", ["second"])), [BLOCK_TENSORS[1]]
        ),
        *(
            helper.make_node("Reshape", [tokens, "rows_shape"], [rows])
            for tokens, rows in zip(BLOCK_TENSORS, BLOCK_ROWS, strict=True)
        ),
        *_patch_tokens(BLOCK_TENSORS[1], "plain_tokens", token_mode),
        *_flawed_tokens(flaw),
        *_pooled(token_mode, flaw),
        helper.make_node("MatMul", ["pooled32", "cls_weight"], ["cls_linear"]),
        helper.make_node("Tanh", ["cls_linear"], ["cls32"]),
        helper.make_node("MatMul", ["pooled32", "head_weight"], ["logits32"]),
        helper.make_node("Softmax", ["logits32"], ["probs32"], axis=-1),
        *(_patch_tokens(BLOCK_TENSORS[0], "block_032", token_mode) if "block_0" in outputs else ()),
        *(_placed(chosen) if {"feature_map", "pixels"} & set(outputs) else ()),
        *(helper.make_node("Cast", [f"{name}32"], [name], to=_TYPES[features]) for name in outputs),
    ]
    constants = {
        **{name: rounded(value, bits) if bits else value for name, value in weights(weights_seed).items()},
        "split_shape": np.array([-1, C, GRID[0], P, GRID[1], P]),
        "patches_shape": np.array([-1, N, P * P * C]),
        "rows_shape": np.array([-1, D]),
        "map_shape": np.array([-1, D, *GRID]),
        "patch_numbers": np.arange(N)[None, :, None],
        "front": np.array([0, 1, 0, 0, 0, 0]),
        "cls_value": np.array(CLS_VALUE, np.float32),
        "zero_id": np.array(0),
        "one": np.array(1),
        "first": np.array([1]),
        "end": np.array([np.iinfo(np.int64).max]),
        "N": np.array(N),
        "no_patch": np.array(-1),
        "last": np.array([-1]),
        "255": np.array(255, np.float32),
        "mean": np.array(MEAN, np.float32),
        "std": np.array(STD, np.float32),
        "tenth": np.array(0.1, np.float32),
        "zero": np.array(0.0, np.float32),
    }
    if flaw == "block_weight":
        constants["block_weight"] = constants["block_weight"] + np.float32(0.001)
    inputs, results = (
        [
            helper.make_tensor_value_info(entry["name"], _TYPES.get(entry["dtype"], TensorProto.INT64), entry["shape"])
            for entry in entries
        ]
        for entries in _entries(token_mode, batch, keep, outputs, images, features)
    )
    body = helper.make_graph(
        nodes, "tiny", inputs, results, [numpy_helper.from_array(array, name) for name, array in constants.items()]
    )
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def write_bundle(
    path: Path,
    *,
    token_mode: str = "visible",
    batch: int | None = None,
    keep: int | None = None,
    profile_keep: Sequence[int] = (1, K, N),
    flaw: str | None = None,
    weights_seed: int = 0,
    bits: int | None = None,
    precision: str = "fp32",
    outputs: Sequence[str] = tuple(OUTPUTS),
    images: str = "float32",
    features: str = "float32",
    golden_of_graph: bool = False,
    external: str | None = None,
    preprocess: dict[str, Any] | None = None,
    frame: Array | None = None,
    change: Callable[[dict[str, Any]], object] | None = None,
) -> Path:
    """Write a bundle and return its path.

    Args:
        profile_keep: smallest, usual and largest K of a graph that leaves it open.
        flaw: one of `off_by_one`, `batch`, `order`, `random`, `nan`; in a block `block` (infinite) or `block_weight`;
            of a ragged graph `padding` (it is read) or `length` (it is counted).
        weights_seed: other than 0, the weights are not those that made the golden outputs.
        bits: round the weights to so many bits.
        precision: what the manifest says, with that precision's tolerance.
        images: type of the input; with uint8 the graph normalises.
        features: type of the outputs.
        golden_of_graph: the golden outputs are the graph's own, so that only invariances can fail.
        external: name of the external-data file; None keeps the weights in the graph.
        frame: an image `(h, w, C)` beside the golden samples, with what the manifest's preprocessing makes of it.
        change: edits the manifest before it is written; the hashes stay those of the files.
    """
    ragged, chosen = token_mode == "ragged", token_mode != "full"
    path.mkdir(parents=True)
    model = graph(
        token_mode=token_mode,
        batch=batch,
        keep=keep,
        flaw=flaw,
        weights_seed=weights_seed,
        bits=bits,
        outputs=outputs,
        images=images,
        features=features,
    )
    beside = external is not None
    onnx.save(model, path / GRAPH_FILE, save_as_external_data=beside, location=external, size_threshold=100)
    inputs = golden_inputs(visible=chosen, keep=keep or (2 * K if ragged else K), ragged=ragged, images=images)
    expected = reference(**inputs, outputs=outputs)
    if golden_of_graph:
        session = onnxruntime.InferenceSession(str(path / GRAPH_FILE), providers=["CPUExecutionProvider"])
        expected = dict(zip(outputs, session.run(list(outputs), inputs), strict=True))
    few = {name: inputs[name][:2] for name in ("images", "ids_keep") if name in inputs}
    tokens = 1 + int(inputs["num_keep"][:2].min()) if ragged else 17
    if ragged:
        few["ids_keep"] = np.maximum(few["ids_keep"], 0)
    arrays: dict[str, Any] = {**inputs, **expected, BLOCKS: reference_blocks(**few)[:, :, :tokens].astype(np.float32)}
    if frame is not None:
        spec = read_preprocess({**_PREPROCESS, **(preprocess or {})})
        arrays |= {FRAME: frame, FRAME_IMAGE: spec([frame])[0]}
    np.savez(path / GOLDEN_FILE, **arrays)
    manifest = _manifest(
        path,
        token_mode,
        batch,
        keep,
        profile_keep,
        precision,
        _entries(token_mode, batch, keep, outputs, images, features),
        preprocess,
    )
    if change is not None:
        change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def rehash(path: Path) -> None:
    """Make the manifest's hashes those of the files as they are now."""
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"] = {name: file_entry(path / name) for name in manifest["files"]}
    (path / "manifest.json").write_text(json.dumps(manifest))


def _entries(
    token_mode: str, batch: int | None, keep: int | None, outputs: Sequence[str], images: str, features: str
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Inputs and outputs as the manifest has them."""
    sizes: dict[str, Any] = {"B": batch or "B", "K": N if token_mode == "full" else keep or "K"}
    inputs = [
        {"name": "images", "dtype": images, "shape": [sizes["B"], *((H, W, C) if images == "uint8" else (C, H, W))]}
    ]
    if token_mode != "full":
        inputs.append({"name": "ids_keep", "dtype": "int64", "shape": [sizes["B"], sizes["K"]]})
    if token_mode == "ragged":
        inputs.append({"name": "num_keep", "dtype": "int64", "shape": [sizes["B"]]})
    return inputs, [
        {"name": name, "dtype": features, "shape": [sizes.get(str(side), side) for side in _ALL_OUTPUTS[name]]}
        for name in outputs
    ]


def _manifest(
    path: Path,
    token_mode: str,
    batch: int | None,
    keep: int | None,
    profile_keep: Sequence[int],
    precision: str,
    entries: tuple[list[dict[str, Any]], list[dict[str, Any]]],
    preprocess: dict[str, Any] | None,
) -> dict[str, Any]:
    profile = {"B": [batch] * 3 if batch else [1, 8, 32], "K": [keep] * 3 if keep else list(profile_keep)}
    return {
        "schema_version": 2,
        "mae_deploy_version": "0.1.0",
        "created": "2026-01-02T03:04:05+00:00",
        "kind": "classifier",
        "model": {
            "name": "tiny",
            "image_size": [H, W],
            "patch_size": P,
            "in_chans": C,
            "embed_dim": D,
            "depth": DEPTH,
            "num_heads": 1,
            "mlp_ratio": 4.0,
        },
        "class_names": CLASS_NAMES,
        "token_mode": token_mode,
        "num_patches": N,
        "batch": batch,
        "keep": keep,
        "profile": {"B": profile["B"]} if token_mode == "full" else profile,
        "precision": precision,
        "decoder": None,
        "typing": "weak",
        "engine": "onnxruntime",
        "quantization": {"policy": "dynamic", "layers": []} if precision == "int8" else None,
        "graph": {
            "file": GRAPH_FILE,
            "opset": 17,
            "inputs": entries[0],
            "outputs": entries[1],
            "blocks": BLOCK_TENSORS,
        },
        "preprocess": {**_PREPROCESS, **(preprocess or {})},
        "provenance": {"checkpoint": "none"},
        "licence": "Apache-2.0",
        "tolerance": TOLERANCES[precision].to_dict(),
        "parity": {},
        "golden": {"file": GOLDEN_FILE, "source": "random", "num_samples": SAMPLES},
        "engines": [],
        "files": {file.name: file_entry(file) for file in sorted(path.iterdir())},
    }


def _normalised(images: str) -> list[onnx.NodeProto]:
    """`images` to `normalised`, FP32 `(B, C, H, W)`."""
    if images != "uint8":
        return [helper.make_node("Cast", ["images"], ["normalised"], to=TensorProto.FLOAT)]
    return [
        helper.make_node("Cast", ["images"], ["pixels_0_255"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["pixels_0_255", "255"], ["pixels_0_1"]),
        helper.make_node("Sub", ["pixels_0_1", "mean"], ["centred"]),
        helper.make_node("Div", ["centred", "std"], ["channels_last"]),
        helper.make_node("Transpose", ["channels_last"], ["normalised"], perm=[0, 3, 1, 2]),
    ]


def _gather(token_mode: str, flaw: str | None) -> list[onnx.NodeProto]:
    if token_mode == "full":
        return [helper.make_node("Identity", ["embedded"], ["kept"])]
    shift = [helper.make_node("Add", ["safe_ids", "one"], ["next"]), helper.make_node("Mod", ["next", "N"], ["ids"])]
    same = [helper.make_node("Identity", ["safe_ids"], ["ids"])]
    return [
        *(_real(flaw) if token_mode == "ragged" else [helper.make_node("Identity", ["ids_keep"], ["safe_ids"])]),
        *(shift if flaw == "off_by_one" else same),
        helper.make_node("Unsqueeze", ["ids", "last"], ["indices"]),
        helper.make_node("GatherND", ["embedded", "indices"], ["kept"], batch_dims=1),
    ]


def _real(flaw: str | None) -> list[onnx.NodeProto]:
    """From `ids_keep` and `num_keep`: `real` (B, K, 1) and `safe_ids`."""
    return [
        helper.make_node("Equal", ["ids_keep", "ids_keep"], ["ones"]),
        helper.make_node("Cast", ["ones"], ["whole_ones"], to=TensorProto.INT64),
        helper.make_node("CumSum", ["whole_ones", "one"], ["ordinals"]),
        helper.make_node("Unsqueeze", ["num_keep", "last"], ["lengths"]),
        helper.make_node("LessOrEqual", ["ordinals", "lengths"], ["is_real"]),
        helper.make_node("Mod", ["ids_keep", "N"], ["in_range"]),
        helper.make_node("Where", ["ones" if flaw == "padding" else "is_real", "in_range", "zero_id"], ["safe_ids"]),
        helper.make_node("Cast", ["ones" if flaw == "padding" else "is_real"], ["real_2d"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["real_2d", "last"], ["real"]),
    ]


def _patch_tokens(tokens: str, name: str, token_mode: str) -> list[onnx.NodeProto]:
    """`tokens` without CLS and, of a ragged graph, with zeros in the padding."""
    if token_mode != "ragged":
        return [helper.make_node("Slice", [tokens, "first", "end", "first"], [name])]
    return [
        helper.make_node("Slice", [tokens, "first", "end", "first"], [f"{name}_all"]),
        helper.make_node("Mul", [f"{name}_all", "real"], [name]),
    ]


def _pooled(token_mode: str, flaw: str | None) -> list[onnx.NodeProto]:
    if token_mode != "ragged" or flaw == "length":
        return [helper.make_node("ReduceMean", ["tokens32"], ["pooled32"], axes=[1], keepdims=0)]
    return [
        helper.make_node("ReduceSum", ["tokens32", "first"], ["total"], keepdims=0),
        helper.make_node("ReduceSum", ["real", "first"], ["count"], keepdims=0),
        helper.make_node("Div", ["total", "count"], ["pooled32"]),
    ]


def _placed(chosen: bool) -> list[onnx.NodeProto]:
    """`feature_map32` and `pixels32`: the tokens at their places in the image."""
    place = [
        helper.make_node("Unsqueeze", ["ids", "first"], ["columns"]),
        helper.make_node("Equal", ["patch_numbers", "columns"], ["same_patch"]),
        helper.make_node("Cast", ["same_patch"], ["one_hot"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["one_hot", "tokens32"], ["placed"]),
    ]
    return [
        *(place if chosen else [helper.make_node("Identity", ["tokens32"], ["placed"])]),
        helper.make_node("Transpose", ["placed"], ["columns_last"], perm=[0, 2, 1]),
        helper.make_node("Reshape", ["columns_last", "map_shape"], ["feature_map32"]),
        helper.make_node("Add", ["placed", "pos_embed"], ["decoded"]),
        helper.make_node("MatMul", ["decoded", "pixel_weight"], ["pixels32"]),
    ]


def _flawed_tokens(flaw: str | None) -> list[onnx.NodeProto]:
    """`plain_tokens` to `tokens32`."""
    nodes: dict[str | None, list[onnx.NodeProto]] = {
        "batch": [helper.make_node("ReduceMean", ["plain_tokens"], ["noise"], axes=[0], keepdims=1)],
        "order": [helper.make_node("CumSum", ["plain_tokens", "one"], ["noise"])],
        "random": [helper.make_node("RandomNormalLike", ["plain_tokens"], ["noise"])],
        "nan": [helper.make_node("Div", ["zero", "zero"], ["noise"])],
    }
    if flaw not in nodes:
        return [helper.make_node("Identity", ["plain_tokens"], ["tokens32"])]
    return [
        *nodes[flaw],
        helper.make_node("Mul", ["noise", "tenth"], ["scaled"]),
        helper.make_node("Add", ["plain_tokens", "scaled"], ["tokens32"]),
    ]
