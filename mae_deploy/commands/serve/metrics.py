"""What Prometheus scrapes: requests, the stages of an image's way, batches, queues and reloads."""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import (
    GC_COLLECTOR,
    PLATFORM_COLLECTOR,
    PROCESS_COLLECTOR,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
)
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        for collector in (PROCESS_COLLECTOR, PLATFORM_COLLECTOR, GC_COLLECTOR):
            self.registry.register(collector)
        registry = self.registry
        self.requests = Counter(
            "mae_deploy_requests", "Requests by route and status", ["route", "model", "status"], registry=registry
        )
        self.seconds = Histogram(
            "mae_deploy_request_seconds",
            "From a request's first byte to its answer's last",
            ["route", "model"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.stages = Histogram(
            "mae_deploy_stage_seconds",
            "Of an image: decode, queue, and engine, its batch",
            ["model", "stage"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.batches = Histogram(
            "mae_deploy_batch_images", "Images of a batch", ["model"], buckets=_SIZES, registry=registry
        )
        self.images = Counter("mae_deploy_images", "Images by result", ["model", "result"], registry=registry)
        self.reloads = Counter(
            "mae_deploy_reloads", "Bundles that were replaced in their folder", ["model", "result"], registry=registry
        )
        self._queued = Gauge("mae_deploy_queued_images", "Images that wait", ["model"], registry=registry)
        self._held = Gauge("mae_deploy_held_bytes", "Bytes of requests in memory", registry=registry)
        self._bundle = Gauge(
            "mae_deploy_bundle_info",
            "1 for the bundle that serves",
            ["model", "revision", "precision", "engine"],
            registry=registry,
        )

    def watch(self, name: str, queued: Callable[[], float]) -> None:
        """Ask this for a model's queue whenever it is scraped."""
        self._queued.labels(name).set_function(queued)

    def watch_held(self, held: Callable[[], float]) -> None:
        """Ask this for the bytes of requests."""
        self._held.set_function(held)

    def serves(self, name: str, revision: str, precision: str, engine: str) -> None:
        """Say which bundle serves under a name."""
        self._bundle.remove_by_labels({"model": name})
        self._bundle.labels(name, revision, precision, engine).set(1)


class Measured:
    """An application whose requests are counted and timed."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        started, status = time.monotonic(), 500

        async def sent(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._app(scope, receive, sent)
        finally:
            # What no route knows is one: paths and names that a client makes up would fill the memory.
            route = getattr(scope.get("route"), "path", "other")
            model = scope.get("state", {}).get("model", "")
            self._metrics.requests.labels(route, model, str(status)).inc()
            self._metrics.seconds.labels(route, model).observe(time.monotonic() - started)
