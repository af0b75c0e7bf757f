"""A server that is sent what no client would send answers each in one line, and goes on serving."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from unittest import mock

import pytest

from mae_deploy.commands.serve import uploads
from tests.commands.serve.serving import Client, serving, settings
from tests.hostile.pictures import BROKEN, HARMLESS
from tests.hostile.requests import requests, write_images
from tests.hostile.run import FIXTURES

# What a form holds that is refused half-way goes when it is collected; it is memory.
pytestmark = pytest.mark.filterwarnings("ignore:Exception ignored in. <function SpooledTemporaryFile")

ANSWERS = {400, 401, 404, 405, 408, 413, 415, 422}
"""What a request is told that gets no result; none of it is a fault of the server's."""


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    images = write_images(tmp_path_factory.mktemp("requests") / "images")
    bundles = [FIXTURES / "bundles" / name for name in ("full", "visible", "reconstruct")]
    limits = {"images": str(images), "timeout": "1s", "max_pixels": 1_000_000}
    with mock.patch.object(uploads, "_SILENCE", 0.1), serving(settings(*bundles, requests=limits)) as client:
        yield client


def sent(client: Client, content: bytes) -> bytes:
    """Everything that is answered."""
    with socket.create_connection(("127.0.0.1", client.port), timeout=20) as connection:
        with suppress(OSError):  # it was refused before all of it was sent
            connection.sendall(content)
        answer = b""
        with suppress(ConnectionResetError):
            while found := connection.recv(1 << 16):
                answer += found
        return answer


def test_requests(client: Client, tmp_path: Path) -> None:
    wrong = []
    for name, content in requests(tmp_path).items():
        started = time.monotonic()
        head, _, body = sent(client, content).partition(b"\r\n\r\n")
        status = int(head.split()[1]) if head else 0
        took = time.monotonic() - started
        if (fault := _fault(name, status, head, body)) or took > 5:
            wrong.append(f"{name}: {status}, {took:.1f} s, {fault}, {body[:200]!r}")
    assert not wrong, "\n".join(wrong)
    assert client.server.uploads.held == 0


def _fault(name: str, status: int, head: bytes, body: bytes) -> str | None:
    if name.startswith(HARMLESS):
        return None if status == 200 else "is whole"
    if status == 200:
        return "was taken" if name.startswith(BROKEN) else None
    if status not in ANSWERS:
        return "is no answer"
    if b"application/json" in head:
        message = str(json.JSONDecoder().raw_decode(body[body.index(b"{") :].decode())[0]["error"])
        if len(message) > 1000 or re.search(r"[\x00-\x1f\x7f]", message):
            return "is no line"
    return None
