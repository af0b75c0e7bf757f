"""Image files that mean harm, or are not what they seem."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

Write = Callable[[Path], Path]
"""Writes an image below a folder; returns its path."""


def file_of(name: str, content: bytes | Callable[[], bytes]) -> Write:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content())
        return folder / name

    return write


def png(width: int, height: int, data: bytes = b"", *, depth: int = 8, colour: int = 2, more: bytes = b"") -> bytes:
    """A PNG of this header, whatever its data."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + more + png_chunk(b"IDAT", data) + png_chunk(b"IEND", b"")


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def saved(mode: str, kind: str, size: tuple[int, int] = (23, 31), **options: object) -> Callable[[], bytes]:
    def make() -> bytes:
        values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), np.uint8)
        image = Image.fromarray(values)
        if mode == "I;16":
            image = Image.fromarray(values[:, :, 0].astype(np.uint16) * 257)
        elif mode == "F":
            image = Image.fromarray(values[:, :, 0].astype(np.float32))
        else:
            image = image.convert(mode)
        written = io.BytesIO()
        image.save(written, kind, **options)
        return written.getvalue()

    return make


def _exif(orientation: int, more: bytes = b"") -> Callable[[], bytes]:
    def make() -> bytes:
        exif = Image.Exif()
        exif[274] = orientation
        return saved("RGB", "JPEG", exif=exif.tobytes() + more)()

    return make


def _raw_exif(content: bytes) -> Callable[[], bytes]:
    return lambda: saved("RGB", "JPEG", exif=b"Exif\0\0" + content)()


def _frames(kind: str) -> Callable[[], bytes]:
    def make() -> bytes:
        pictures = [Image.new("RGB", (20, 20), (shade, 0, 0)) for shade in range(0, 250, 5)]
        written = io.BytesIO()
        pictures[0].save(written, kind, save_all=True, append_images=pictures[1:])
        return written.getvalue()

    return make


def _cut(make: Callable[[], bytes], share: float) -> Callable[[], bytes]:
    return lambda: make()[: int(len(make()) * share)]


def zeros_deflated(mebibytes: int) -> bytes:
    packer = zlib.compressobj(9)
    return b"".join([packer.compress(bytes(1 << 20)) for _ in range(mebibytes)]) + packer.flush()


def _folder(folder: Path) -> Path:
    (folder / "a.png").mkdir()
    return folder / "a.png"


def _pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe.png")
    return folder / "pipe.png"


def _link(target: str) -> Write:
    def write(folder: Path) -> Path:
        (folder / "link.png").symlink_to(target)
        return folder / "link.png"

    return write


def _sparse(folder: Path) -> Path:
    with (folder / "sparse.jpg").open("wb") as file:
        file.write(saved("RGB", "JPEG")())
        file.truncate(1 << 40)
    return folder / "sparse.jpg"


def _npy(shape: str, data: bytes = b"", descr: str = "'|u1'") -> bytes:
    words = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    words += b" " * (-(len(words) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(words).to_bytes(2, "little") + words + data


def _tiff(width: int, height: int, strips: int = 1) -> bytes:
    """A TIFF that promises so many pixels."""
    entries = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, 1, 8),
        (259, 3, 1, 1),
        (262, 3, 1, 1),
        (273, 4, strips, 8),
        (277, 3, 1, 1),
        (278, 4, 1, height),
        (279, 4, strips, 16),
    ]
    body = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<I", 8) + body + struct.pack("<I", 8) + bytes(64)  # the next page is this one


_SVG = b"""<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY x SYSTEM "file:///etc/passwd">]>
<svg xmlns="http://www.w3.org/2000/svg" width="10" height="10"><image href="file:///etc/passwd"/>&x;</svg>"""
_EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%touch CANARY) (w) file\n%%EOF\n"
_XPM = b'/* XPM */\nstatic char *x[] = {"99999 99999 1 1", "a c #000000"};\n'

HARMLESS, BROKEN = "fine: ", "broken: "
"""How the names of those begin that are whole, and must be read, and of those that no reader may take."""

PICTURES: dict[str, Write] = {
    "PNG of 65,535 x 65,535": file_of("a.png", png(65535, 65535, zlib.compress(bytes(1 << 20)))),
    "PNG of 2^31 pixels wide": file_of("a.png", png(2**31 - 1, 1)),
    "PNG of no pixels": file_of("a.png", png(0, 0)),
    "PNG just below the limit": file_of("a.png", lambda: png(13_000, 13_000, zlib.compress(bytes(1 << 20)))),
    "PNG bomb of 1 GB in one chunk": file_of("a.png", lambda: png(64, 64, zeros_deflated(1024))),
    "PNG with a text bomb": file_of(
        "a.png",
        lambda: png(4, 4, zlib.compress(bytes(4 * 13)), more=png_chunk(b"zTXt", b"x\0\0" + zeros_deflated(512))),
    ),
    "PNG with a profile bomb": file_of(
        "a.png",
        lambda: png(4, 4, zlib.compress(bytes(4 * 13)), more=png_chunk(b"iCCP", b"x\0\0" + zeros_deflated(512))),
    ),
    "PNG with a chunk of 2 GB": file_of("a.png", png(4, 4)[:33] + struct.pack(">I", 2**31 - 1) + b"IDAT"),
    "PNG cut off": file_of("a.png", _cut(saved("RGB", "PNG"), 0.6)),
    "PNG without data": file_of("a.png", png(23, 31)),
    "JPEG cut off": file_of("a.jpg", _cut(saved("RGB", "JPEG"), 0.5)),
    "JPEG of 65,535 x 65,535": file_of(
        "a.jpg",
        lambda: saved("RGB", "JPEG")().replace(struct.pack(">HH", 31, 23), struct.pack(">HH", 65535, 65535), 1),
    ),
    "JPEG of one byte": file_of("a.jpg", b"\xff"),
    "WebP cut off": file_of("a.webp", _cut(saved("RGB", "WEBP"), 0.5)),
    "GIF cut off": file_of("a.gif", _cut(saved("RGB", "GIF"), 0.4)),
    "BMP of 2^31 rows": file_of(
        "a.bmp", b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, 9, -(2**31), 1, 24, 0, 0, 1, 1, 0, 0)
    ),
    "TIFF of 10^9 x 10^9": file_of("a.tif", _tiff(10**9, 10**9)),
    "TIFF whose pages run in a circle": file_of("a.tif", _tiff(8, 8)),
    "TIFF of 10^9 strips": file_of("a.tif", _tiff(8, 8, 10**9)),
    "TIFF of a header alone": file_of("a.tif", b"II*\0\xff\xff\xff\xff"),
    "PPM of 10^9 x 10^9": file_of("a.ppm", b"P6\n1000000000 1000000000\n255\n"),
    "PPM of 10^4 digits": file_of("a.ppm", b"P6\n" + b"9" * 10_000 + b" 1\n255\n"),
    "XPM of 99,999 x 99,999": file_of("a.xpm", _XPM),
    "ICO in a circle": file_of("a.ico", b"\0\0\1\0\xff\xff" + bytes(range(256)) * 4),
    "PSD of 30,000 x 30,000": file_of(
        "a.psd", b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 30000, 30000, 8, 3) + bytes(16)
    ),
    "SVG with an entity": file_of("a.svg", _SVG),
    "SVG by the name of PNG": file_of("a.png", _SVG),
    "EPS that runs": file_of("a.eps", _EPS),
    "EPS by the name of PNG": file_of("a.png", _EPS),
    "PDF by the name of JPEG": file_of("a.jpg", b"%PDF-1.4\n1 0 obj\n<<>>\nendobj\n"),
    "program by the name of PNG": file_of("a.png", b"\x7fELF" + bytes(200)),
    "empty": file_of("a.png", b""),
    "zeros": file_of("a.png", bytes(5000)),
    "text by the name of PNG": file_of("a.png", b"hello"),
    "web page by the name of JPEG": file_of("a.jpg", b"<!DOCTYPE html><html></html>"),
    "folder by the name of PNG": _folder,
    "pipe by the name of PNG": _pipe,
    "link to /dev/zero": _link("/dev/zero"),
    "link to itself": _link("link.png"),
    "link to nothing": _link("absent.png"),
    "NumPy of 10^12": file_of("a.npy", _npy("(10**6, 10**6, 3)")),
    "NumPy of 10^12, a number": file_of("a.npy", _npy("(1000000, 1000000, 3)", bytes(64))),
    "NumPy of objects": file_of("a.npy", _npy("(2, 2, 3)", b"\x80\x04cposix\nsystem\n.", "'|O'")),
    "NumPy of text": file_of("a.npy", _npy("(2, 2, 3)", bytes(48), "'<U1'")),
    "NumPy of NaN": file_of("a.npy", _npy("(2, 2, 3)", b"\0\0\xc0\x7f" * 12, "'<f4'")),
    "NumPy cut off": file_of("a.npy", _npy("(20, 20, 3)", bytes(7))),
    "NumPy of 60 dimensions": file_of("a.npy", _npy("(" + "1, " * 60 + ")", bytes(1))),
    "NumPy of a shape below zero": file_of("a.npy", _npy("(-2, 2, 3)", bytes(64))),
    "NumPy whose header is deep": file_of("a.npy", _npy("(" * 5000 + ")" * 5000)),
    "EXIF that ends within a tag": file_of("a.jpg", _raw_exif(b"II*\0\x08\0\0\0\xff\xff")),
    "EXIF in a circle": file_of("a.jpg", _raw_exif(b"II*\0\x08\0\0\0\1\0\x69\x87\4\0\1\0\0\0\x08\0\0\0\x08\0\0\0")),
    "EXIF with orientation 99": file_of("a.jpg", _exif(99)),
    **{
        f"{HARMLESS}{name}": file_of(f"a.{suffix}", make)
        for name, suffix, make in (
            ("EXIF with orientation 6", "jpg", _exif(6)),
            ("JPEG of CMYK", "jpg", saved("CMYK", "JPEG")),
            ("PNG of 16 bits", "png", saved("I;16", "PNG")),
            ("PNG with a palette", "png", saved("P", "PNG")),
            ("PNG of one bit", "png", saved("1", "PNG")),
            ("PNG of grey and alpha", "png", saved("LA", "PNG")),
            ("animated GIF", "gif", _frames("GIF")),
            ("animated PNG", "png", _frames("PNG")),
            ("animated WebP", "webp", _frames("WEBP")),
            ("JPEG by the name of PNG", "png", saved("RGB", "JPEG")),
            ("PNG of 1 x 1", "png", saved("RGB", "PNG", (1, 1))),
            ("PNG of 1 x 5,000", "png", saved("RGB", "PNG", (1, 5000))),
        )
    },
    "JPEG that is followed by 1 TB": _sparse,
}
