"""What `mae-deploy benchmark` times: graphs, at which batch sizes and numbers of patches, and what they are fed
with.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mae_deploy.errors import ConfigError
from mae_deploy.images.read import Array
from mae_deploy.models.mask_config import keep_count
from mae_deploy.runtime.bundle import Bundle, external_data
from mae_deploy.runtime.cache import CacheShape, TokenCache, update_cache, update_inputs
from mae_deploy.runtime.engines.base import Engine
from mae_deploy.runtime.graph.check import GraphCheck, check_graph
from mae_deploy.runtime.manifest import IDS_KEEP, IMAGES, NUM_KEEP, PATCHES, PLANNED, TensorEntry
from mae_deploy.runtime.onnx_file import read_inputs
from mae_deploy.seeding import random_patches

MOST_IMAGES = 1024
"""That a file with a fixed batch may take at once."""

Limits = tuple[int, int]


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class Subject:
    """A graph to time: a bundle's, or a file of other origin."""

    name: str
    """As the command line names it."""
    graph: Path
    bundle: Bundle | None
    """None of a file of other origin."""
    inputs: dict[str, str]
    """The graph's own name for each of `images`, `ids_keep` and `num_keep` that it takes."""
    image_shape: tuple[int, ...]
    """Of one image; of a stream's graph, of one patch."""
    image_dtype: str
    num_patches: int
    """Patches of an image, N."""
    batch: Limits | None
    """The least and the most images a call; None: any number."""
    keep: Limits | None
    """The least and the most visible patches, K; None: the graph takes whole images."""
    size_bytes: int
    """Of the graph and its weights on the disk."""
    check: GraphCheck | None = None
    """Of the graph of a file of other origin."""

    @property
    def precision(self) -> str | None:
        """What a bundle's graph computes in; None where nobody says."""
        return self.bundle.precision if self.bundle is not None else None

    @property
    def arithmetic(self) -> str:
        """See `Bundle.arithmetic`; a graph of other origin is run as it is."""
        return self.bundle.arithmetic if self.bundle is not None else "fp32"

    @property
    def token_mode(self) -> str | None:
        """A bundle's token mode."""
        return self.bundle.token_mode if self.bundle is not None else None

    @property
    def takes_all(self) -> bool:
        """Whether the graph can be given every patch."""
        return self.keep is None or self.keep[1] == self.num_patches

    def same_network(self, other: Subject) -> bool:
        """Whether both compute as much for as many patches: one graph, or two bundles of one architecture and one kind
        of graph.
        """
        if self.bundle is None or other.bundle is None:
            return self is other
        decoders = [subject.token_mode == "reconstruct" for subject in (self, other)]
        return self.bundle.model == other.bundle.model and decoders[0] == decoders[1]

    def feed(self, images: Array, ids_keep: Array | None) -> dict[str, Array]:
        """The graph's inputs under its own names; every one of `ids_keep (B, K)` is real."""
        values = {IMAGES: images}
        if ids_keep is not None:
            values |= {IDS_KEEP: ids_keep, NUM_KEEP: np.full(len(images), ids_keep.shape[1], np.int64)}
        return {own: values[name] for name, own in self.inputs.items()}


@dataclass(frozen=True, eq=False, slots=True)
class LoadedGraph:
    """A graph on an engine."""

    subject: Subject
    engine: Engine

    @property
    def precision(self) -> str | None:
        """What is computed in; None where nobody says."""
        # TensorRT may build a graph in another than its own.
        return self.engine.precision if self.engine.name in PLANNED else self.subject.precision

    @property
    def takes_all(self) -> bool:
        """Whether the engine can be given every patch; one of TensorRT takes what it was built for."""
        ranges = [profile["K"] for profile in self.engine.profiles if "K" in profile]
        return self.subject.takes_all and (not ranges or any(most >= self.subject.num_patches for _, _, most in ranges))


@dataclass(frozen=True, eq=False, slots=True)
class BenchmarkRow:
    """One line of the result: a graph on an engine, a batch size, a number of visible patches."""

    loaded: LoadedGraph
    batch: int
    keep: int | None
    """None where the graph takes whole images."""

    @property
    def subject(self) -> Subject:
        """The graph."""
        return self.loaded.subject

    @property
    def precision(self) -> str | None:
        """What is computed in; None where nobody says."""
        return self.loaded.precision

    @property
    def patches(self) -> int | None:
        """Patches that the encoder sees; None where nobody says."""
        return self.keep or (self.subject.num_patches if self.subject.bundle is not None else None)

    @property
    def label(self) -> str:
        """What tells it from the other rows."""
        return label(self.subject, self.batch, self.keep, self.loaded.engine.name)

    def call(self, seed: int) -> Callable[[], object]:
        """What is timed: the graph on its inputs; of a stream an update, with what is written into its cache."""
        engine = self.loaded.engine
        if self.subject.token_mode != "cached":
            return functools.partial(engine.run, self.inputs(seed))
        return functools.partial(update_cache, engine, *self._update(seed))

    def inputs(self, seed: int) -> dict[str, Array]:
        """Random images, and for each its own random patches; the same for the same seed. Of a stream, random patches
        and an arbitrary cache.
        """
        subject = self.subject
        if subject.token_mode == "cached":
            return update_inputs(*self._update(seed), self.loaded.engine.input_names)
        images = _random_images((self.batch, *subject.image_shape), subject.image_dtype, seed)
        return subject.feed(
            images,
            None if self.keep is None else random_patches(subject.num_patches, self.keep, range(self.batch), seed),
        )

    def _update(self, seed: int) -> tuple[TokenCache, Array, Array]:
        """A cache of which everything was computed, patches, and which they are."""
        subject, keep = self.subject, self.keep
        assert subject.bundle is not None
        assert keep is not None
        cache = TokenCache.empty(CacheShape.of(subject.bundle.manifest), self.batch)
        cache.computed[:] = True
        for index, rows in enumerate(cache.rows.values()):
            rows[:] = np.random.default_rng((seed, index)).standard_normal(rows.shape, np.float32)
        patches = _random_images((self.batch, keep, *subject.image_shape), subject.image_dtype, seed)
        return cache, patches, random_patches(subject.num_patches, keep, range(self.batch), seed)


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A combination that is not timed."""

    row: str
    why: str


def label(subject: Subject, batch: int, keep: int | None, engine: str | None = None) -> str:
    """What tells a combination from others, for people."""
    parts = [
        f"{subject.name} on {engine}" if engine else subject.name,
        f"batch {batch}",
        *([f"{keep} patches"] if keep else []),
    ]
    return ", ".join(parts)


def bundle_subject(path: Path) -> Subject:
    """A bundle, its graph's hash checked.

    Raises:
        ConfigError: no bundle, or a broken one.
        CheckFailed: the graph is not what was exported.
    """
    bundle = Bundle.load(path)
    images = next(entry for entry in bundle.inputs if entry["name"] in (IMAGES, PATCHES))
    graph = bundle.graph()
    return Subject(
        name=str(path),
        graph=graph,
        bundle=bundle,
        inputs={name: name for name in bundle.input_names},
        image_shape=tuple(side for side in images["shape"][1:] if isinstance(side, int))[
            -3 if images["name"] == IMAGES else -1 :
        ],
        image_dtype=images["dtype"],
        num_patches=bundle.num_patches,
        batch=_fixed(bundle.fixed_batch),
        keep=bundle.keep_range if IDS_KEEP in bundle.input_names else None,
        size_bytes=_size_on_disk(graph),
    )


def file_subject(path: Path, like: Subject) -> Subject:
    """An ONNX file of other origin; what it leaves open is as in `like`.

    Raises:
        ConfigError: no ONNX file, or an input that is neither images nor patch indices.
    """
    found: dict[str, TensorEntry] = {}
    for entry in read_inputs(path):
        name = _meaning(entry)
        if name is None or name in found:
            shape = ", ".join(map(str, entry["shape"]))
            raise ConfigError(
                f"{path}: nothing is known to feed the input '{entry['name']}' with, {entry['dtype']} ({shape})",
                hint=(
                    "--against takes graphs of images, float (B, C, H, W), and at most one list of visible patches,"
                    " int64 (B, K)"
                ),
            )
        found[name] = entry
    if IMAGES not in found:
        raise ConfigError(f"{path}: no input takes images", hint="--against takes graphs of images, float (B, C, H, W)")
    shapes = {name: entry["shape"] for name, entry in found.items()}
    fixed = [shape[0] for shape in shapes.values() if isinstance(shape[0], int)]
    if max(fixed, default=1) > MOST_IMAGES:
        raise ConfigError(f"{path} takes {max(fixed):,} images at once; at most {MOST_IMAGES:,} are timed")
    sizes = {IMAGES: [1, *_channels_first(like)], IDS_KEEP: [1, like.num_patches]}
    smallest = {
        entry["name"]: [
            side if isinstance(side, int) else size for side, size in zip(entry["shape"], sizes[name], strict=True)
        ]
        for name, entry in found.items()
    }
    keep = shapes[IDS_KEEP][1] if IDS_KEEP in found else None
    return Subject(
        name=str(path),
        graph=path,
        bundle=None,
        check=check_graph(path, [smallest]),
        inputs={name: entry["name"] for name, entry in found.items()},
        image_shape=tuple(
            own if isinstance(own, int) else known
            for own, known in zip(shapes[IMAGES][1:], _channels_first(like), strict=True)
        ),
        image_dtype=found[IMAGES]["dtype"],
        num_patches=like.num_patches,
        batch=next((_fixed(shape[0]) for shape in shapes.values() if isinstance(shape[0], int)), None),
        keep=None if keep is None else _fixed(keep) or (1, like.num_patches),
        size_bytes=_size_on_disk(path),
    )


def combinations(
    subject: Subject, batches: Sequence[int] | None, keeps: Sequence[int | float]
) -> tuple[list[tuple[int, int | None]], list[LeftOut]]:
    """Batch sizes and numbers of visible patches at which a graph is timed, and what it cannot take.

    Args:
        batches: None for one image, or what the graph is fixed to.
        keeps: counts (int) and shares (float) of the patches; a graph that takes whole images or is fixed to one count
            has its own.
    """
    sizes = batches or [subject.batch[0] if subject.batch is not None else 1]
    counts: list[int | None] = [None]
    if subject.keep is not None:
        fixed = subject.keep[0] == subject.keep[1]
        counts = (
            [subject.keep[0]] if fixed else list(dict.fromkeys(_count(keep, subject.num_patches) for keep in keeps))
        )
    found: list[tuple[int, int | None]] = []
    left_out: list[LeftOut] = []
    for batch in dict.fromkeys(sizes):
        for keep in counts:
            why = _outside(batch, subject.batch, "images a call") or _outside(keep, subject.keep, "patches")
            if why is None:
                found.append((batch, keep))
            else:
                left_out.append(LeftOut(label(subject, batch, keep), why))
    return found, left_out


@functools.lru_cache(maxsize=16)
def _random_images(shape: tuple[int, ...], dtype: str, seed: int) -> Array:
    rng = np.random.default_rng(seed)
    return (
        rng.integers(0, 256, shape, np.uint8)
        if dtype == "uint8"
        else rng.standard_normal(shape, np.float32).astype(dtype)
    )


def _meaning(entry: TensorEntry) -> str | None:
    """Which of our inputs a graph's input is, by its type and rank."""
    return {("float32", 4): IMAGES, ("float16", 4): IMAGES, ("int64", 2): IDS_KEEP}.get(
        (entry["dtype"], len(entry["shape"]))
    )


def _channels_first(subject: Subject) -> tuple[int, int, int]:
    assert subject.bundle is not None
    return (subject.bundle.preprocess.channels, *subject.bundle.preprocess.image_size)


def _fixed(size: int | str | None) -> Limits | None:
    return (size, size) if isinstance(size, int) else None


def _size_on_disk(graph: Path) -> int:
    files = [graph, *(graph.parent / name for name in external_data(graph))]
    return sum(file.stat().st_size for file in files if file.is_file())


def _count(keep: int | float, num_patches: int) -> int:
    return keep if isinstance(keep, int) else keep_count(num_patches, keep)


def _outside(value: int | None, limits: Limits | None, what: str) -> str | None:
    if value is None or limits is None or limits[0] <= value <= limits[1]:
        return None
    return (
        f"the graph takes {limits[0]} {what}"
        if limits[0] == limits[1]
        else f"the graph takes {limits[0]} to {limits[1]} {what}"
    )
