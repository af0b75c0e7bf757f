"""A bundle with a graph of a few nodes that has an encoder's inputs and outputs, and the same arithmetic in NumPy as its reference."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from mae_deploy.preprocess import Array
from mae_deploy.runtime.manifest import GOLDEN_FILE, GRAPH_FILE, file_entry

# Unequal, so that a transposed or mixed-up axis does not fit.
C, P, GRID = 3, 2, (3, 7)
H, W, N = GRID[0] * P, GRID[1] * P, GRID[0] * GRID[1]
D, CLASSES = 13, 11
SAMPLES, K = 5, 4

CLASS_NAMES = [f"class-{index}" for index in range(CLASSES)]
OUTPUTS = {"cls": ["B", D], "tokens": ["B", "K", D], "pooled": ["B", D], "logits": ["B", CLASSES]}


def weights(seed: int = 0) -> dict[str, Array]:
    """The graph's weights; those of `seed` 0 are the reference's."""
    rng = np.random.default_rng(seed)
    shapes = {"patch_weight": (P * P * C, D), "pos_embed": (N, D), "cls_weight": (D, D), "head_weight": (D, CLASSES)}
    return {name: rng.normal(size=shape, scale=0.5).astype(np.float32) for name, shape in shapes.items()}


def reference(images: Array, ids_keep: Array | None = None) -> dict[str, Array]:
    """What the graph computes, in NumPy: images `(B, C, H, W)` and `ids_keep (B, K)` to all outputs."""
    w = weights()
    B = len(images)
    patches = images.reshape(B, C, GRID[0], P, GRID[1], P).transpose(0, 2, 4, 3, 5, 1).reshape(B, N, -1)
    embedded = patches @ w["patch_weight"] + w["pos_embed"]
    if ids_keep is not None:
        embedded = np.stack([row[ids] for row, ids in zip(embedded, ids_keep, strict=True)])
    tokens = np.tanh(embedded)
    pooled = tokens.mean(axis=1)
    return {"cls": np.tanh(pooled @ w["cls_weight"]), "tokens": tokens, "pooled": pooled, "logits": pooled @ w["head_weight"]}


def golden_inputs(*, visible: bool, keep: int = K) -> dict[str, Array]:
    """Random samples: images, and patches that differ by sample."""
    rng = np.random.default_rng(1)
    inputs: dict[str, Array] = {"images": rng.normal(size=(SAMPLES, C, H, W)).astype(np.float32)}
    if visible:
        inputs["ids_keep"] = np.stack([rng.permutation(N)[:keep] for _ in range(SAMPLES)]).astype(np.int64)
    return inputs


def graph(*, visible: bool, batch: int | None, keep: int | None, flaw: str | None, weights_seed: int) -> onnx.ModelProto:
    """The ONNX graph, right or with one flaw that a verification must find."""
    nodes = [
        helper.make_node("Reshape", ["images", "split_shape"], ["split"]),
        helper.make_node("Transpose", ["split"], ["ordered"], perm=[0, 2, 4, 3, 5, 1]),
        helper.make_node("Reshape", ["ordered", "patches_shape"], ["patches"]),
        helper.make_node("MatMul", ["patches", "patch_weight"], ["projected"]),
        helper.make_node("Add", ["projected", "pos_embed"], ["embedded"]),
        *_gather(visible, flaw),
        helper.make_node("Tanh", ["kept"], ["plain_tokens"]),
        *_flawed_tokens(flaw),
        helper.make_node("ReduceMean", ["tokens"], ["pooled"], axes=[1], keepdims=0),
        helper.make_node("MatMul", ["pooled", "cls_weight"], ["cls_linear"]),
        helper.make_node("Tanh", ["cls_linear"], ["cls"]),
        helper.make_node("MatMul", ["pooled", "head_weight"], ["logits"]),
    ]
    constants = {
        **weights(weights_seed),
        "split_shape": np.array([-1, C, GRID[0], P, GRID[1], P]),
        "patches_shape": np.array([-1, N, P * P * C]),
        "one": np.array(1),
        "N": np.array(N),
        "last": np.array([-1]),
        "tenth": np.array(0.1, np.float32),
        "zero": np.array(0.0, np.float32),
    }
    sizes: dict[str, Any] = {"B": batch or "B", "K": (keep or "K") if visible else N}
    inputs = [helper.make_tensor_value_info("images", TensorProto.FLOAT, [sizes["B"], C, H, W])]
    if visible:
        inputs.append(helper.make_tensor_value_info("ids_keep", TensorProto.INT64, [sizes["B"], sizes["K"]]))
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [sizes.get(str(side), side) for side in shape]) for name, shape in OUTPUTS.items()]
    body = helper.make_graph(nodes, "tiny", inputs, outputs, [numpy_helper.from_array(array, name) for name, array in constants.items()])
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def write_bundle(
    path: Path,
    *,
    token_mode: str = "visible",
    batch: int | None = None,
    keep: int | None = None,
    flaw: str | None = None,
    weights_seed: int = 0,
    golden_of_graph: bool = False,
    external: str | None = None,
    preprocess: dict[str, Any] | None = None,
    change: Callable[[dict[str, Any]], object] | None = None,
) -> Path:
    """Write a bundle and return its path.

    Args:
        flaw: one of `off_by_one`, `batch`, `order`, `random`, `nan`.
        weights_seed: other than 0, the weights are not those that made the golden outputs.
        golden_of_graph: the golden outputs are the graph's own, so that only invariances can fail.
        external: name of the external-data file; None keeps the weights in the graph.
        change: edits the manifest before it is written; the hashes stay those of the files.
    """
    visible = token_mode == "visible"
    path.mkdir(parents=True)
    model = graph(visible=visible, batch=batch, keep=keep, flaw=flaw, weights_seed=weights_seed)
    onnx.save(model, path / GRAPH_FILE, save_as_external_data=external is not None, location=external, size_threshold=0)
    inputs = golden_inputs(visible=visible, keep=keep or K)
    outputs = reference(**inputs)
    if golden_of_graph:
        session = onnxruntime.InferenceSession(str(path / GRAPH_FILE), providers=["CPUExecutionProvider"])
        outputs = dict(zip(OUTPUTS, session.run(list(OUTPUTS), inputs), strict=True))
    arrays: dict[str, Any] = {**inputs, **outputs}
    np.savez(path / GOLDEN_FILE, **arrays)
    manifest = _manifest(path, token_mode, batch, keep, preprocess)
    if change is not None:
        change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def rehash(path: Path) -> None:
    """Make the manifest's hashes those of the files as they are now."""
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"] = {name: file_entry(path / name) for name in manifest["files"]}
    (path / "manifest.json").write_text(json.dumps(manifest))


def _manifest(path: Path, token_mode: str, batch: int | None, keep: int | None, preprocess: dict[str, Any] | None) -> dict[str, Any]:
    visible = token_mode == "visible"
    sizes: dict[str, Any] = {"B": batch or "B", "K": (keep or "K") if visible else N}
    inputs = [{"name": "images", "dtype": "float32", "shape": [sizes["B"], C, H, W]}]
    if visible:
        inputs.append({"name": "ids_keep", "dtype": "int64", "shape": [sizes["B"], sizes["K"]]})
    outputs = [{"name": name, "dtype": "float32", "shape": [sizes.get(str(side), side) for side in shape]} for name, shape in OUTPUTS.items()]
    return {
        "schema_version": 1,
        "mae_deploy_version": "0.1.0",
        "created": "2026-01-02T03:04:05+00:00",
        "kind": "classifier",
        "model": {
            "name": "tiny",
            "image_size": [H, W],
            "patch_size": P,
            "in_chans": C,
            "embed_dim": D,
            "depth": 1,
            "num_heads": 1,
            "mlp_ratio": 4.0,
        },
        "class_names": CLASS_NAMES,
        "token_mode": token_mode,
        "num_patches": N,
        "batch": batch,
        "keep": keep,
        "precision": "fp32",
        "graph": {"file": GRAPH_FILE, "opset": 17, "inputs": inputs, "outputs": outputs},
        "preprocess": {
            "image_size": [H, W],
            "channels": C,
            "crop_pct": 1.0,
            "interpolation": "bilinear",
            "mean": [0.4, 0.5, 0.6],
            "std": [0.2, 0.3, 0.4],
            **(preprocess or {}),
        },
        "provenance": {"checkpoint": "none"},
        "licence": "Apache-2.0",
        "tolerance": {"cosine": 0.99999, "max_abs": 1e-4},
        "parity": {},
        "golden": {"file": GOLDEN_FILE, "source": "random", "num_samples": SAMPLES},
        "engines": [],
        "files": {file.name: file_entry(file) for file in sorted(path.iterdir())},
    }


def _gather(visible: bool, flaw: str | None) -> list[onnx.NodeProto]:
    if not visible:
        return [helper.make_node("Identity", ["embedded"], ["kept"])]
    shift = [helper.make_node("Add", ["ids_keep", "one"], ["next"]), helper.make_node("Mod", ["next", "N"], ["ids"])]
    same = [helper.make_node("Identity", ["ids_keep"], ["ids"])]
    return [
        *(shift if flaw == "off_by_one" else same),
        helper.make_node("Unsqueeze", ["ids", "last"], ["indices"]),
        helper.make_node("GatherND", ["embedded", "indices"], ["kept"], batch_dims=1),
    ]


def _flawed_tokens(flaw: str | None) -> list[onnx.NodeProto]:
    """`plain_tokens` to `tokens`."""
    nodes: dict[str | None, list[onnx.NodeProto]] = {
        "batch": [helper.make_node("ReduceMean", ["plain_tokens"], ["noise"], axes=[0], keepdims=1)],
        "order": [helper.make_node("CumSum", ["plain_tokens", "one"], ["noise"])],
        "random": [helper.make_node("RandomNormalLike", ["plain_tokens"], ["noise"])],
        "nan": [helper.make_node("Div", ["zero", "zero"], ["noise"])],
    }
    if flaw not in nodes:
        return [helper.make_node("Identity", ["plain_tokens"], ["tokens"])]
    return [*nodes[flaw], helper.make_node("Mul", ["noise", "tenth"], ["scaled"]), helper.make_node("Add", ["plain_tokens", "scaled"], ["tokens"])]
