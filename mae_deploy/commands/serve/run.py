"""`mae-deploy serve`: verify, listen, serve until a signal; torch-free."""

from __future__ import annotations

import signal
import socket
from typing import Any

from mae_deploy.commands.serve.config import ServeConfig
from mae_deploy.errors import ConfigError, import_optional
from mae_deploy.machine import set_malloc
from mae_deploy.progress import notice
from mae_deploy.results import Result
from mae_deploy.text import as_seconds

_NEEDS = ("fastapi", "uvicorn", "python_multipart", "prometheus_client")

_BACKLOG = 2048
"""Connections that wait to be accepted."""

_KEPT = 250_000
"""Bytes of the largest buffer that is kept when it is freed. By default glibc keeps bodies and pixels of up to 32 MB in
heaps of each thread: 166 to 188 MB after 1,000 requests of all sizes, against 107 MB with a bound and two heaps."""


def run_serve(config: ServeConfig) -> Result:
    """Verify the bundles, and answer requests until SIGTERM or Ctrl-C; those under way are answered first.

    Raises:
        CheckFailed: a bundle is not what was exported, or misses parity on this machine.
        ConfigError: no bundle, no keys, or an address that cannot be listened on.
        MissingDependency: the extra `serve`, or an engine's package or device.
    """
    for module in _NEEDS:
        import_optional(module, extra="serve")
    set_malloc(keeps=_KEPT, arenas=2)
    import uvicorn

    from mae_deploy.commands.serve.app import application
    from mae_deploy.commands.serve.metrics import Measured
    from mae_deploy.commands.serve.served import open_verified
    from mae_deploy.commands.serve.server import Server

    with listen(config) as listening:  # first: verifying takes longer than to find the port taken
        verified = {}
        for name in config.named:
            verified[name] = open_verified(config, name)
            backbone = verified[name].backbone
            notice("verified:", f"{name}, {backbone.bundle.precision} on {backbone.engine.name}")
        server = Server(config, verified, stopping=lambda: http.should_exit)
        http = uvicorn.Server(
            uvicorn.Config(
                Measured(application(server), server.metrics),
                log_config=None,
                access_log=False,
                lifespan="on",
                ws="none",
                backlog=_BACKLOG,
                server_header=False,
                timeout_graceful_shutdown=int(as_seconds(config.requests.timeout) or 0) + 1,
            )
        )
        listening.listen(_BACKLOG)  # from here on connections wait for it, and whoever reads the next line may connect
        host, port = listening.getsockname()[:2]
        notice("serving:", f"http://{f'[{host}]' if ':' in host else host}:{port}")
        if config.requests.api_keys is None and host not in ("127.0.0.1", "::1"):
            notice("open:", "whoever reaches this address may ask; --api-keys FILE changes that")
        # uvicorn stops at these, and sends them again when it has: to whom waits for it, that is no failure.
        before = {number: signal.signal(number, _stopped) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            http.run(sockets=[listening])
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    served = {name: model.now.verified.revision for name, model in server.models.items()}
    return Result({"served": served}, f"stopped; served {', '.join(served)}")


def _stopped(*_: Any) -> None:
    """What is left to do when the server has stopped: nothing."""


def listen(config: ServeConfig) -> socket.socket:
    """A socket at the address, on which nobody listens yet.

    Raises:
        ConfigError: there is no such address, or the port is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
        try:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
        except OSError:
            found.close()
            raise
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {config.host} port {config.port}: {error.strerror or error}",
            hint="another --host or --port",
        ) from error
    return found
