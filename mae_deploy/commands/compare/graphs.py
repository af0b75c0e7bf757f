"""The graphs whose latency `compare --at-latency` measures: of a checkpoint those that `export` would write, in FP32,
with the one output that the probes read; of a bundle its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

from mae_deploy.commands.benchmark.rows import BenchmarkRow, LoadedGraph, bundle_subject
from mae_deploy.commands.compare.points import OperatingPoint, fewer_tokens, smaller_images
from mae_deploy.errors import ConfigError
from mae_deploy.export.graph.encoder import build_graph
from mae_deploy.export.graph.spec import GraphSpec, TokenMode
from mae_deploy.files import temporary_folder
from mae_deploy.runtime.engines.base import Engine, EngineOptions
from mae_deploy.runtime.manifest import IDS_KEEP, IMAGES
from mae_deploy.runtime.registry import ALIASES, OPENVINO, load_engine, open_graph
from mae_deploy.seeding import random_patches
from mae_deploy.weights.load import LoadedWeights, at_image_size

_SEED = 0
"""Of the random images and patches that are timed."""

_CLOSED: tuple[object, ...] = ()


class Graphs(Protocol):
    """The graphs of one encoder, of which one at a time is loaded."""

    ladders: dict[str, list[OperatingPoint]]
    """By what makes it faster, `tokens` or `size`: points from the fastest on, the last the encoder as it is."""

    def call(self, point: OperatingPoint) -> Callable[[], object]:
        """Load the point's graph; what runs it on one image."""
        ...

    @property
    def engine(self) -> tuple[str, str]:
        """Name and version of what runs it, once a graph was loaded."""
        ...

    @property
    def precision(self) -> str | None:
        """What is computed in."""
        ...

    def close(self) -> None:
        """Free the graph that is loaded."""
        ...


class CheckpointGraphs:
    """The graphs of weights."""

    def __init__(self, loaded: LoadedWeights, output: str, engine: str, options: EngineOptions) -> None:
        self._loaded, self._output, self._name, self._options = loaded, output, engine, options
        self.engine, self.precision = ("", ""), "fp32"
        self._engine: Engine | None = None
        self._is: tuple[object, ...] = _CLOSED
        config = loaded.encoder_config
        sizes = smaller_images(config)
        self.ladders = {"tokens": fewer_tokens(sizes[-1]), "size": sizes}

    def call(self, point: OperatingPoint) -> Callable[[], object]:
        """See `Graphs`; one graph serves all numbers of patches of a size but the whole."""
        if self._is != (point.image_size, point.whole):
            self.close()
            loaded = at_image_size(self._loaded, point.image_size, said=False)
            mode: TokenMode = "full" if point.whole else "visible"
            fuses_tanh = ALIASES.get(self._name, self._name) != OPENVINO
            spec = GraphSpec(token_mode=mode, batch=1, outputs=(self._output,), fuses_tanh=fuses_tanh)
            with temporary_folder() as folder:
                path = build_graph(loaded.metadata, loaded.tensors, spec).save(folder / "graph.onnx")[0]
                self._engine = open_graph(path, self._name, self._options)
            self.engine = (self._engine.name, self._engine.version)
            self._is = (point.image_size, point.whole)
        assert self._engine is not None
        chans = self._loaded.encoder_config.in_chans
        images = np.random.default_rng(_SEED).standard_normal((1, chans, *point.image_size), np.float32)
        ids = {} if point.whole else {IDS_KEEP: random_patches(point.num_patches, point.keep, range(1), _SEED)}
        return partial(self._engine.run, {IMAGES: images, **ids})

    def close(self) -> None:
        """See `Graphs`."""
        if self._engine is not None:
            self._engine.close()
        self._engine, self._is = None, _CLOSED


class BundleGraphs:
    """A bundle's graph, on as many patches as it takes.

    Raises:
        ConfigError: a stream's graph, or one that takes more than one image a call.
    """

    def __init__(self, path: Path, engine: str, options: EngineOptions) -> None:
        self._subject = bundle_subject(path)
        bundle = self._subject.bundle
        assert bundle is not None
        if bundle.token_mode not in ("full", "visible", "ragged"):
            raise ConfigError(
                f"{path} is a bundle of --tokens {bundle.token_mode}, which has no features of single images",
                hint="export with --tokens visible",
            )
        if bundle.fixed_batch not in (None, 1):
            raise ConfigError(
                f"{path} takes {bundle.fixed_batch} images a call, and a latency is of one",
                hint="export with --batch 1",
            )
        self._loaded = LoadedGraph(self._subject, load_engine(bundle, engine, options))
        self.engine, self.precision = (self._loaded.engine.name, self._loaded.engine.version), self._loaded.precision
        least, most = bundle.keep_range if self._subject.keep is not None else (bundle.num_patches,) * 2
        whole = OperatingPoint(bundle.preprocess.image_size, bundle.num_patches, most)
        self.ladders = {"tokens": fewer_tokens(whole, least)}

    def call(self, point: OperatingPoint) -> Callable[[], object]:
        """See `Graphs`."""
        return BenchmarkRow(self._loaded, 1, point.keep if self._subject.keep is not None else None).call(_SEED)

    def close(self) -> None:
        """Free the engine."""
        self._loaded.engine.close()
