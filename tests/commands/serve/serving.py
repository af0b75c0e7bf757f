"""A server in a thread of the test's own process, and a client."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from mae_deploy.commands.serve.app import application
from mae_deploy.commands.serve.config import ServeConfig
from mae_deploy.commands.serve.metrics import Measured
from mae_deploy.commands.serve.run import listen
from mae_deploy.commands.serve.served import open_verified
from mae_deploy.commands.serve.server import Server
from mae_deploy.images.limits import pixels_at_most


@dataclass(frozen=True)
class Answer:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        message = self.json["error"]
        assert isinstance(message, str)
        return message


@dataclass(frozen=True)
class Client:
    port: int
    server: Server

    def get(self, path: str, **headers: str) -> Answer:
        return self.ask("GET", path, None, headers)

    def post(self, path: str, body: Any = b"", **headers: str) -> Answer:
        return self.ask("POST", f"/v1/models/{path}", body, {name.replace("_", "-"): v for name, v in headers.items()})

    def ask(self, method: str, path: str, body: Any, headers: dict[str, str]) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return Answer(answer.status, answer.headers, answer.read())
        finally:
            connection.close()


@contextmanager
def serving(config: ServeConfig) -> Iterator[Client]:
    with listen(config) as listening, pixels_at_most(config.requests.max_pixels):
        server = Server(config, {name: open_verified(config, name) for name in config.named})
        app = Measured(application(server), server.metrics)
        run = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=5))
        thread = threading.Thread(target=run.run, args=([listening],))
        thread.start()
        try:
            wait_for(lambda: run.started)
            yield Client(listening.getsockname()[1], server)
        finally:
            run.should_exit = True
            thread.join()


def wait_for(true: Callable[[], Any], seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.01)


def form(*files: tuple[str, bytes]) -> tuple[bytes, str]:
    """A form's body with these files, and its type."""
    parts = [
        f'--line\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n\r\n'.encode()
        + content
        + b"\r\n"
        for name, content in files
    ]
    return b"".join(parts) + b"--line--\r\n", "multipart/form-data; boundary=line"


def settings(*bundles: Path | str, **sections: Any) -> ServeConfig:
    from mae_deploy.config import from_dict

    values = {"bundles": [str(bundle) for bundle in bundles], "port": 0, "threads": 1, "reload": "0", **sections}
    return from_dict(ServeConfig, values)
