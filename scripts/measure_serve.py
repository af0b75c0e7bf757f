"""How `mae-deploy serve` stands load and abuse: python -m scripts.measure_serve BUNDLE [--seconds 5]

A server and its clients on 127.0.0.1. Prints the tables of docs/results/serve.md.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import io
import multiprocessing
import os
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from mae_deploy.cli import main as run_command
from mae_deploy.runtime.backbone import Backbone

SLEEP = 0.1
"""Seconds of a run of an engine that takes as long for 32 images as for one."""


def serve(arguments: list[str], sleeps: bool) -> None:
    """In a process of its own."""
    if sleeps:
        plain = Backbone.run_cropped

        def slow(self: Backbone, *given: object, **named: object) -> object:
            time.sleep(SLEEP)
            return plain(self, *given, **named)  # type: ignore[arg-type]

        Backbone.run_cropped = slow  # type: ignore[assignment,method-assign]
    run_command(["serve", *arguments])


@contextmanager
def server(bundle: Path, *options: str, sleeps: bool = False) -> Iterator[tuple[int, int]]:
    """A running server's port and process."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    arguments = [f"bundle={bundle}", "--port", str(port), *options]
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(arguments, sleeps))
    process.start()
    try:
        for _ in range(600):
            time.sleep(0.1)
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                continue
        assert process.pid is not None
        yield port, process.pid
    finally:
        process.terminate()
        process.join(60)


async def ask(port: int, body: bytes) -> tuple[int, float]:
    """Status and seconds of one request on a connection of its own."""
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = "POST /v1/models/bundle/embed HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: "
    writer.write(f"{head}{len(body)}\r\n\r\n".encode() + body)
    answer = await reader.read()
    writer.close()
    return int(answer.split(b" ", 2)[1]), time.perf_counter() - started


async def closed_loop(port: int, body: bytes, clients: int, seconds: float) -> list[tuple[int, float]]:
    """Clients that each ask again as soon as they have an answer."""
    found: list[tuple[int, float]] = []
    end = time.perf_counter() + seconds

    async def client() -> None:
        while time.perf_counter() < end:
            found.append(await ask(port, body))

    await asyncio.gather(*(client() for _ in range(clients)))
    return found


async def open_loop(port: int, body: bytes, rate: float, seconds: float) -> list[tuple[int, float]]:
    """So many requests a second, at random times, whether the earlier ones are answered or not."""
    rng, tasks = np.random.default_rng(0), []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        tasks.append(asyncio.create_task(ask(port, body)))
        await asyncio.sleep(rng.exponential(1 / rate))
    return list(await asyncio.gather(*tasks))


def load(bundle: Path, body: bytes, seconds: float, *, sleeps: bool) -> None:
    """Throughput with batches and without, then the latency at half load."""
    rates = {}
    for largest in (1, 32):
        with server(bundle, "--max-batch", str(largest), sleeps=sleeps) as (port, pid):
            asyncio.run(closed_loop(port, body, 32, 1))
            started, cpu = time.perf_counter(), processor_seconds(pid)
            found = asyncio.run(closed_loop(port, body, 100, seconds))
            rates[largest] = len(found) / (time.perf_counter() - started)
            cpu = 1000 * (processor_seconds(pid) - cpu) / len(found)
            errors = sum(status != 200 for status, _ in found)
            said = f"{rates[largest]:.0f} images/s, {cpu:.1f} ms of a core each, {errors} errors"
            print(f"| 100 clients, --max-batch {largest} | {said} | |")
            if largest == 32:
                half = asyncio.run(open_loop(port, body, rates[largest] / 2, seconds))
                p50, p99 = (1000 * float(np.percentile([time for _, time in half], share)) for share in (50, 99))
                print(f"| {rates[largest] / 2:.0f} images/s, half of it | p50 {p50:.0f} ms, p99 {p99:.0f} ms | |")
    print(f"| batches of 32 against single images | {rates[32] / rates[1]:.1f} × | |")


def engine(bundle: Path) -> None:
    """What batches are worth to the engine itself."""
    with Backbone.load(bundle) as backbone:
        height, width = backbone.preprocess.image_size
        rate = {}
        for size in (1, 32):
            pixels = np.zeros((size, height, width, backbone.preprocess.channels), backbone.preprocess.dtype)
            times = []
            for _ in range(7):
                started = time.perf_counter()
                backbone.run_cropped(pixels)
                times.append(time.perf_counter() - started)
            rate[size] = size / float(np.median(times))
            print(
                f"| the engine alone, batch {size} | {rate[size]:.0f} images/s, {1000 * size / rate[size]:.0f} ms | |"
            )
        print(f"| its gain by batches | {rate[32] / rate[1]:.1f} × | |")


def processor_seconds(pid: int) -> float:
    """What a process has computed: its own measure, whatever else the machine does."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory(pid: int) -> float:
    """Resident megabytes."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def abuse(bundle: Path) -> None:
    """Each kind of bad request, its answer, and the server's memory after it."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10**6)))
    file = io.BytesIO()
    Image.new("RGB", (10_000, 10_000)).save(file, "PNG")
    with server(bundle, "--timeout", "5s") as (port, pid):

        def post(what: str, body: object, headers: dict[str, str] | None = None) -> None:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            try:
                connection.request("POST", "/v1/models/bundle/embed", body, headers or {})  # type: ignore[arg-type]
                answer = connection.getresponse()
                said = f"{answer.status} {answer.read().decode()[:90]}"
            except ConnectionError:
                said = "closed before all was sent"
            print(f"| {what} | {said} | {memory(pid):.0f} MB |", flush=True)
            connection.close()

        print(f"| before | | {memory(pid):.0f} MB |")
        megabyte = bytes(1_000_000)
        post("PNG of 100 megapixels", file.getvalue())
        post("a bomb: 60,000 x 60,000 in a kilobyte", bomb + chunk(b"IEND", b""))
        post("a text file", b"hello\n" * 1000)
        post("2 GB, announced", (megabyte for _ in range(2000)), {"Content-Length": "2000000000"})
        post("2 GB, in chunks", (megabyte for _ in range(2000)))
        half = b"POST /v1/models/bundle/embed HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n" + bytes(500_000)
        stopped = [socket.create_connection(("127.0.0.1", port)) for _ in range(50)]
        for one in stopped:
            one.sendall(half)
        said = stopped[0].recv(1000).split(b"\r\n")[0].decode().removeprefix("HTTP/1.1 ")
        print(f"| 50 clients that stop half-way | {said} | {memory(pid):.0f} MB |")
        for one in stopped:
            one.close()
        time.sleep(0.5)
        found = asyncio.run(closed_loop(port, photo(), 4, 1))
        print(f"| then photos | {sorted({status for status, _ in found})} | {memory(pid):.0f} MB |")


def photo() -> bytes:
    """A JPEG of 320 x 240."""
    pixels = np.random.default_rng(0).integers(0, 256, (15, 20, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((320, 240), Image.Resampling.BICUBIC).save(file, "JPEG")
    return file.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--seconds", type=float, default=5.0)
    given = parser.parse_args()
    print("## The engine and the server")
    engine(given.bundle)
    load(given.bundle, photo(), given.seconds, sleeps=False)
    print(f"## An engine whose run takes {1000 * SLEEP:.0f} ms more, whatever the batch")
    load(given.bundle, photo(), given.seconds, sleeps=True)
    print("## Bad requests")
    abuse(given.bundle)


if __name__ == "__main__":
    main()
