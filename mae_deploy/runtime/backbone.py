"""The exported backbone as a function: images in, named features out, on whichever engine is there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from mae_deploy.errors import ConfigError
from mae_deploy.preprocess import Array, Preprocess
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.engine import Engine, check_outputs, run_in_chunks
from mae_deploy.runtime.inputs import Images, Keep, image_batch, keep_batch
from mae_deploy.runtime.manifest import IDS_KEEP, IMAGES
from mae_deploy.runtime.registry import load_engine

if TYPE_CHECKING:
    from typing_extensions import Self


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
    """A bundle on an engine; a context manager that closes the engine."""

    def __init__(self, bundle: Bundle, engine: Engine) -> None:
        self.bundle = bundle
        self.engine = engine

    @classmethod
    def load(cls, path: str | os.PathLike[str], engine: str = "auto", *, device: str = "cpu", threads: int | None = None) -> Backbone:
        """Load the bundle in a folder; `threads` is how many the engine uses on a CPU, None for one for each core.

        Raises:
            ConfigError: no bundle, a broken or newer one, or an unknown engine or device.
            CheckFailed: a file of the bundle is not what was exported.
            MissingDependency: the engine's package or its device is absent.
        """
        bundle = Bundle.load(path)
        return cls(bundle, load_engine(bundle, engine, device=device, threads=threads))

    @property
    def preprocess(self) -> Preprocess:
        """What is done to uint8 and Pillow images."""
        return self.bundle.preprocess

    @property
    def num_patches(self) -> int:
        """Number of patches of an image, N."""
        return self.bundle.num_patches

    @property
    def output_names(self) -> tuple[str, ...]:
        """What a call returns unless it names `outputs`."""
        return self.bundle.output_names

    def __call__(self, images: Images, keep: Keep | None = None, *, outputs: Sequence[str] | None = None) -> Features:
        """Features of one image or of many, always with the batch as the first axis.

        Args:
            images: uint8 `(H, W)`, `(H, W, C)` or `(B, H, W, C)` of any size, a list of such images or of Pillow images of any sizes,
                or float32 `(B, C, H, W)` that is normalised already and has the graph's size.
            keep: the visible patches, row-major indices in any order: `(K,)` for every image or `(B, K)`; for bundles exported with `--tokens visible`.
                None keeps all. `tokens` come back in the order of `keep`.
            outputs: names of the outputs to compute; None for all.

        Raises:
            ConfigError: images, indices or outputs that this bundle cannot take.
            MaeDeployError: the engine fails or is closed.
        """
        names = check_outputs(outputs, self.output_names)
        batch = image_batch(images, self.preprocess)
        inputs = {IMAGES: batch, **self._token_inputs(keep, len(batch))}
        return Features(run_in_chunks(self.engine, inputs, batch=self.bundle.fixed_batch, outputs=names))

    def close(self) -> None:
        """Free the engine; closing twice does nothing."""
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _token_inputs(self, keep: Keep | None, batch: int) -> dict[str, Array]:
        fixed = self.bundle.fixed_keep
        if self.bundle.token_mode == "full":
            if keep is not None:
                raise ConfigError("this bundle's graph takes every patch, so keep cannot be used", hint="export with --tokens visible")
            return {}
        if keep is None:
            if fixed not in (None, self.num_patches):
                raise ConfigError(f"this bundle's graph takes {fixed} of {self.num_patches} patches", hint=f"pass keep, the indices of {fixed} patches")
            keep = np.arange(self.num_patches)
        return {IDS_KEEP: keep_batch(keep, batch, self.num_patches, fixed)}
