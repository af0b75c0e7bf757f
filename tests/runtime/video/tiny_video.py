"""Small videos that tests make, and a server that streams them."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import av
import numpy as np

from mae_deploy.images.read import Array

SIZE = (48, 64)
"""Height and width."""


def moving_square(index: int, size: tuple[int, int] = SIZE) -> Array:
    """A grey frame `(H, W, 3)` with a bright square that moves by two pixels a frame."""
    height, width = size
    y, x = np.mgrid[:height, :width]
    frame = np.repeat((40 + y + x)[:, :, None], 3, axis=2).astype(np.uint8)
    left = 2 * index % (width - 16)
    frame[8:24, left : left + 16] = (220, 120, 60)
    return frame


def write_video(path: Path, frames: list[Array], *, rate: int = 10, codec: str = "mpeg4", keys: int = 12) -> Path:
    """Encode frames, a key frame at every `keys`-th."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "rgb24" if codec == "png" else "yuv420p"
        stream.codec_context.gop_size = keys
        stream.bit_rate = 4_000_000
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


@contextmanager
def silent(content: bytes) -> Iterator[str]:
    """A server that sends the content and then nothing more, and leaves the connection open; yields its URL."""
    connections: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with contextlib.suppress(OSError):  # the server was closed
                while True:
                    connection, _ = server.accept()
                    connection.recv(4096)
                    connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + content)
                    connections.append(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.getsockname()[1]}/camera.ts"
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()
            for connection in connections:
                connection.close()


@contextmanager
def served(*contents: bytes | None) -> Iterator[tuple[str, list[int]]]:
    """A server that answers the first request with the first content, and so on, the last one again and again; None is
    a refusal. Yields its URL and the list of the answers so far.
    """
    asked: list[int] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = contents[min(len(asked), len(contents) - 1)]
            asked.append(200 if content else 503)
            self.send_response(asked[-1])
            self.end_headers()
            if content:
                self.wfile.write(content)

        def log_message(self, format: str, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/camera.ts", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
