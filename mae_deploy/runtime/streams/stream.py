"""Frames in, features of whole frames out, at the cost of what changed; and how far off that is."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mae_deploy.errors import ConfigError, MaeDeployError
from mae_deploy.images.read import Array
from mae_deploy.images.regions import patches_of
from mae_deploy.runtime.cache import TokenCache
from mae_deploy.runtime.flops import flops_per_image
from mae_deploy.runtime.manifest import num_prefix
from mae_deploy.runtime.streams.camera import Camera, Choice
from mae_deploy.runtime.streams.config import StreamConfig
from mae_deploy.runtime.streams.crossover import measured_bypass, step
from mae_deploy.runtime.streams.error import temporal_snr
from mae_deploy.runtime.streams.model import StreamModel
from mae_deploy.runtime.streams.shift import Shift, energy
from mae_deploy.runtime.streams.whole import whole_features

_ALIKE = 1.25
"""Cameras are one batch where none of them takes more than so many times the patches that it needs."""


class DriftError(MaeDeployError):
    """An audit found features that are farther off than allowed."""

    exit_code = 1


class Seen(dict[str, Array]):
    """A frame's features by name, each `(1, …)` and of the whole frame; `seen.cls` is `seen["cls"]`. Where there are
    `tokens`, there is `feature_map (1, D, H', W')` as well: it is made of them when it is asked for.
    """

    keep: Array
    """`(K,)`: the patches that were computed."""
    age: Array
    """`(N,)`: how many frames ago each patch was computed, 0 for those of this frame."""
    cost: float
    """Operations as a share of those of a whole frame; above 1 where an audit was made."""
    event: str | None
    """Why the whole frame was computed, where it was."""
    snr: float | None
    """What an audit of this frame found, in dB; None where there was none."""

    def __init__(
        self,
        features: Mapping[str, Array],
        *,
        keep: Array,
        age: Array,
        cost: float,
        event: str | None,
        grid: tuple[int, int],
        snr: float | None = None,
    ) -> None:
        """Args: grid: rows and columns of patches."""
        super().__init__(features)
        self._grid = grid
        self.keep, self.age, self.cost, self.event, self.snr = keep, age, cost, event, snr

    def __missing__(self, name: str) -> Array:
        if name != "feature_map" or "tokens" not in self:
            raise KeyError(name)
        tokens = self["tokens"]
        return np.ascontiguousarray(tokens.swapaxes(1, 2)).reshape(len(tokens), tokens.shape[2], *self._grid)

    def __getattr__(self, name: str) -> Array:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no output '{name}'; there are: {', '.join(self)}") from None


class StreamPool:
    """Several cameras on one backbone: what they need of a frame is one batch where each of them needs a part of it.

    Calls from several threads take turns. Memory does not grow with the number of frames.
    """

    def __init__(self, backbone: StreamModel, cameras: int | Sequence[str], config: StreamConfig) -> None:
        """Begin cameras that have seen nothing.

        Args:
            cameras: how many, or their names, by which errors call them; else they are camera 0 and so on.

        Raises:
            ConfigError: a bundle that was not exported with `--tokens cached`, or of a fixed K, or of a fixed batch
                other than 1.
        """
        bundle = backbone.bundle
        if bundle.token_mode != "cached" or bundle.fixed_keep is not None:
            raise ConfigError(
                f"the bundle {bundle.path} cannot follow a stream: its token mode is '{bundle.token_mode}'"
                + (f", of {bundle.fixed_keep} patches always" if bundle.fixed_keep is not None else ""),
                hint="export with --tokens cached",
            )
        if isinstance(cameras, str):
            raise ConfigError(f"cameras are a number or a list of names, not '{cameras}'")
        self.names = [f"camera {index}" for index in range(cameras)] if isinstance(cameras, int) else list(cameras)
        cameras = len(self.names)
        if cameras < 1 or bundle.fixed_batch not in (None, 1):
            raise ConfigError(
                f"{cameras} cameras on a graph of batch {bundle.fixed_batch}", hint="export without a fixed batch"
            )
        self.config = config
        self._backbone = backbone
        P = bundle.manifest["model"]["patch_size"]
        height, width = backbone.preprocess.image_size
        self._patch_size, self._grid = P, (height // P, width // P)
        bypass = measured_bypass(backbone) if config.bypass is None else config.bypass
        prefix = num_prefix(bundle.manifest["model"])
        self._cameras = [
            Camera(config, self._grid, P, bypass=bypass, step=step(backbone), prefix=prefix) for _ in range(cameras)
        ]
        self._together = backbone.new_cache(cameras) if bundle.fixed_batch is None else None
        """All cameras' cache, where the graph takes several at once; `_caches` are then parts of it."""
        together = self._together
        self._caches = [
            backbone.new_cache() if together is None else together.streams(index, index + 1) for index in range(cameras)
        ]
        self._spent = [0.0] * cameras
        self._last: list[dict[str, Array]] = [{} for _ in range(cameras)]
        self._turn = threading.Lock()
        self._whole_flops = flops_per_image(bundle.manifest, bundle.num_patches) or 1
        self._costs: dict[int, float] = {}

    def __len__(self) -> int:
        """Number of cameras."""
        return len(self._cameras)

    def reset(self, camera: int = 0) -> None:
        """Forget what a camera has shown."""
        with self._turn:
            self._cameras[camera].begin()
            self._caches[camera].clear()
            self._last[camera], self._spent[camera] = {}, 0.0

    def cache(self, camera: int = 0) -> TokenCache:
        """What the graph remembers of a camera; the same memory, so writing to it is felt by the next frame."""
        return self._caches[camera]

    def __call__(self, frames: Sequence[Any]) -> list[Seen]:
        """The features of one frame of each camera, in the cameras' order; None for a camera without a new frame keeps
        its last features.

        Args:
            frames: images as a call of the backbone takes one: uint8 `(H, W, C)` or a Pillow image, of any size.

        Raises:
            ConfigError: another number of frames than cameras, or None for a camera that has not begun.
            UnreadableImage: an array that is no image.
            DriftError: an audit failed and `on_drift` is error; the frame's own features are those of the whole frame.
        """
        if len(frames) != len(self):
            raise ConfigError(f"{len(frames)} frames for {len(self)} cameras", hint="give one, or None, for each")
        with self._turn:
            given = {index: frame for index, frame in enumerate(frames) if frame is not None}
            missing = [index for index in range(len(self)) if index not in given and not self._last[index]]
            if missing:
                raise ConfigError(f"{self.names[missing[0]]} has no frame yet", hint="begin with a frame of each")
            chosen = self._follow(given)
            return [self._result(index, chosen.get(index)) for index in range(len(self))]

    def follow(self, frames: Mapping[int, Any]) -> dict[int, Seen]:
        """The features of the cameras that have a frame, by their numbers; see a call, which wants one of each."""
        with self._turn:
            return {index: self._result(index, choice) for index, choice in self._follow(frames).items()}

    def _follow(self, frames: Mapping[int, Any]) -> dict[int, Choice]:
        chosen = {index: self._choose(index, frame) for index, frame in frames.items()}
        self._compute(chosen)
        return chosen

    def _choose(self, index: int, frame: Any) -> Choice:
        backbone, cache = self._backbone, self._caches[index]
        image = backbone.preprocess.converted(frame)
        size = image.shape[:2] if isinstance(image, np.ndarray) else (image.height, image.width)
        pixels = backbone.preprocess.crop_roughly(image)
        tokens = cache.tokens[0] if cache.computed.any() else None
        return self._cameras[index].choose(image, pixels, size, tokens, self._patches_of)

    def _patches_of(self, mask: Array) -> Array | None:
        """The patches that a part of the frame, bool `(H, W)`, is seen in."""
        return patches_of(self._backbone.preprocess, self._patch_size, mask.shape, mask)

    def _compute(self, chosen: dict[int, Choice]) -> None:
        """In each batch, a camera takes as many patches as the one that needs most."""
        for batch in self._batches(chosen):
            most = max(len(chosen[index].ids) for index in batch)
            for index in batch:
                if len(chosen[index].ids) < most:
                    chosen[index] = self._cameras[index].filled(chosen[index], most)
            self._update(batch, chosen)
        for index, choice in chosen.items():
            if not len(choice.ids):
                self._cameras[index].settle(choice)

    def _batches(self, chosen: Mapping[int, Choice]) -> list[list[int]]:
        """The cameras of each: those side by side in memory that need about as much, as many as were checked."""
        largest = self._backbone.bundle.largest_batch
        batches: list[list[int]] = []
        for index, choice in chosen.items():
            last = batches[-1] if batches else []
            sizes = [len(chosen[other].ids) for other in [*last, index]]
            alike = max(sizes) <= _ALIKE * min(sizes)
            if last and last[-1] == index - 1 and alike and len(last) < largest:
                last.append(index)
            elif len(choice.ids):
                batches.append([index])
        return batches

    def _update(self, indices: Sequence[int], chosen: Mapping[int, Choice]) -> None:
        choices = [chosen[index] for index in indices]
        ids = np.stack([choice.ids for choice in choices])
        patches = np.stack([self._pixels_of(choice, choice.ids) for choice in choices])
        cache = self._cache_of(indices[0], indices[-1] + 1)
        shifts = [Shift(cache, at, choice.in_turn) for at, choice in enumerate(choices)] if self.config.shift else []
        before = [cache.tokens[at, choice.ids] for at, choice in enumerate(choices)]
        outputs = self._backbone.update(cache, patches, ids)
        for at, index in enumerate(indices):
            choice, camera = choices[at], self._cameras[index]
            camera.learn(choice, cache.tokens[at, choice.ids] - before[at])
            if shifts and camera.age is not None:
                shifts[at].apply(choice.ids, camera.age)
            self._keep(index, {name: array[at : at + 1] for name, array in outputs.items()}, choice.ids)
            camera.settle(choice)

    def _cache_of(self, first: int, last: int) -> TokenCache:
        """That of the cameras from `first` up to, and without, `last`."""
        if self._together is None or last - first == 1:
            return self._caches[first]
        return self._together if last - first == len(self) else self._together.streams(first, last)

    def _pixels_of(self, choice: Choice, ids: Array) -> Array:
        """`(K, P, P, C)`, to the pixel what the model is to see."""
        return self._backbone.preprocess.crop_patches(choice.frame, ids, self._patch_size)

    def _keep(self, index: int, outputs: Mapping[str, Array], ids: Array) -> None:
        """A camera's features, of the whole frame."""
        cache, manifest = self._caches[index], self._backbone.bundle.manifest
        self._last[index] = whole_features(outputs, ids, self._last[index], cache, manifest)

    def _result(self, index: int, choice: Choice | None) -> Seen:
        camera = self._cameras[index]
        assert camera.age is not None
        if choice is None:
            nothing = np.zeros(0, np.int64)
            return Seen(self._features(index), keep=nothing, age=camera.age, cost=0.0, event=None, grid=self._grid)
        cost = self._cost(len(choice.ids))
        snr = self._audit(index, choice, cost)
        camera.error.follow(self._caches[index].tokens[0])
        return Seen(
            self._features(index),
            keep=choice.ids,
            age=camera.age - 1,
            cost=cost + (snr is not None),
            event=choice.reason,
            grid=self._grid,
            snr=snr,
        )

    def _features(self, index: int) -> dict[str, Array]:
        """A camera's last ones, the caller's to change."""
        return {name: array.copy() for name, array in self._last[index].items()}

    def _cost(self, count: int) -> float:
        if count not in self._costs:
            flops = flops_per_image(self._backbone.bundle.manifest, count) if count else 0
            self._costs[count] = (flops or 0) / self._whole_flops
        return self._costs[count]

    def _audit(self, index: int, choice: Choice, cost: float) -> float | None:
        """Compute the whole frame beside, once its share of the computation allows it, and take it over."""
        cache, camera = self._caches[index], self._cameras[index]
        tokens, mean = cache.tokens[0], camera.error.mean
        self._spent[index] += self.config.audit * cost
        N = self._backbone.num_patches
        if self._spent[index] < 1 or mean is None:
            return None
        if len(choice.ids) == N:
            if camera.tightness:  # where the refresh alone makes whole frames, nothing else would end that
                self._spent[index] %= 1
                camera.relax()
            return None
        self._spent[index] %= 1
        ours = tokens.copy()
        whole = np.arange(N)
        outputs = self._backbone.update(cache, self._pixels_of(choice, whole)[None], whole)
        snr = temporal_snr(cache.tokens[0], ours, mean)
        camera.audited(energy(cache.tokens[0] - ours))
        self._keep(index, outputs, whole)
        camera.settle_again(choice)
        if snr >= self.config.min_snr:
            camera.relax()
        elif self.config.on_drift == "error":
            raise DriftError(
                f"{self.names[index]}, frame {camera.index - 1}: the stream's tokens are {snr:.1f} dB from those of the"
                f" whole frame, less than {self.config.min_snr:g}",
                hint="refresh more, or select more",
            )
        else:
            camera.tighten()
        return snr


class Stream:
    """One camera; see `StreamPool`."""

    def __init__(self, backbone: StreamModel, config: StreamConfig) -> None:
        self._pool = StreamPool(backbone, 1, config)
        self.config = config

    def __call__(self, frame: Any) -> Seen:
        """The features of the camera's next frame."""
        return self._pool([frame])[0]

    def reset(self) -> None:
        """Forget what the camera has shown."""
        self._pool.reset()

    @property
    def cache(self) -> TokenCache:
        """What the graph remembers; the same memory."""
        return self._pool.cache()
