"""What a stream needs of a backbone."""

from __future__ import annotations

from typing import Protocol

from mae_deploy.images.preprocess import Preprocess
from mae_deploy.images.read import Array
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.cache import TokenCache
from mae_deploy.runtime.engines.base import Engine


class StreamModel(Protocol):
    """A backbone whose bundle was exported with `--tokens cached`; see `Backbone`."""

    bundle: Bundle
    engine: Engine

    @property
    def preprocess(self) -> Preprocess:
        """What is done to a frame."""
        ...

    @property
    def num_patches(self) -> int:
        """N."""
        ...

    def new_cache(self, batch: int = 1) -> TokenCache:
        """The memory of so many streams."""
        ...

    def update(self, cache: TokenCache, patches: Array, keep: Array | None = None) -> dict[str, Array]:
        """Recompute some patches of each stream."""
        ...
