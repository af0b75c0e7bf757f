"""What a request brings: its body, read within the limits, and the images in it."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from mae_deploy.commands.serve.config import RequestLimits
from mae_deploy.text import as_seconds, as_size, parse_json

_LINGER, _SILENCE = 30.0, 2.0
"""Seconds for which what a client still sends is thrown away after it was refused, in all and without a byte (nginx's
lingering_time and lingering_timeout): one that reads the answer only when it has sent everything, as most libraries do,
would else find the connection reset, and no answer."""


class Refused(Exception):
    """A request that gets no result, and why."""

    def __init__(self, status: int, message: str, *, unread: bool = False) -> None:
        super().__init__(message)
        self.status = status
        self.unread = unread
        """Whether there is more of its body to come."""


class RefusedResponse(JSONResponse):
    """The answer to a request whose body is not read to its end."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.headers["connection"] = "close"
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(_throw_away(receive), _LINGER)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _throw_away(receive: Receive) -> None:
    more = True
    while more:
        message: Message = await asyncio.wait_for(receive(), _SILENCE)
        more = message.get("more_body", False)


@dataclass(frozen=True, slots=True)
class Item:
    """An image of a request: its name there, and the bytes of its file or where that is."""

    name: str
    content: bytes | Path

    def read(self) -> bytes:
        """The file."""
        return self.content if isinstance(self.content, bytes) else self.content.read_bytes()


class Uploads:
    """Reads requests within the limits, and knows how many bytes of them are held."""

    def __init__(self, limits: RequestLimits) -> None:
        self._limits, self.held = limits, 0
        timeout = as_seconds(limits.timeout)
        assert timeout is not None
        self._timeout = timeout

    @asynccontextmanager
    async def body(self, request: Request) -> AsyncIterator[bytes]:
        """The body, which counts as held within the context.

        Raises:
            Refused: it is too large, too slow or broken off, or too much is held.
        """
        limit, body, size = self._limits.max_bytes, bytearray(), 0
        announced = request.headers.get("content-length", "0")
        if not announced.isdigit() or int(announced) > limit:
            raise self._too_large(f"{announced} bytes")

        async def read() -> None:
            nonlocal size
            async for chunk in request.stream():
                body.extend(chunk)
                size += len(chunk)
                self.held += len(chunk)
                if size > limit:
                    raise self._too_large("the request")
                if self.held > self._limits.max_held:
                    raise Refused(503, f"requests of {as_size(self.held)} are being read already", unread=True)

        try:
            try:
                await asyncio.wait_for(read(), self._timeout)
            except asyncio.TimeoutError:
                message = f"the request has not arrived within {self._limits.timeout}: {size} bytes have"
                raise Refused(408, message, unread=True) from None
            except ClientDisconnect:
                raise Refused(400, f"the client went away after {size} bytes") from None
            content = bytes(body)
            body.clear()
            yield content
        finally:
            self.held -= size
            body.clear()  # at once: the error of a refused request holds it until the next collection

    def _too_large(self, what: str) -> Refused:
        return Refused(413, f"{what} is more than the {self._limits.max_bytes} of --max-bytes", unread=True)

    async def items(self, request: Request, body: bytes, *, most: int | None = None) -> list[Item]:
        """The images of a body, at most so many: one as it is, several of a form, or a list in JSON.

        Raises:
            Refused: none, too many, or a body that is not what its type says.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == "multipart/form-data":
            found = await self._of_form(request, body)
        elif kind == "application/json":
            found = self._of_list(body)
        else:
            found = [Item("image", body)] if body else []
        if not found:
            raise Refused(400, "there is no image in the request")
        if most is not None and len(found) > most:
            raise Refused(400, f"this takes {most} image, and the request has {len(found)}")
        if len(found) > self._limits.max_images:
            raise Refused(413, f"{len(found)} images are more than the {self._limits.max_images} of --max-images")
        return found

    async def _of_form(self, request: Request, body: bytes) -> list[Item]:
        async def once() -> AsyncGenerator[bytes, None]:
            yield body

        parser = MultiPartParser(request.headers, once(), max_files=self._limits.max_images + 1)
        parser.spool_max_size = self._limits.max_bytes  # in memory, where it is counted
        try:
            form = await parser.parse()
        except (MultiPartException, KeyError) as error:
            message = error.message if isinstance(error, MultiPartException) else f"no {error}"
            raise Refused(413 if "Too many" in message else 400, f"this is no form: {message}") from error
        files = [(name, value) for name, value in form.multi_items() if isinstance(value, UploadFile)]
        found = [Item(file.filename or name, await file.read()) for name, file in files]
        await form.close()
        return found

    def _of_list(self, body: bytes) -> list[Item]:
        try:
            given = parse_json(body)
        except ValueError as error:
            raise Refused(400, f"this is no JSON: {error}") from error
        lists = {name: given.get(name, []) for name in ("images", "paths")} if isinstance(given, dict) else {}
        texts = [text for values in lists.values() for text in (values if isinstance(values, list) else [None])]
        if not lists or set(given) - set(lists) or not all(isinstance(text, str) for text in texts):
            raise Refused(400, 'give {"images": ["files in base64", …]} or {"paths": ["of --images", …]}')
        return [
            *(Item(f"images[{place}]", _decoded(text, place)) for place, text in enumerate(lists["images"])),
            *(Item(text, self._path(text)) for text in lists["paths"]),
        ]

    def _path(self, name: str) -> Path:
        """A file below `--images`."""
        if self._limits.images is None:
            raise Refused(400, "this server reads no paths: it was started without --images")
        root = self._limits.images.resolve()
        path = root / name
        try:
            name.encode()  # an answer names it
            path = path.resolve()
            inside = path.is_relative_to(root) and path.is_file()
            large = inside and path.stat().st_size > self._limits.max_bytes
        except (OSError, ValueError, RuntimeError):  # a name that no file can have; a link to itself
            inside = large = False
        if not inside:
            raise Refused(404, f"there is no file {name[:200]} below --images")
        if large:
            raise Refused(413, f"{name} has more than the {self._limits.max_bytes} bytes of --max-bytes")
        return path


def _decoded(text: Any, place: int) -> bytes:
    try:
        return base64.b64decode(text.rpartition(",")[2], validate=True)  # a data URL, too
    except (binascii.Error, ValueError) as error:
        raise Refused(400, f"images[{place}] is not base64: {error}") from error
