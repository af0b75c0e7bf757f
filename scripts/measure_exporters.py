"""Our graph of a network against those of other exporters, on ONNX Runtime and OpenVINO, one thread, batch 1: CPU time,
in turns, ratios of medians to ours. The other graphs are torch.onnx.export's by TorchScript and by torch.export, which
onnxscript's optimiser has gone over, and on ONNX Runtime what its own transformer optimiser makes of both.

    python -m scripts.measure_exporters [--models vit_small_patch16_dinov3 …] [--depth 4] [--rounds 31]

Needs onnxscript beside `[dev]`, for torch.export. Networks are timm's with random weights; every graph's tokens must be
within 1e-4 of timm's largest (FastGelu's: 1e-2), and how far each is is printed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import timm
import torch
from onnxruntime.transformers import optimizer
from safetensors.torch import save_file
from torch import Tensor, nn

from mae_deploy.export.graph.encoder import build_graph
from mae_deploy.export.graph.spec import GraphSpec
from mae_deploy.reporting.tables import Column, Table
from mae_deploy.runtime.engines.base import EngineOptions
from mae_deploy.runtime.parity.bounds import ratio_interval
from mae_deploy.runtime.registry import open_graph
from mae_deploy.runtime.timing import measure
from mae_deploy.weights.read.convert import ImportOptions, import_weights

MODELS = (
    *("vit_small_patch16_dinov3", "vit_small_plus_patch16_dinov3", "vit_pe_core_tiny_patch16_384"),
    *("vit_small_patch14_reg4_dinov2", "vit_base_patch16_siglip_224"),
)
OURS = "ours"


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """A row for each model, engine and graph."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--engines", nargs="+", default=["onnxruntime", "openvino"])
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=31)
    given = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    for name in given.models:
        torch.manual_seed(0)
        model = timm.create_model(
            name, pretrained=False, num_classes=0, depth=given.depth, img_size=(given.image_size, given.image_size)
        ).eval()
        images = torch.randn(1, 3, given.image_size, given.image_size)
        with TemporaryDirectory() as folder, torch.no_grad():
            graphs = write_graphs(model, name, images, Path(folder))
            expected = _Tokens(model)(images).numpy()
            for engine in given.engines:
                ours = {OURS: _ours(model, name, Path(folder) / engine, engine)}
                rows += times(name, engine, ours | graphs, images.numpy(), expected, given.rounds)
    print(page(rows))
    return rows


def write_graphs(model: Any, name: str, images: Tensor, folder: Path) -> dict[str, Path]:
    """The same network by every exporter, the tokens behind its last norm as the only output."""
    wrapped, heads, width = _Tokens(model), model.blocks[0].attn.num_heads, model.embed_dim
    graphs: dict[str, Path] = {}
    for kind, dynamo in (("TorchScript", False), ("torch.export", True)):
        graphs[kind] = folder / f"{kind}.onnx"
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            settings: dict[str, Any] = {"dynamo": dynamo, "input_names": ["images"], "output_names": ["tokens"]}
            torch.onnx.export(wrapped, (images,), graphs[kind], **settings)
        logging.disable(logging.WARNING)
        fused = optimizer.optimize_model(
            str(graphs[kind]), model_type="vit", num_heads=heads, hidden_size=width, opt_level=0
        )
        logging.disable(logging.NOTSET)
        graphs[f"{kind}, fused"] = folder / f"{kind}-fused.onnx"
        fused.save_model_to_file(str(graphs[f"{kind}, fused"]))
    return graphs


def times(
    name: str, engine: str, graphs: dict[str, Path], images: Any, expected: Any, rounds: int
) -> list[dict[str, Any]]:
    """CPU times of the graphs that this engine reads, in turns."""
    calls: dict[str, Callable[[], Any]] = {}
    far: dict[str, float] = {}
    for kind, path in graphs.items():
        if engine != "onnxruntime" and kind.endswith("fused"):  # of operators that only ONNX Runtime has
            continue
        opened = open_graph(path, engine, EngineOptions(threads=1))
        calls[kind] = partial(opened.run, {opened.input_names[0]: images})
        (found,) = calls[kind]().values()
        far[kind] = float(np.abs(found - expected).max() / np.abs(expected).max())
        if far[kind] > (1e-2 if kind.endswith("fused") else 1e-4):
            raise SystemExit(f"{kind} of {name} on {engine} computes something else: {far[kind]}")
    timings = measure(calls, repeats=rounds, warmup=3, clock=time.process_time)
    rows = [
        {
            "model": name,
            "engine": engine,
            "graph": kind,
            "ms": timing.median * 1000,
            "ratio": timing.ratio(timings[OURS]),
            "interval": ratio_interval(timing, timings[OURS]),
            "far": far[kind],
        }
        for kind, timing in timings.items()
    ]
    for row in rows:
        print(json.dumps(row), flush=True)
    return rows


def page(rows: Sequence[dict[str, Any]]) -> str:
    """A row for each model and engine: milliseconds of ours, and how many times as long the others take."""
    kinds = list(dict.fromkeys(row["graph"] for row in rows if row["graph"] != OURS))
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        line = found.setdefault((row["model"], row["engine"]), {"model": row["model"], "engine": row["engine"]})
        line[row["graph"]] = row["ms"] if row["graph"] == OURS else row["ratio"]
    columns = [Column("network", "model"), Column("engine", "engine"), Column("ours, ms", OURS, "{:.1f}")]
    return Table("", [*columns, *(Column(kind, kind, "{:.2f}") for kind in kinds)], list(found.values())).to_markdown()


def _ours(model: Any, name: str, source: Path, engine: str) -> Path:
    """What `export --engine` writes, through a folder as timm's hub has them."""
    source.mkdir()
    save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, source / "model.safetensors")
    settings = {"depth": len(model.blocks), "img_size": list(model.patch_embed.img_size)}
    config = {"architecture": name, "model_args": settings, "pretrained_cfg": {"architecture": name}}
    (source / "config.json").write_text(json.dumps(config))
    imported = import_weights(source / "model.safetensors", ImportOptions())
    spec = GraphSpec(token_mode="full", outputs=("tokens",), fuses_tanh=engine == "onnxruntime")
    return build_graph(imported.metadata, imported.tensors, spec).save(source / "ours.onnx")[0]


class _Tokens(nn.Module):
    """A timm network's patch tokens."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        tokens: Tensor = self.model.forward_features(images)
        return tokens[:, self.model.num_prefix_tokens :]


if __name__ == "__main__":
    main()
