"""How `mae-deploy serve` stands load and abuse: a server and its clients on 127.0.0.1.

    python -m scripts.measure_serve [--seconds 4]

Prints the tables of docs/results/serve.md, all of them; quicker with fewer --seconds of each load.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import io
import itertools
import multiprocessing
import os
import re
import socket
import struct
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

from mae_deploy.cli import main as run_command
from mae_deploy.machine import cpu_name, granted_cores
from mae_deploy.runtime.backbone import Backbone

SLEEP = 0.1
"""Seconds that a run of the slow engine takes more, for 32 images as for one."""

DELAY = 0.005
"""The default of --max-delay, in seconds."""

REQUESTS, POINTS = 2000, 5
"""Of the memory's table."""

TIMEOUT = "5s"
MEGABYTE = bytes(1_000_000)


@dataclass(frozen=True, slots=True)
class Reply:
    """What a client saw of one request."""

    status: int
    seconds: float
    stages: dict[str, float]
    """Server-Timing, in seconds."""


def serve(arguments: list[str], sleeps: bool) -> None:
    """In a process of its own, which prints nothing between the tables."""
    if sleeps:
        plain = Backbone.run_cropped

        def slow(self: Backbone, *given: object, **named: object) -> object:
            time.sleep(SLEEP)
            return plain(self, *given, **named)  # type: ignore[arg-type]

        Backbone.run_cropped = slow  # type: ignore[assignment,method-assign]
    with open(os.devnull, "w") as nothing, redirect_stdout(nothing):
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
        while not _answers(port):
            assert process.is_alive(), "the server ended"
            time.sleep(0.1)
        assert process.pid is not None
        yield port, process.pid
    finally:
        process.terminate()
        process.join(60)


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


async def ask(port: int, body: bytes) -> Reply:
    """One request on a connection of its own."""
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = "POST /v1/models/bundle/embed HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: "
    writer.write(f"{head}{len(body)}\r\n\r\n".encode() + body)
    answer = await reader.read()
    writer.close()
    seconds = time.perf_counter() - started
    stages = {name.decode(): float(ms) / 1000 for name, ms in re.findall(rb"(\w+);dur=([\d.]+)", answer)}
    return Reply(int(answer.split(b" ", 2)[1]), seconds, stages)


async def closed_loop(port: int, body: bytes, clients: int, seconds: float) -> list[Reply]:
    """Clients that each ask again as soon as they have an answer."""
    found: list[Reply] = []
    end = time.perf_counter() + seconds

    async def client() -> None:
        while time.perf_counter() < end:
            found.append(await ask(port, body))

    await asyncio.gather(*(client() for _ in range(clients)))
    return found


async def open_loop(port: int, body: bytes, rate: float, seconds: float) -> list[Reply]:
    """So many requests a second, at random times, whether the earlier ones are answered or not."""
    rng, tasks = np.random.default_rng(0), []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        tasks.append(asyncio.create_task(ask(port, body)))
        await asyncio.sleep(rng.exponential(1 / rate))
    return list(await asyncio.gather(*tasks))


def load(bundle: Path, seconds: float) -> None:
    """Throughput with batches and without; then the latency at half of that rate."""
    print("| 100 clients at once | images/s | p50 | p99 | ms of a core, each | not 200 |\n|---|---|---|---|---|---|")
    halves = []
    for sleeps in (False, True):
        name = f"an engine that takes {1000 * SLEEP:.0f} ms more a run" if sleeps else "the small ViT"
        rates = {}
        for largest in (1, 32):
            with server(bundle, "--max-batch", str(largest), sleeps=sleeps) as (port, pid):
                asyncio.run(closed_loop(port, photo(), 32, 1))
                started, cpu = time.perf_counter(), processor_seconds(pid)
                found = asyncio.run(closed_loop(port, photo(), 100, seconds))
                rates[largest] = len(found) / (time.perf_counter() - started)
                cpu = (processor_seconds(pid) - cpu) / len(found)
                p50, p99 = percentiles(reply.seconds for reply in found)
                row = f"| {name}, `--max-batch {largest}` | {rates[largest]:.0f} | {ms(p50)} | {ms(p99)}"
                print(f"{row} | {1000 * cpu:.1f} | {refused(found)} |", flush=True)
                if largest == 32:
                    half = rates[largest] / 2
                    halves.append((name, half, asyncio.run(open_loop(port, photo(), half, 2 * seconds))))
        print(f"| … the gain by batches | {rates[32] / rates[1]:.1f} × | | | | |")
    print("\n| at half of that rate, arriving at random | p50 | p99 | bound | not 200 |\n|---|---|---|---|---|")
    for name, rate, found in halves:
        p50, p99 = percentiles(reply.seconds for reply in found)
        _, batch = percentiles(reply.stages["engine"] for reply in found if reply.stages)
        _, decode = percentiles(reply.stages["decode"] for reply in found if reply.stages)
        bound = ms(DELAY + 2 * batch + decode)
        print(f"| {name}, {rate:.0f} images/s | {ms(p50)} | {ms(p99)} | {bound} | {refused(found)} |")


def engine(bundle: Path) -> None:
    """What batches are worth to the engine itself."""
    print("| the engine alone | images/s | a batch |\n|---|---|---|")
    with Backbone.load(bundle) as backbone:
        height, width = backbone.preprocess.image_size
        for size in (1, 32):
            pixels = np.zeros((size, height, width, backbone.preprocess.channels), backbone.preprocess.dtype)
            times = []
            for _ in range(7):
                started = time.perf_counter()
                backbone.run_cropped(pixels)
                times.append(time.perf_counter() - started)
            seconds = float(np.median(times))
            print(f"| batches of {size} | {size / seconds:.0f} | {ms(seconds)} |")


def post(port: int, body: object, headers: dict[str, str] | None = None) -> str:
    """The answer's status and what it says."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("POST", "/v1/models/bundle/embed", body, headers or {})  # type: ignore[arg-type]
        answer = connection.getresponse()
        return f"{answer.status} {answer.read().decode()[:100] if answer.status != 200 else ''}".strip()
    except ConnectionError:
        return "closed before all was sent"
    finally:
        connection.close()


def abuse(bundle: Path) -> None:
    """Each kind of bad request, its answer, and the server's memory after it."""
    print("| request | answer | memory after it |\n|---|---|---|")
    with server(bundle, "--timeout", TIMEOUT) as (port, pid):

        def row(what: str, said: str) -> None:
            print(f"| {what} | {said} | {memory(pid):.0f} MB |", flush=True)

        row("none yet", "")
        row("a PNG of 100 megapixels", post(port, picture(10_000)))
        row("a PNG that claims 60,000 x 60,000 pixels in a kilobyte", post(port, bomb()))
        row("a text file", post(port, b"hello\n" * 1000))
        announced = {"Content-Length": "2000000000"}
        row("2 GB, announced by Content-Length", post(port, itertools.repeat(MEGABYTE, 2000), announced))
        row("2 GB, in chunks", post(port, itertools.repeat(MEGABYTE, 2000)))
        half = b"POST /v1/models/bundle/embed HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n" + bytes(500_000)
        stopped = [socket.create_connection(("127.0.0.1", port)) for _ in range(50)]
        for one in stopped:
            one.sendall(half)
        said = stopped[0].recv(1000).split(b"\r\n")[0].decode().removeprefix("HTTP/1.1 ")
        row("50 clients that stop half-way, 0.5 MB each", said)
        for one in stopped:
            one.close()
        time.sleep(0.5)
        row("photos again", refused(asyncio.run(closed_loop(port, photo(), 4, 1))) + " that are not 200")


def level(bundle: Path) -> None:
    """Memory over many requests of all sizes, a third of which is refused, from four clients at once."""
    large, huge = photo(2048, 1536), picture(10_000)

    def request(number: int) -> str:
        kind = number % 10
        if kind == 9:
            return post(port, itertools.repeat(MEGABYTE, 25))
        return post(port, (photo(), large, huge, b"hello")[max(0, kind - 5)]).partition(" ")[0]

    print("| requests | memory | answers |\n|---|---|---|")
    with server(bundle) as (port, pid), ThreadPoolExecutor(4) as clients:
        print(f"| 0 | {memory(pid):.0f} MB | |")
        for point in range(POINTS):
            step = REQUESTS // POINTS
            found = Counter(said[:3] for said in clients.map(request, range(point * step, (point + 1) * step)))
            said = ", ".join(f"{count} × {status}" for status, count in sorted(found.items()))
            print(f"| {(point + 1) * step} | {memory(pid):.0f} MB | {said} |", flush=True)


def percentiles(seconds: Iterable[float]) -> tuple[float, float]:
    """The 50th and the 99th."""
    p50, p99 = np.percentile(list(seconds), (50, 99))
    return float(p50), float(p99)


def ms(seconds: float) -> str:
    """In milliseconds."""
    return f"{1000 * seconds:.0f} ms"


def refused(found: Sequence[Reply]) -> str:
    """How many requests had no result, by status."""
    statuses = Counter(reply.status for reply in found if reply.status != 200)
    return ", ".join(f"{count} × {status}" for status, count in sorted(statuses.items())) or "0"


def processor_seconds(pid: int) -> float:
    """What a process has computed: its own measure, whatever else the machine does."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory(pid: int) -> float:
    """Resident megabytes."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def photo(width: int = 320, height: int = 240) -> bytes:
    """A JPEG."""
    pixels = np.random.default_rng(0).integers(0, 256, (height // 16, width // 16, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG")
    return file.getvalue()


def picture(side: int) -> bytes:
    """A black PNG."""
    file = io.BytesIO()
    Image.new("RGB", (side, side)).save(file, "PNG", compress_level=1)
    return file.getvalue()


def bomb() -> bytes:
    """A PNG whose header claims more than there is."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    parts = (b"IHDR", header), (b"IDAT", zlib.compress(bytes(10**6))), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def export(folder: Path) -> Path:
    """The bundle of a small ViT with random weights: 64 patches, 192 wide, 4 blocks."""
    import torch  # here: the server's process, which reads this module too, has none

    from mae_deploy.checkpoint import Metadata, save_checkpoint
    from mae_deploy.config import to_dict
    from mae_deploy.export.config import ExportConfig
    from mae_deploy.export.run import run_export
    from mae_deploy.images.preprocess import default_preprocess
    from mae_deploy.models.config import EncoderConfig
    from mae_deploy.models.vit import Encoder

    torch.manual_seed(0)
    model = EncoderConfig(name="small", image_size=(128, 128), patch_size=16, embed_dim=192, depth=4, num_heads=3)
    preprocess = to_dict(default_preprocess(model.image_size))
    metadata = Metadata(kind="encoder", encoder=to_dict(model), preprocess=preprocess)
    save_checkpoint(folder / "checkpoint", Encoder(model).state_dict(), metadata)
    run_export(ExportConfig(checkpoint=folder / "checkpoint", out=folder / "bundle", tokens="visible"))
    return folder / "bundle"


def main() -> None:
    """Print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each load")
    given = parser.parse_args()
    machine = f"{granted_cores()} cores of {cpu_name()}, ONNX Runtime {onnxruntime.__version__}"
    print(f"{machine}, load {os.getloadavg()[0]:.1f}\n")
    with tempfile.TemporaryDirectory(prefix="mae-deploy-") as folder:
        bundle = export(Path(folder))
        engine(bundle)
        print()
        load(bundle, given.seconds)
        print()
        abuse(bundle)
        print()
        level(bundle)
    print(f"\nload {os.getloadavg()[0]:.1f} at the end")


if __name__ == "__main__":
    main()
