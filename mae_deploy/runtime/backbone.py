"""The exported backbone as a function: images in, named features out, on whichever engine is there."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from mae_deploy.errors import ConfigError, MaeDeployError
from mae_deploy.images.arrays import Array, ChannelOrder
from mae_deploy.images.geometry import CropMode
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.images.regions import Region, patches_of
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.cache import CacheShape, TokenCache, runner, update_cache
from mae_deploy.runtime.engines.base import (
    Engine,
    EngineOptions,
    check_outputs,
    results_in_order,
    start_in_chunks,
)
from mae_deploy.runtime.inputs import (
    Images,
    Keep,
    NumKeep,
    first_frames,
    image_batch,
    is_batch,
    patch_batch,
    pixel_batch,
    token_batch,
)
from mae_deploy.runtime.manifest import IDS_KEEP, IMAGES, PLANNED
from mae_deploy.runtime.registry import ALIASES, TENSORRT_RTX, engine_for, fall_back, load_engine

if TYPE_CHECKING:  # a device that is given normalised arrays needs no Pillow
    from PIL import Image
    from typing_extensions import Self

    from mae_deploy.runtime.streams.stream import Stream, StreamPool


class Features(dict[str, Array]):
    """The outputs by name, each `(B, ...)`; `features.cls` is `features["cls"]`."""

    def __getattr__(self, name: str) -> Array:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no output '{name}'; there are: {', '.join(self)}") from None

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self]


class Backbone:
    """A bundle on an engine; a context manager that closes the engine.

    A process that is forked from the one that loaded it must load it again; pickled, it is loaded again where it is
    unpickled, from the same folder.
    """

    def __init__(self, bundle: Bundle, engine: Engine, *, crop_mode: CropMode | None = None) -> None:
        self.bundle = bundle
        self.engine = engine
        self.preprocess: Preprocess = bundle.preprocess.altered(crop_mode=crop_mode)
        """What is done to uint8 and Pillow images."""
        self._folder = bundle.path.absolute()

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        engine: str = "auto",
        *,
        device: str = "cpu",
        threads: int | None = None,
        affinity: Sequence[int] | None = None,
        build: bool = False,
        crop_mode: CropMode | None = None,
    ) -> Backbone:
        """Load the bundle in a folder; see `EngineOptions` for device, threads and affinity.

        Args:
            engine: auto, onnxruntime, openvino, tensorrt or tensorrt-rtx; auto is TensorRT where the bundle has an
                engine for this machine, else the one on which the bundle was checked, where it is installed, else
                onnxruntime.
            build: where the bundle has no TensorRT engine for this machine, build one and add it to the bundle, which
                takes minutes.
            crop_mode: how images of another form than the input's are fitted, where that is not to be as the bundle
                has it: center cuts out the middle, squash changes the aspect ratio, border pads with the mean,
                letterbox with black; the latter three show the whole image.

        Raises:
            ConfigError: no bundle, a broken or newer one, an unknown engine or device, or a core that is not there.
            CheckFailed: a file of the bundle is not what was exported.
            MissingDependency: the engine's package or its device is absent.
        """
        bundle = Bundle.load(path)
        options = EngineOptions(device=device, threads=threads, affinity=None if affinity is None else tuple(affinity))
        if build and ALIASES.get(engine, engine) in ("auto", *PLANNED):
            engine = _with_engine_built(bundle, engine, device)
        return cls(bundle, load_engine(bundle, engine, options), crop_mode=crop_mode)

    def read(self, image: str | os.PathLike[str] | bytes) -> Image.Image | Array:
        """Read an image file, or the bytes of one, such as an upload: what a call takes, turned upright.

        Raises:
            UnreadableImage: empty, cut short, not an image, or of a kind that has no 8-bit form.
        """
        return self.preprocess.read(image if isinstance(image, bytes) else Path(image))

    @property
    def num_patches(self) -> int:
        """Number of patches of an image, N."""
        return self.bundle.num_patches

    def patches(self, image_shape: Sequence[int], region: Region) -> Array | None:
        """The patches that see any of a region of an image, for `keep`, under this backbone's crop and resize: int64
        `(K,)`, ascending, of every group of bands; None where none does, because the region is empty or in a part of
        the image that the crop hides.

        Args:
            image_shape: the array's shape, `(H, W)` or `(H, W, C)`.
            region: a box `(left, top, right, bottom)` in the image's pixels, where right and bottom are no part of it;
                several boxes `(n, 4)`; or a mask `(H, W)`, which is not 0 in the region.

        Raises:
            ConfigError: neither a box nor a mask of this image.
        """
        P, (H, W) = self.bundle.model["patch_size"], self.preprocess.image_size
        found = patches_of(self.preprocess, P, image_shape, region)
        if found is None:
            return None
        grid = (H // P) * (W // P)
        return np.concatenate([found + first for first in range(0, self.num_patches, grid)])

    @property
    def output_names(self) -> tuple[str, ...]:
        """What a call returns unless it names `outputs`."""
        return self.bundle.output_names

    def __call__(
        self,
        images: Images,
        keep: Keep | None = None,
        *,
        num_keep: NumKeep | None = None,
        outputs: Sequence[str] | None = None,
        channel_order: ChannelOrder = "rgb",
    ) -> Features:
        """Features of one image or of many, always with the batch as the first axis, in the graph's own type. Many are
        prepared and run in parts of the largest batch that was checked.

        Args:
            images: uint8 `(H, W)`, `(H, W, C)` or `(B, H, W, C)` of any size, a list of such images or of Pillow images
                or `VideoImage`s of any sizes, or float32 or float16 `(B, C, H, W)` that is normalised already and has
                the graph's size (not where the graph normalises). Where the model takes pixels of more than 8 bits,
                arrays of any type of number take the place of uint8. Arrays are RGB, unless `channel_order` says
                otherwise.
            keep: the visible patches, row-major indices in any order: `(K,)` for every image or `(B, K)`; for bundles
                exported with `--tokens visible`, `ragged` or `reconstruct`. Ragged bundles also take a list of rows of
                unequal length, and give back `tokens` of the longest, zero where a row has ended. None keeps all.
                `tokens` come back in the order of `keep`. Also ranges as text, `"0-48,60"`, or boolean masks: `(N,)`
                or `(rows, columns)` of the grid for every image, or one for each.
            num_keep: `(B,)`: only so many indices of each row of `keep (B, K)` are real, the others may be anything;
                for ragged bundles.
            outputs: names of the outputs to compute; None for all.
            channel_order: of arrays, rgb or bgr, as OpenCV's frames are; Pillow images know their own.

        Raises:
            ConfigError: images, indices or outputs that this bundle cannot take.
            MaeDeployError: the engine fails or is closed.
        """
        spec, dtype = self.preprocess, self.bundle.image_dtype
        if not is_batch(images) or not len(images):
            return self._start(
                1, lambda _: image_batch(images, spec, dtype, channel_order=channel_order), keep, num_keep, outputs
            )()
        return self._start(
            len(images),
            lambda part: image_batch(images[part], spec, dtype, channel_order=channel_order, first=part.start),
            keep,
            num_keep,
            outputs,
        )()

    def run_cropped(
        self,
        pixels: Array,
        keep: Keep | None = None,
        *,
        num_keep: NumKeep | None = None,
        outputs: Sequence[str] | None = None,
    ) -> Features:
        """As a call, for images that `preprocess.crop` made: `(B, H, W, C)`, neither resized nor cropped again."""
        return self.start_cropped(pixels, keep, num_keep=num_keep, outputs=outputs)()

    def start_cropped(
        self,
        pixels: Array,
        keep: Keep | None = None,
        *,
        num_keep: NumKeep | None = None,
        outputs: Sequence[str] | None = None,
    ) -> Callable[[], Features]:
        """Start what `run_cropped` does, and return what waits for it: where the engine computes beside the caller, the
        next images can be prepared meanwhile.
        """
        spec, dtype = self.preprocess, self.bundle.image_dtype
        return self._start(len(pixels), lambda part: pixel_batch(pixels[part], spec, dtype), keep, num_keep, outputs)

    def new_cache(self, batch: int = 1) -> TokenCache:
        """The memory of so many streams, of which nothing was computed yet; see `update`.

        Raises:
            ConfigError: a bundle of another token mode, or another number than its fixed batch.
        """
        if self.bundle.token_mode != "cached":
            raise ConfigError(
                f"this bundle's graph keeps nothing of earlier frames: its token mode is '{self.bundle.token_mode}'",
                hint="export with --tokens cached",
            )
        if batch < 1 or self.bundle.fixed_batch not in (None, batch):
            raise ConfigError(f"{batch} streams", hint=f"this graph takes {self.bundle.fixed_batch or 'one or more'}")
        return TokenCache.empty(CacheShape.of(self.bundle.manifest), batch)

    def update(
        self,
        cache: TokenCache,
        patches: Array,
        keep: Keep | None = None,
        *,
        outputs: Sequence[str] | None = None,
    ) -> Features:
        """Recompute some patches of each stream, in the context of what `cache` holds of the others, and write them to
        it; for bundles exported with `--tokens cached`.

        Args:
            cache: from `new_cache`; B streams.
            patches: the pixels of these patches, `(B, K, P, P, C)` as `preprocess.crop` gives pixels (`take_patches`
                cuts them out of a frame), or as the graph takes them, `(B, K, P * P * C)`.
            keep: which they are, row-major indices in any order, each once: `(K,)` for all streams or `(B, K)`. None:
                all; then nothing is read of the cache.
            outputs: names of the outputs to return; None for all.

        Returns:
            `cls (B, D)`, `tokens (B, K, D)` in the order of `keep`, `pooled` and `logits` of the whole frame. The whole
            frame's tokens are `cache.tokens`.

        Raises:
            ConfigError: patches, indices or outputs that this bundle cannot take.
            MaeDeployError: the engine fails or is closed.
        """
        ids_keep = token_batch(self.bundle, keep, None, len(cache))[IDS_KEEP]
        given = patch_batch(patches, self.bundle)
        if given.shape[:2] != ids_keep.shape:
            raise ConfigError(
                f"patches are {patches.shape} for {ids_keep.shape[1]} patches of each of {len(cache)} streams",
                hint="give the pixels of the kept patches, (B, K, P, P, C)",
            )
        return Features(update_cache(self.engine, cache, given, ids_keep, outputs))

    def stream(self, **options: Any) -> Stream:
        """Follow a camera: each call takes its next frame, computes what changed, and gives the features of the whole
        frame; for bundles exported with `--tokens cached`.

        Args:
            options: see `StreamConfig`.

        Raises:
            ConfigError: a bundle of another token mode or of a fixed K, or options that cannot be.
        """
        from mae_deploy.runtime.streams.config import StreamConfig
        from mae_deploy.runtime.streams.stream import Stream

        return Stream(self, StreamConfig(**options))

    def stream_pool(self, cameras: int | Sequence[str], **options: Any) -> StreamPool:
        """Follow several cameras, by their number or names, whose frames are computed in batches; see `stream`."""
        from mae_deploy.runtime.streams.config import StreamConfig
        from mae_deploy.runtime.streams.stream import StreamPool

        return StreamPool(self, cameras, StreamConfig(**options))

    def close(self) -> None:
        """Free the engine; closing twice does nothing."""
        self.engine.close()

    def __reduce__(self) -> tuple[Any, ...]:
        engine = self.engine
        mode = self.preprocess.crop_mode
        return _load_again, (type(self), self._folder, engine.name, engine.options, engine.taps, mode)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(
        self,
        count: int,
        take: Callable[[slice], Array],
        keep: Keep | None,
        num_keep: NumKeep | None,
        outputs: Sequence[str] | None,
    ) -> Callable[[], Features]:
        """Run `count` images in parts of the largest batch that was checked, so that memory does not follow `count`;
        `take` gives a part as the graph takes it.
        """
        names = check_outputs(outputs, self.output_names)
        size = self.bundle.largest_batch
        if self.engine.profiles:
            size = max(profile["B"][2] for profile in self.engine.profiles)
        parts = [slice(start, start + size) for start in range(0, count, size)]

        def started() -> Iterator[Callable[[], dict[str, Array]]]:
            tokens: dict[str, Array] = {}
            for part in parts:
                images = take(part)
                if self.bundle.token_mode == "cached":
                    yield self._start_frames(images, keep, names)
                    continue
                tokens = tokens or token_batch(self.bundle, keep, num_keep, count)
                inputs = {IMAGES: images, **{name: rows[part] for name, rows in tokens.items()}}
                yield start_in_chunks(self.engine, inputs, batch=self.bundle.fixed_batch, outputs=names)

        if len(parts) == 1:
            (wait,) = started()
            return lambda: Features(wait())
        found = Features()
        for part, outcome in zip(parts, results_in_order(started(), self.engine.in_flight), strict=True):
            for name, rows in outcome.items():
                if name not in found:
                    found[name] = np.empty((count, *rows.shape[1:]), rows.dtype)
                found[name][part] = rows
        return lambda: found

    def _start_frames(self, images: Array, keep: Keep | None, names: Sequence[str]) -> Callable[[], dict[str, Array]]:
        """Start each image as the first frame of a stream of its own."""
        if keep is not None or self.bundle.keep_range[1] < self.num_patches:
            raise ConfigError(
                "this bundle's graph recomputes patches of a stream, and without earlier frames has to be given all",
                hint="use backbone.update with a cache, or export with --tokens visible"
                if keep is not None
                else "use backbone.update with a cache, or export with --tokens cached, without :K",
            )
        ids_keep = token_batch(self.bundle, None, None, len(images))[IDS_KEEP]
        frames = first_frames(images, ids_keep, self.bundle)
        streams = runner(self.engine, self.bundle.manifest)
        return start_in_chunks(streams, frames, batch=self.bundle.fixed_batch, outputs=names)


def _load_again(
    kind: type[Backbone],
    path: Path,
    engine: str,
    options: EngineOptions,
    taps: tuple[str, ...],
    crop_mode: CropMode,
) -> Backbone:
    bundle = Bundle.load(path)
    return kind(bundle, load_engine(bundle, engine, options, taps=taps), crop_mode=crop_mode)


def _with_engine_built(bundle: Bundle, engine: str, device: str) -> str:
    """The engine to load, once TensorRT's was built where it was missing; for auto, another where that fails."""
    from mae_deploy.runtime.tensorrt.add_engine import build_missing_engine

    try:
        build_missing_engine(bundle, device, rtx=engine_for(bundle, engine, EngineOptions()) == TENSORRT_RTX)
    except MaeDeployError as error:
        if engine != "auto":
            raise
        return fall_back(bundle, error)
    return engine
