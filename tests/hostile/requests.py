"""Requests to `serve` that mean harm, as they go over the wire, and odd ones that are to be answered."""

from __future__ import annotations

import base64
import io
import json
import os
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from tests.hostile.pictures import HARMLESS, PICTURES, png
from tests.hostile.rare_pictures import RARE_PICTURES

PREDICT, EMBED, RECONSTRUCT = (
    f"/v1/models/{name}/{task}"
    for name, task in (("full", "predict"), ("visible", "embed"), ("reconstruct", "reconstruct"))
)


def _png() -> bytes:
    written = io.BytesIO()
    Image.fromarray(np.zeros((25, 10, 3), np.uint8)).save(written, "PNG")
    return written.getvalue()


WHOLE = _png()


def write_images(folder: Path) -> Path:
    """What `--images` names: images, and what is in their place."""
    folder.mkdir()
    (folder / "a.png").write_bytes(WHOLE)
    (folder / "a name with spaces \N{SNOWMAN}.png").write_bytes(WHOLE)
    os.mkfifo(folder / "pipe.png")
    (folder / "device.png").symlink_to("/dev/zero")
    (folder / "outside.png").symlink_to("/etc/passwd")
    (folder / "self.png").symlink_to("self.png")
    with (folder / "sparse.png").open("wb") as file:
        file.truncate(1 << 40)
    return folder


def request(
    path: str, body: bytes = WHOLE, kind: str = "image/png", *more: str, method: str = "POST", length: object = None
) -> bytes:
    """A request as it is sent."""
    lines = [
        f"{method} {path} HTTP/1.1",
        "Host: a",
        "Connection: close",
        f"Content-Length: {len(body) if length is None else length}",
        *([f"Content-Type: {kind}"] if kind else []),
        *more,
    ]
    return "\r\n".join(lines).encode("latin-1", "replace") + b"\r\n\r\n" + body


def _json(value: object, **options: str) -> bytes:
    return request(PREDICT, value if isinstance(value, bytes) else json.dumps(value).encode(), "application/json")


def _form(content: bytes, boundary: str = "boundary=x") -> bytes:
    return request(PREDICT, content, f"multipart/form-data; {boundary}")


def _part(name: str, content: bytes = WHOLE, disposition: str | None = None, *more: str) -> bytes:
    said = disposition or f'form-data; name="image"; filename="{name}"'
    head = "\r\n".join(["--x", f"Content-Disposition: {said}", *more])
    return head.encode() + b"\r\n\r\n" + content + b"\r\n"


_TEXT = base64.b64encode(WHOLE).decode()
_END = b"--x--\r\n"
_FINE: dict[str, bytes] = {
    "an image": request(PREDICT),
    "an image of no type": request(PREDICT, kind=""),
    "an image of the wrong type": request(PREDICT, kind="text/plain"),
    "a type in capitals": request(PREDICT, json.dumps({"images": [_TEXT]}).encode(), "Application/JSON; charset=utf-8"),
    "JSON with a byte-order mark": _json(b"\xef\xbb\xbf" + json.dumps({"images": [_TEXT]}).encode()),
    "JSON in UTF-16": _json(json.dumps({"images": [_TEXT]}).encode("utf-16")),
    "JSON with line ends of Windows": _json(json.dumps({"images": [_TEXT]}, indent=1).replace("\n", "\r\n").encode()),
    "a data URL": _json({"images": [f"data:image/png;base64,{_TEXT}"]}),
    "a path": _json({"paths": ["a.png"]}),
    "a path with a name of its own": _json({"paths": ["a name with spaces \N{SNOWMAN}.png", "./a.png"]}),
    "a form": _form(_part("a.png") + _END),
    "a form with other fields": _form(_part("a.png") + _part("", b"text", 'form-data; name="note"') + _END),
    "a form whose file has no name": _form(_part("", disposition='form-data; name="image"; filename=""') + _END),
    "a form of a boundary in quotes": _form(_part("a.png") + _END, 'boundary="x"'),
    "a file of a name that leads out": _form(_part("../../etc/passwd") + _END),
    "a file of a name that speaks to the terminal": _form(_part("\x1b[2J\N{SNOWMAN}.png") + _END),
    "in chunks": request(PREDICT)
    .replace(b"Content-Length: %d" % len(WHOLE), b"Transfer-Encoding: chunked")
    .replace(WHOLE, b"%x\r\n%s\r\n0\r\n\r\n" % (len(WHOLE), WHOLE)),
    "some patches": request(f"{EMBED}?keep=0-8"),
    "a number of patches": request(f"{EMBED}?num_keep=9&seed=99999999999999999999"),
    "a reconstruction": request(RECONSTRUCT),
    "a path in other words": request("/v1/models/full/%70redict"),
    "a question more": request(f"{PREDICT}?unknown=1"),
    "many headers": request(PREDICT, WHOLE, "image/png", *[f"X-{number}: y" for number in range(80)]),
}

_HOSTILE: dict[str, bytes] = {
    "nothing": request(PREDICT, b""),
    "text": request(PREDICT, b"hello"),
    "a PNG of 65,535 x 65,535": request(PREDICT, png(65535, 65535, zlib.compress(bytes(1 << 16)))),
    "JSON that is none": _json(b"{"),
    "JSON of nothing": _json(b""),
    "JSON of NaN": _json(b'{"images": NaN}'),
    "JSON of a number": _json(b"5"),
    "JSON of a number of 10,000 digits": _json(b'{"images": [' + b"9" * 10_000 + b"]}"),
    "JSON that is deep": _json(b"[" * 100_000 + b"]" * 100_000),
    "JSON with a deep value": _json(b'{"images": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "JSON that is no text": _json(b'{"images": ["\xff\xfe"]}'),
    "JSON with something behind it": _json(json.dumps({"images": [_TEXT]}).encode() + b"x"),
    "JSON with a name twice": _json(b'{"images": [], "images": ["%s"]}' % _TEXT.encode()),
    "JSON with half a character": _json(b'{"paths": ["\\ud800"]}'),
    "JSON with a NUL": _json({"paths": ["a.png\0.png"]}),
    "JSON of another key": _json({"images": [_TEXT], "url": "file:///etc/passwd"}),
    "JSON of a list in a list": _json({"images": [[_TEXT]]}),
    "JSON of a mapping": _json({"images": {"0": _TEXT}}),
    "JSON of nothing in a list": _json({"images": [None]}),
    "JSON of 100,000 images": _json({"images": [""] * 100_000}),
    "base64 that is none": _json({"images": ["~~~"]}),
    "base64 of another alphabet": _json({"images": ["\N{SNOWMAN}" * 9]}),
    "base64 of nothing": _json({"images": [""]}),
    **{
        f"a path that is {path[:30]!r}": _json({"paths": [path]})
        for path in (
            *("", ".", "..", "/", "../requests", "/etc/passwd", "a.png/", "absent.png", "\\\\host\\share", "~", "*"),
            *("pipe.png", "device.png", "outside.png", "self.png", "sparse.png", "x" * 5000, "../" * 2000, "\x1b[2J"),
        )
    },
    "a form without a boundary": _form(_part("a.png") + _END, ""),
    "a form of an empty boundary": _form(_part("a.png") + _END, "boundary="),
    "a form of another boundary": _form(_part("a.png") + _END, "boundary=y"),
    "a form of a boundary of 10,000 letters": _form(_part("a.png") + _END, "boundary=" + "x" * 10_000),
    "a form of a boundary that is no ASCII": _form(_part("a.png") + _END, "boundary=\xe9"),
    "a form that is cut off": _form(_part("a.png")[:-30]),
    "a form without its end": _form(_part("a.png")),
    "a form of nothing": _form(b""),
    "a form of text alone": _form(_part("", b"text", 'form-data; name="image"') + _END),
    "a form of a charset that is not": _form(_part("a.png") + _END, "boundary=x; charset=none"),
    "a part without a name": _form(_part("", disposition="form-data") + _END),
    "a part without a disposition": _form(b"--x\r\nA: b\r\n\r\n" + WHOLE + b"\r\n" + _END),
    "a part of a header of 100 kB": _form(_part("a.png", WHOLE, None, "X: " + "y" * 100_000) + _END),
    "a part of 10,000 headers": _form(_part("a.png", WHOLE, None, *["X: y"] * 10_000) + _END),
    "a part of a name of 100 kB": _form(_part("a" * 100_000) + _END),
    "a part whose name is no text": _form(_part("a.png").replace(b"a.png", b"\xff\xfe\0.png") + _END),
    "1,000 parts": _form(_part("a.png", b"x") * 1000 + _END),
    "10,000 fields": _form(_part("", b"x", 'form-data; name="a"') * 10_000 + _END),
    "a length that is no number": request(PREDICT, length="x"),
    "a length below zero": request(PREDICT, length=-5),
    "a length of other digits": request(PREDICT, length="\xb2"),
    "a length of 10,000 digits": request(PREDICT, length="9" * 10_000),
    "a length of 1 TB": request(PREDICT, length=1 << 40),
    "two lengths": request(PREDICT, WHOLE, "image/png", "Content-Length: 5"),
    "a length and chunks": request(PREDICT, WHOLE, "image/png", "Transfer-Encoding: chunked"),
    "chunks that are none": request(PREDICT, b"zz\r\n").replace(b"Content-Length: 4", b"Transfer-Encoding: chunked"),
    "a compressed body": request(PREDICT, zlib.compress(WHOLE), "image/png", "Content-Encoding: deflate"),
    "a type of 60 kB": request(PREDICT, kind="image/" + "x" * 60_000),
    "a header of 60 kB": request(PREDICT, WHOLE, "image/png", "X: " + "y" * 60_000),
    "a header that is no text": request(PREDICT, WHOLE, "image/png", "X: \xff\xfe"),
    "a header with a line end": request(PREDICT, WHOLE, "image/png", "X: a\r\n b"),
    "a key that is no ASCII": request(PREDICT, WHOLE, "image/png", "Authorization: Bearer \xe9"),
    "a key of nothing": request(PREDICT, WHOLE, "image/png", "Authorization: "),
    "HTTP that is none": b"hello\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(60),
    "HTTP/9.9": request(PREDICT).replace(b"HTTP/1.1", b"HTTP/9.9"),
    "a method that is not": request(PREDICT, method="HARM"),
    "a path above": request("/v1/models/../../etc/passwd/predict"),
    "a path above, in other words": request("/v1/models/%2e%2e%2f%2e%2e%2fetc/predict"),
    "a name that is no text": request("/v1/models/%ff%fe/predict"),
    "a name with a line end": request("/v1/models/a%0d%0aX:%20y/predict"),
    "a name of 50 kB": request(f"/v1/models/{'x' * 50_000}/predict"),
    "a whole address": request("http://127.0.0.1:9/v1/models/full/predict"),
    **{
        f"patches {words[:30]!r}": request(f"{EMBED}?{words}")
        for words in (
            *("keep=", "keep=a", "keep=-1", "keep=0-", "keep=5-1", "keep=0-99999999999", "keep=0,0", "keep=1e1"),
            *("keep=" + "9" * 5000, "keep=" + ",".join(["0"] * 5000), "keep=%F0%9F%92%A5", "keep=%00", "keep=0.5"),
            *("num_keep=0", "num_keep=-1", "num_keep=nan", "num_keep=" + "9" * 5000, "num_keep=11", "num_keep=1.5"),
            *("seed=-1", "seed=x", "seed=" + "9" * 5000, "keep=0&num_keep=1", "num_keep=1&num_keep=2x"),
            *("outputs=absent", "outputs=,", "outputs=" + "x" * 5000, "outputs=%1b[2J", "format=xml", "format="),
        )
    },
    **{
        f"classes {words[:30]!r}": request(f"{PREDICT}?top_k={words}")
        for words in ("0", "-1", "x", "9" * 5000, "99999999999999999999", "1.5", "NaN", "%1b[2J")
    },
    "two images to reconstruct": request(
        RECONSTRUCT, json.dumps({"images": [_TEXT, _TEXT]}).encode(), "application/json"
    ),
    "patches of which none is hidden": request(f"{RECONSTRUCT}?num_keep=10"),
    "classes of what has none": request("/v1/models/visible/predict"),
    "a reconstruction of what has no decoder": request("/v1/models/full/reconstruct"),
}


def requests(folder: Path) -> dict[str, bytes]:
    """All of them, and every image file of a few megabytes."""
    found = {**{f"{HARMLESS}{name}": content for name, content in _FINE.items()}, **_HOSTILE}
    for name, write in {**PICTURES, **RARE_PICTURES}.items():
        if not any(word in name for word in ("bomb", "TB", "GB", "limit", "12,000", "pages", "link", "folder", "pipe")):
            path = write(folder)
            found[f"{name}, sent"] = request(PREDICT, path.read_bytes())
            path.unlink()
    return found
