"""What a running server consists of: its bundles, what reads requests, and what computes their images."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from functools import partial

from mae_deploy.commands.serve.compute import Computer
from mae_deploy.commands.serve.config import ServeConfig, read_keys
from mae_deploy.commands.serve.metrics import Metrics
from mae_deploy.commands.serve.served import Served, Verified
from mae_deploy.commands.serve.uploads import Refused, Uploads
from mae_deploy.machine import granted_cores
from mae_deploy.text import as_seconds


class Server:
    """Bundles that serve, from `running` on."""

    def __init__(
        self,
        config: ServeConfig,
        verified: Mapping[str, Verified],
        *,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        """Args: stopping: whether it takes no more requests."""
        self.config, self.stopping = config, stopping
        self.models: dict[str, Served] = {}
        self.metrics = Metrics()
        self.uploads = Uploads(config.requests)
        self.metrics.watch_held(lambda: self.uploads.held)
        timeout = as_seconds(config.requests.timeout)
        assert timeout is not None
        self.timeout = timeout
        self._verified, self._keys = verified, list(map(_digest, read_keys(config.requests.api_keys)))
        self._decoders = ThreadPoolExecutor(granted_cores(), thread_name_prefix="decode")
        self.computer = Computer(self._decoders, self.metrics)

    def model(self, name: str) -> Served:
        """What serves under this name.

        Raises:
            Refused: nothing does.
        """
        if name not in self.models:
            raise Refused(404, f"no bundle is called {name[:100]}: there are {', '.join(self.models)}", unread=True)
        return self.models[name]

    def is_known(self, key: str) -> bool:
        """Whether a key is one of ours, or none is needed; compared in a time that tells nothing."""
        digest = _digest(key)
        return not self._keys or any(hmac.compare_digest(digest, known) for known in self._keys)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Serve within the context; at its end, what waits is computed."""
        for name, verified in self._verified.items():
            self.models[name] = Served(
                self.config, name, verified, computed=partial(self._computed, name), reloaded=self._reloaded
            )
            self._serves(name, verified)
            self.metrics.watch(name, lambda model=self.models[name]: model.now.batcher.queued)  # type: ignore[misc]
        every = as_seconds(self.config.reload)
        watches = [asyncio.create_task(model.watch(every)) for model in self.models.values() if every]
        try:
            yield
        finally:
            for watch in watches:
                watch.cancel()
                with suppress(asyncio.CancelledError):
                    await watch
            for model in self.models.values():
                await model.now.close()
            self._decoders.shutdown()

    def _computed(self, name: str, images: int, seconds: float) -> None:
        self.metrics.batches.labels(name).observe(images)

    def _reloaded(self, name: str, verified: Verified | None) -> None:
        self.metrics.reloads.labels(name, "refused" if verified is None else "verified").inc()
        if verified is not None:
            self._serves(name, verified)

    def _serves(self, name: str, verified: Verified) -> None:
        bundle, engine = verified.backbone.bundle, verified.backbone.engine
        self.metrics.serves(name, verified.revision, bundle.precision, f"{engine.name} {engine.version}")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
