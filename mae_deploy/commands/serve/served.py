"""A bundle that serves under a name, and gives way to the next one in its folder once that is verified."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from mae_deploy.commands.serve.batching import Batcher
from mae_deploy.commands.serve.config import ServeConfig
from mae_deploy.errors import CheckFailed, MaeDeployError
from mae_deploy.hub import local
from mae_deploy.progress import notice
from mae_deploy.runtime.backbone import Backbone
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.engines.base import EngineOptions
from mae_deploy.runtime.manifest import MANIFEST_FILE
from mae_deploy.runtime.registry import load_engine
from mae_deploy.runtime.verify import verify_bundle
from mae_deploy.text import as_seconds

_POLL = 0.05
"""Seconds between two looks at whether requests have left a bundle that was replaced."""

Stamp = tuple[tuple[str, int, int], ...]
"""Of every file of a folder its name, size and time of change."""


@dataclass(frozen=True, slots=True)
class Verified:
    """A bundle that computes here what PyTorch computed."""

    backbone: Backbone
    revision: str
    """The beginning of its manifest's SHA-256."""
    since: str
    """When it was verified: ISO 8601, UTC."""
    stamp: Stamp


class Serving:
    """A verified bundle and its batches, for as long as a request uses it."""

    def __init__(self, verified: Verified, batcher: Batcher) -> None:
        self.verified, self.batcher = verified, batcher
        self._requests = 0

    @property
    def backbone(self) -> Backbone:
        """The bundle on its engine."""
        return self.verified.backbone

    def __enter__(self) -> Serving:
        self._requests += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._requests -= 1

    async def close(self) -> None:
        """Let the requests end that use it, then free the engine."""
        while self._requests:
            await asyncio.sleep(_POLL)
        await self.batcher.close()


def open_verified(config: ServeConfig, name: str) -> Verified:
    """Verify a bundle and load it.

    Raises:
        CheckFailed: it is not what was exported, or misses parity on this machine.
        ConfigError: no bundle, an unknown engine or device.
        MissingDependency: the engine's package or its device is absent.
    """
    folder = local(config.named[name])
    stamp = stamp_of(folder)
    bundle = Bundle.load(folder)
    revision = hashlib.sha256((folder / MANIFEST_FILE).read_bytes()).hexdigest()[:12]
    options = EngineOptions(device=config.device, threads=config.threads, affinity=config.affinity)
    failures = verify_bundle(bundle, config.engine, options).failures
    if failures:
        raise CheckFailed(f"{folder} misses parity: {'; '.join(failures)}", hint=f"mae-deploy verify {folder}")
    backbone = Backbone(bundle, load_engine(bundle, config.engine, options))
    if stamp_of(folder) != stamp:
        backbone.close()
        raise CheckFailed(f"{folder} has changed while it was verified", hint="replace a bundle by renaming its folder")
    return Verified(backbone, revision, datetime.now(timezone.utc).isoformat(timespec="seconds"), stamp)


def stamp_of(folder: Path) -> Stamp:
    """By what a folder is known to have changed."""
    found = []
    for path in sorted(folder.rglob("*")):
        try:
            state = path.stat()
        except OSError:  # moved away meanwhile
            continue
        if path.is_file():
            found.append((os.fspath(path.relative_to(folder)), state.st_size, state.st_mtime_ns))
    return tuple(found)


class Served:
    """What answers under a name: always the last bundle of its folder that was verified."""

    def __init__(
        self,
        config: ServeConfig,
        name: str,
        verified: Verified,
        *,
        computed: Callable[[int, float], object],
        reloaded: Callable[[str, Verified | None], object],
    ) -> None:
        """Start its batches; in the event loop.

        Args:
            computed: see `Batcher`.
            reloaded: is told of every bundle that was looked at later, by the name; None: it was refused.
        """
        self.name, self._config, self._computed, self._reloaded = name, config, computed, reloaded
        self.refused: str | None = None
        """Why the bundle that is in the folder now does not serve; None: it does."""
        self._seen = verified.stamp
        self._take(verified)

    def _take(self, verified: Verified) -> None:
        batches, delay = self._config.batches, as_seconds(self._config.batches.max_delay)
        assert delay is not None
        batcher = Batcher(
            verified.backbone,
            max_batch=batches.max_batch,
            max_delay=delay,
            max_queue=batches.max_queue,
            computed=self._computed,
        )
        self.now = Serving(verified, batcher)

    async def watch(self, every: float) -> None:
        """Look at the folder for as long as the server runs."""
        folder = local(self._config.named[self.name])
        stamp = self._seen
        while True:
            await asyncio.sleep(every)
            before, stamp = stamp, await asyncio.to_thread(stamp_of, folder)
            if stamp != self._seen and (stamp or not before):  # between two renames there may be no folder
                await self._reload(stamp)

    async def _reload(self, stamp: Stamp) -> None:
        """Put what lies in the folder now in the place of what serves, if it is verified; requests go on meanwhile."""
        self._seen = stamp
        try:
            verified = await asyncio.to_thread(partial(open_verified, self._config, self.name))
        except (MaeDeployError, OSError) as error:
            self.refused = str(error)
            notice("refused:", f"{self.name} serves on as it was: {error}")
            self._reloaded(self.name, None)
            return
        before, self.refused, self._seen = self.now, None, verified.stamp
        self._take(verified)
        notice("reloaded:", f"{self.name} is revision {verified.revision} now")
        self._reloaded(self.name, verified)
        await before.close()

    def describe(self) -> dict[str, Any]:
        """What a client has to know of it, as plain values."""
        verified = self.now.verified
        bundle, engine = verified.backbone.bundle, verified.backbone.engine
        P, (H, W) = bundle.model["patch_size"], bundle.model["image_size"]
        return {
            "name": self.name,
            "revision": verified.revision,
            "since": verified.since,
            "refused": self.refused,
            "model": bundle.model["name"],
            "kind": bundle.manifest["kind"],
            "tokens": bundle.token_mode,
            "precision": bundle.precision,
            "engine": f"{engine.name} {engine.version}",
            "device": engine.device,
            "licence": bundle.licence,
            "image_size": [H, W],
            "grid": [H // P, W // P],
            "num_patches": bundle.num_patches,
            "keep_range": list(bundle.keep_range),
            "outputs": list(bundle.output_names),
            "classes": bundle.class_names,
            "preprocess": bundle.manifest["preprocess"],
            "max_batch": self.now.batcher.max_batch,
        }
