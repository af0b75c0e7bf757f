"""What a quarter of the patches and eight bits bring on real sizes: ViT-S and ViT-B at 224 pixels with random weights,
on every engine that is installed.

The graphs are those that `export` writes; as random weights have no accuracy to keep, every Linear is in INT8, and the
ranges of static INT8 are not calibrated, which changes no time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib import util
from typing import Any

import numpy as np
import torch

from mae_deploy.checkpoint import Metadata
from mae_deploy.config import to_dict
from mae_deploy.errors import MaeDeployError
from mae_deploy.export.graph.encoder import build_graph
from mae_deploy.export.graph.spec import GraphSpec
from mae_deploy.files import temporary_folder
from mae_deploy.images.preprocess import default_preprocess
from mae_deploy.machine import cpu_features
from mae_deploy.models.config import EncoderConfig
from mae_deploy.models.mask_config import keep_count
from mae_deploy.models.quantization.rounding import eligible_linears
from mae_deploy.models.vit import Encoder
from mae_deploy.progress import notice, progress
from mae_deploy.runtime.bundle import int8_arithmetic
from mae_deploy.runtime.engines.base import EngineOptions
from mae_deploy.runtime.manifest import IDS_KEEP, IMAGES
from mae_deploy.runtime.registry import DEFAULT, ENGINES, OPENVINO, open_graph
from mae_deploy.runtime.timing import measure
from mae_deploy.seeding import random_patches

MODELS = (EncoderConfig(name="vit_small_patch16"), EncoderConfig(name="vit_base_patch16"))
KEEP_RATIO = 0.25

_REPEATS, _WARMUP = 9, 2
_SCALE = 0.03
"""Of the inputs of static INT8: any."""


@dataclass(frozen=True, slots=True)
class _Variant:
    precision: str
    keep: int | None
    """Patches; None: all, in a graph of whole images."""


def random_encoder(config: EncoderConfig) -> tuple[Metadata, dict[str, Any]]:
    """An encoder that was never trained: what its checkpoint says, and its state dict."""
    torch.manual_seed(0)
    preprocess = to_dict(default_preprocess(config.image_size))
    metadata = Metadata(kind="encoder", encoder=to_dict(config), preprocess=preprocess, licence="own")
    return metadata, Encoder(config).state_dict()


def measure_speed(models: Sequence[EncoderConfig] = MODELS) -> list[dict[str, Any]]:
    """A row for each model, engine, precision and number of patches: median latency at batch 1 on one thread, and its
    ratio to that of all patches in FP32; the rows of a model on an engine take turns.
    """
    engines = installed_engines()
    rows: list[dict[str, Any]] = []
    with progress("speed", len(models) * len(engines) * 4 * (1 + _REPEATS + _WARMUP)) as bar:
        for model, engine in itertools.product(models, engines):
            with ExitStack() as stack:
                calls: dict[_Variant, Callable[[], object]] = {}
                try:
                    for variant, call in _calls(model, engine, stack):
                        calls[variant] = call
                        bar.advance(1, f"{model.name} on {engine}")
                except MaeDeployError as error:  # installed, and does not work here
                    if engine == DEFAULT:
                        raise
                    notice("left out:", f"{model.name} on {engine}: {error}")
                    bar.advance(4 * (1 + _REPEATS + _WARMUP) - len(calls))
                    continue
                timings = measure(calls, repeats=_REPEATS, warmup=_WARMUP, after_call=bar.advance)
            first = next(iter(timings.values()))
            rows += [
                {
                    "model": model.name,
                    "engine": engine,
                    "precision": variant.precision,
                    "patches": variant.keep or model.num_patches,
                    "p50_ms": timing.median * 1000,
                    "ratio": timing.ratio(first),
                }
                for variant, timing in timings.items()
            ]
    return rows


def installed_engines() -> list[str]:
    """The engines that read graphs and are installed."""
    return [name for name in ENGINES if util.find_spec(name) is not None]


def has_vnni() -> bool:
    """Whether the CPU multiplies 8-bit integers fast, as far as one can tell."""
    features = cpu_features() or []
    return "avx2" not in features or any("vnni" in feature for feature in features)


def _calls(config: EncoderConfig, engine: str, stack: ExitStack) -> Iterator[tuple[_Variant, Callable[[], object]]]:
    metadata, tensors = random_encoder(config)
    N = config.num_patches
    images = np.random.default_rng(0).standard_normal((1, config.in_chans, *config.image_size), np.float32)
    with torch.device("meta"):
        linears = eligible_linears(Encoder(config))
    static = engine == OPENVINO
    # The fast products of 8 bits overflow without VNNI, and are not used; those of 7 do not.
    bits = 8 if has_vnni() else 7
    int8: dict[str, Any] = {
        "precision": "int8",
        "quantized": dict.fromkeys(linears, _SCALE if static else None),
        "weight_bits": bits,
    }
    arithmetic = {"fp32": "fp32", "int8": int8_arithmetic({"weight_bits": bits, "rest": "bf16" if static else "fp32"})}
    for precision in ("fp32", "int8"):
        for keep in (None, keep_count(N, KEEP_RATIO)):
            mode: Any = {"token_mode": "full"} if keep is None else {"token_mode": "visible", "keep": keep}
            spec = GraphSpec(**mode, **(int8 if precision == "int8" else {}))
            with temporary_folder() as folder:
                graph = build_graph(metadata, tensors, spec).save(folder / "graph.onnx")[0]
                options = EngineOptions(threads=1)
                opened = stack.enter_context(open_graph(graph, engine, options, precision=arithmetic[precision]))
            inputs: dict[str, Any] = {IMAGES: images}
            if keep is not None:
                inputs[IDS_KEEP] = random_patches(N, keep, range(1), 0)
            yield _Variant(precision, keep), partial(opened.run, inputs)
