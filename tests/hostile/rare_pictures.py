"""Image files as cameras, scanners, browsers and editors write them seldom, and what can be wrong with those."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from PIL import Image

from tests.hostile.pictures import BROKEN, HARMLESS, Write, file_of, png, png_chunk, saved, zeros_deflated

_GREY = np.random.default_rng(1).integers(0, 256, (31, 23), np.uint8)
_COLOURS = np.random.default_rng(2).integers(0, 256, (31, 23, 3), np.uint8)


def _tiff(values: Any = _COLOURS, **options: Any) -> Callable[[], bytes]:
    def make() -> bytes:
        written = io.BytesIO()
        tifffile.imwrite(written, values, **options)
        return written.getvalue()

    return make


def _pages(*pages: Any) -> Callable[[], bytes]:
    def make() -> bytes:
        written = io.BytesIO()
        with tifffile.TiffWriter(written) as writer:
            for page in pages:
                writer.write(page, metadata=None)
        return written.getvalue()

    return make


def _pillow(image: Callable[[], Image.Image], kind: str, **options: Any) -> Callable[[], bytes]:
    def make() -> bytes:
        written = io.BytesIO()
        image().save(written, kind, **options)
        return written.getvalue()

    return make


def _grey(mode: str) -> Callable[[], Image.Image]:
    return lambda: Image.fromarray(_GREY).convert(mode)


def _colours(mode: str = "RGB") -> Callable[[], Image.Image]:
    return lambda: Image.fromarray(_COLOURS).convert(mode)


def _palette() -> Image.Image:
    image = Image.fromarray(_GREY % 4, "P")
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.info["transparency"] = bytes([0, 128, 255, 255])
    return image


def _profiled(profile: bytes) -> Callable[[], bytes]:
    return lambda: _pillow(_colours(), "JPEG", icc_profile=profile)()


def _ycck() -> bytes:
    """A CMYK JPEG whose Adobe marker says YCCK."""
    return saved("CMYK", "JPEG")().replace(b"Adobe\0\x64\0\0\0\0\0", b"Adobe\0\x64\0\0\0\0\2")


def _jpeg_segments(*segments: tuple[int, bytes]) -> bytes:
    data = saved("RGB", "JPEG")()
    more = b"".join(b"\xff" + bytes([mark]) + struct.pack(">H", len(body) + 2) + body for mark, body in segments)
    return data[:2] + more + data[2:]


def _gif_off_canvas(left: int, top: int, width: int, height: int) -> bytes:
    """A canvas of 20 x 20, and a frame that lies beyond it."""
    pixels = b"\x08\xff\x00\x01\x04\x08\x04\x04\x00"
    return (
        b"GIF89a"
        + struct.pack("<HHBBB", 20, 20, 0x80, 0, 0)
        + b"\0\0\0\xff\xff\xff"
        + b"\x2c"
        + struct.pack("<HHHHB", left, top, width, height, 0)
        + b"\x02"
        + bytes([len(pixels)])
        + pixels
        + b"\0;"
    )


def _png_of(*chunks: tuple[bytes, bytes], depth: int = 8, colour: int = 2, channels: int = 3) -> bytes:
    rows = b"".join(b"\0" + bytes(_COLOURS[row, :, :channels].tobytes()) for row in range(31))
    more = b"".join(png_chunk(kind, body) for kind, body in chunks)
    return png(23, 31, zlib.compress(rows), depth=depth, colour=colour, more=more)


def _interlaced() -> bytes:
    """Adam7, of which Pillow reads all passes; here of one pixel."""
    header = struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 1)
    data = png_chunk(b"IDAT", zlib.compress(b"\0\1\2\3"))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + data + png_chunk(b"IEND", b"")


def _chunk_of_4_gb() -> bytes:
    whole = _png_of()
    return whole[:33] + struct.pack(">I", 2**32 - 1) + b"tEXt" + whole[33:]


def _apng_of_frames(number: int, width: int = 23) -> bytes:
    """An animation that promises so many frames of this width, and has one."""
    control = struct.pack(">II", number, 0)
    frame = struct.pack(">IIIIIHHBB", 0, width, 31, 0, 0, 1, 10, 0, 0)
    return _png_of((b"acTL", control), (b"fcTL", frame))


def _mpo() -> bytes:
    written = io.BytesIO()
    _colours()().save(written, "MPO", save_all=True, append_images=[_colours()()])
    return written.getvalue()


def _sparse_array(folder: Path) -> Path:
    """100,000 x 100,000 pixels, all there, in a file that takes no place."""
    words = b"{'descr': '|u1', 'fortran_order': False, 'shape': (100000, 100000), }"
    words += b" " * (-(len(words) + 11) % 64) + b"\n"
    with (folder / "a.npy").open("wb") as file:
        file.write(b"\x93NUMPY\x01\x00" + len(words).to_bytes(2, "little") + words)
        file.truncate(file.tell() + 10**10)
    return folder / "a.npy"


def _array(values: Any, version: tuple[int, int] | None = None) -> Callable[[], bytes]:
    def make() -> bytes:
        written = io.BytesIO()
        np.lib.format.write_array(written, values, version=version)
        return written.getvalue()

    return make


def _ome(folder: Path) -> Path:
    """A series whose second page is said to lie in another file."""
    tifffile.imwrite(folder / "outside.tif", np.full((31, 23), 7, np.uint8))
    (folder / "inner").mkdir()
    words = (
        '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="urn:uuid:1"><Image'
        ' ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint8" SizeX="23" SizeY="31" SizeC="1"'
        ' SizeZ="3" SizeT="1"><TiffData IFD="0" FirstZ="0"><UUID FileName="a.ome.tif">urn:uuid:1</UUID></TiffData>'
        '<TiffData IFD="0" FirstZ="1"><UUID FileName="../outside.tif">urn:uuid:2</UUID></TiffData>'
        '<TiffData IFD="0" FirstZ="2"><UUID FileName="/dev/zero">urn:uuid:3</UUID></TiffData></Pixels></Image></OME>'
    )
    tifffile.imwrite(folder / "inner/a.ome.tif", _GREY, description=words, metadata=None)
    return folder / "inner/a.ome.tif"


def _imagej(images: int) -> Callable[[], bytes]:
    return lambda: _tiff(_GREY, description=f"ImageJ=1.53\nimages={images}\nslices={images}\n", metadata=None)()


def _changed(make: Callable[[], bytes], old: bytes, new: bytes) -> Callable[[], bytes]:
    def change() -> bytes:
        data = make()
        assert old in data
        return data.replace(old, new)

    return change


def _tagged(make: Callable[[], bytes], code: int, value: int) -> Callable[[], bytes]:
    """A TIFF with another value of a tag."""

    def change() -> bytes:
        data = make()
        place = next(
            place
            for place in range(len(data))
            if data[place : place + 2] == struct.pack("<H", code) and data[place + 2] in (3, 4)
        )
        return data[:place] + struct.pack("<HHII", code, 4, 1, value) + data[place + 12 :]

    return change


def _icon() -> bytes:
    return _pillow(lambda: Image.fromarray(_COLOURS).resize((32, 32)), "ICO", sizes=[(16, 16), (32, 32)])()


_FINE: dict[str, tuple[str, Callable[[], bytes]]] = {
    "JPEG of YCCK": ("a.jpg", _ycck),
    "progressive JPEG": ("a.jpg", _pillow(_colours(), "JPEG", progressive=True)),
    "JPEG in grey": ("a.jpg", _pillow(_grey("L"), "JPEG")),
    "JPEG with restart markers": ("a.jpg", _pillow(_colours(), "JPEG", restart_marker_rows=1)),
    "JPEG of 4:4:4": ("a.JPG", _pillow(_colours(), "JPEG", subsampling=0)),
    "JPEG with a comment of NUL": ("a.jpg", _pillow(_colours(), "JPEG", comment=b"\0\x1b[2J")),
    "JPEG with a profile that is none": ("a.jpg", _profiled(b"no profile")),
    "JPEG with a profile of 1 MB": ("a.jpg", _profiled(bytes(1 << 20))),
    "JPEG with XMP that is none": ("a.jpg", lambda: _jpeg_segments((0xE1, b"http://ns.adobe.com/xap/1.0/\0<x"))),
    "JPEG with XMP that is an entity bomb": (
        "a.jpg",
        lambda: _jpeg_segments(
            (0xE1, b'http://ns.adobe.com/xap/1.0/\0<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]><x>&b;</x>')
        ),
    ),
    "JPEG with 1,000 empty segments": ("a.jpg", lambda: _jpeg_segments(*[(0xED, b"")] * 1000)),
    "JPEG with bytes behind it": ("a.jpg", lambda: saved("RGB", "JPEG")() + b"\0" * 999),
    "phone's photo with a second picture": ("a.jpg", _mpo),
    "MPO by its name": ("a.mpo", _mpo),
    "PNG with a palette and alpha": ("a.png", _pillow(_palette, "PNG")),
    "PNG of 2 bits": ("a.png", _pillow(lambda: Image.fromarray(_GREY % 4, "P"), "PNG", bits=2)),
    "PNG of 16-bit colours": (
        "a.png",
        lambda: png(2, 1, zlib.compress(b"\0" + bytes(range(12))), depth=16, colour=2),
    ),
    "PNG of 16-bit grey and alpha": (
        "a.png",
        lambda: png(2, 1, zlib.compress(b"\0" + bytes(range(8))), depth=16, colour=4),
    ),
    "PNG whose rows are interlaced": ("a.png", _interlaced),
    "PNG with gamma of 0": ("a.png", lambda: _png_of((b"gAMA", bytes(4)))),
    "PNG with a transparent colour": ("a.png", lambda: _png_of((b"tRNS", bytes(6)))),
    "PNG with text that is no Latin-1": ("a.png", lambda: _png_of((b"tEXt", b"x\0\xff\xfe\x1b[2J"))),
    "PNG with a chunk of its own": ("a.png", lambda: _png_of((b"abCd", b"x" * 100))),
    "PNG with EXIF in a circle": (
        "a.png",
        lambda: _png_of((b"eXIf", b"II*\0\x08\0\0\0\1\0\x69\x87\4\0\1\0\0\0\x08\0\0\0\x08\0\0\0")),
    ),
    "PNG with bytes behind it": ("a.png", lambda: _png_of() + b"garbage" * 99),
    "animation that promises 10^9 frames": ("a.png", lambda: _apng_of_frames(10**9)),
    "WebP without loss and with alpha": ("a.webp", _pillow(_colours("RGBA"), "WEBP", lossless=True)),
    "AVIF": ("a.avif", _pillow(_colours(), "AVIF")),
    "JPEG 2000": ("a.jp2", _pillow(_colours(), "JPEG2000")),
    "BMP of 1 bit": ("a.bmp", _pillow(_grey("1"), "BMP")),
    "BMP with a palette": ("a.bmp", _pillow(_grey("P"), "BMP")),
    "icon of several sizes": ("a.ico", _icon),
    "TGA": ("a.tga", _pillow(_colours(), "TGA", compression="tga_rle")),
    "PGM of 16 bits": ("a.pgm", lambda: b"P5 # note\n2 2\n65535\n" + bytes(range(8))),
    "PGM of a maximum of 100": ("a.pgm", lambda: b"P5\n2 2\n100\n" + bytes(range(4))),
    "plain PPM": ("a.ppm", lambda: b"P3\n2 1\n255\n1 2 3\n4 5 6\n"),
    "PBM": ("a.pbm", lambda: b"P4\n9 2\n" + bytes(4)),
    "QOI": ("a.qoi", _pillow(_colours(), "QOI")),
    "DDS": ("a.dds", _pillow(_colours("RGBA"), "DDS")),
    "TIFF in tiles": ("a.tif", _tiff(tile=(16, 16))),
    "BigTIFF": ("a.tif", _tiff(bigtiff=True)),
    "TIFF of Motorola's order": ("a.tiff", _tiff(byteorder=">")),
    "TIFF in planes": ("a.tif", _tiff(np.moveaxis(_COLOURS, 2, 0).copy(), photometric="rgb", planarconfig="separate")),
    "TIFF compressed": ("a.tif", _tiff(compression="zlib", predictor=True)),
    "TIFF of LZW": ("a.tif", _pillow(_colours(), "TIFF", compression="tiff_lzw")),
    "TIFF of JPEG": ("a.tif", _pillow(_colours(), "TIFF", compression="jpeg")),
    "TIFF of a fax": ("a.tif", _pillow(_grey("1"), "TIFF", compression="group4")),
    "TIFF of 1 bit": ("a.tif", _pillow(_grey("1"), "TIFF")),
    "TIFF of pages of one size": ("a.tif", _pages(*[_COLOURS] * 3)),
    "TIFF of pages of other sizes": ("a.tif", _pages(_COLOURS, _COLOURS[:9, :9].copy())),
    "TIFF with alpha": ("a.tif", _pillow(_colours("RGBA"), "TIFF")),
    "TIFF of CMYK": ("a.tif", _pillow(_colours("CMYK"), "TIFF")),
    "TIFF with a palette": ("a.tif", _pillow(_grey("P"), "TIFF")),
    "NumPy in Fortran's order": ("a.npy", _array(np.asfortranarray(_COLOURS))),
    "NumPy of version 2": ("a.npy", _array(_COLOURS, (2, 0))),
    "NumPy of version 3": ("a.npy", _array(_COLOURS, (3, 0))),
    "NumPy of bytes behind it": ("a.npy", lambda: _array(_COLOURS)() + b"x"),
}

_BROKEN: dict[str, tuple[str, Callable[[], bytes]]] = {
    "PNG with a chunk of 4 GB": ("a.png", _chunk_of_4_gb),
    "PNG of 3 bits": ("a.png", lambda: _png_of(depth=3)),
    "PNG of a colour that is not": ("a.png", lambda: _png_of(colour=5)),
    "PNG of a filter that is not": ("a.png", lambda: png(2, 1, zlib.compress(b"\x09" + bytes(6)))),
    "PNG of a palette without its colours": ("a.png", lambda: png(2, 1, zlib.compress(b"\0\0\1"), colour=3)),
    "PNG whose header comes twice": (
        "a.png",
        lambda: _png_of((b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))),
    ),
    "PNG with a wrong sum": (
        "a.png",
        lambda: _png_of().replace(b"IEND\xaeB", b"IEND\xaeC").replace(b"IDATx", b"IDATy"),
    ),
    "PNG of 16 bits of 12,000 x 12,000": (
        "a.png",
        lambda: png(12_000, 12_000, zeros_deflated(820), depth=16, colour=2),
    ),
    "animation whose frame is 2^31 wide": ("a.png", lambda: _apng_of_frames(2, 2**31 - 1)),
    "GIF off its canvas": ("a.gif", lambda: _gif_off_canvas(50, 50, 4, 4)),
    "GIF of 65,535 beside its canvas": ("a.gif", lambda: _gif_off_canvas(65535, 65535, 65535, 65535)),
    "GIF of no pixels": ("a.gif", lambda: _gif_off_canvas(0, 0, 0, 0)),
    "JPEG of 2 components": ("a.jpg", _changed(saved("RGB", "JPEG"), b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x0e\x08")),
    "JPEG of 12 bits": ("a.jpg", _changed(saved("RGB", "JPEG"), b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c")),
    "WebP of a size that lies": ("a.webp", lambda: saved("RGB", "WEBP")().replace(b"RIFF", b"RIFF\xff\xff\xff\xff", 1)),
    "AVIF cut off": ("a.avif", lambda: _pillow(_colours(), "AVIF")()[:200]),
    "JPEG 2000 cut off": ("a.jp2", lambda: _pillow(_colours(), "JPEG2000")()[:150]),
    "icon within an icon": ("a.ico", lambda: b"\0\0\1\0\1\0\x10\x10\0\0\1\0\x20\0\xff\0\0\0\x16\0\0\0" + _icon()),
    "PGM of no maximum": ("a.pgm", lambda: b"P5\n2 2\n0\n" + bytes(4)),
    "PGM of 16 bits, cut off": ("a.pgm", lambda: b"P5\n20 20\n65535\n" + bytes(9)),
    "PPM of 60,000 x 60,000 of 16 bits": ("a.ppm", lambda: b"P6\n60000 60000\n65535\n" + bytes(9)),
    "plain PPM of text": ("a.ppm", lambda: b"P3\n2 1\n255\na b c d e f\n"),
    "TIFF whose strip lies beyond its end": ("a.tif", _tagged(_tiff(), 273, 10**9)),
    "TIFF of strips of 4 GB": ("a.tif", _tagged(_tiff(compression="zlib"), 279, 2**32 - 1)),
    "TIFF of a compression that is not": ("a.tif", _tagged(_tiff(), 259, 9999)),
    "TIFF of tiles of 2^31": ("a.tif", _tagged(_tiff(tile=(16, 16)), 322, 2**31 - 16)),
    "TIFF of 64-bit floats that are NaN": ("a.tif", _tiff(np.full((9, 9), np.nan))),
    "TIFF of complex numbers": ("a.tif", _tiff(np.ones((9, 9), np.complex64))),
    "TIFF of half floats": ("a.tif", _tiff(np.ones((9, 9), np.float16))),
    "NumPy of no dimensions": ("a.npy", _array(np.array(5, np.uint8))),
    "NumPy of no pixels": ("a.npy", _array(np.zeros((0, 5, 3), np.uint8))),
    "NumPy of the other byte order": ("a.npy", _array(_COLOURS.astype(">u2"))),
    "NumPy of records": ("a.npy", _array(np.zeros((4, 4), [("r", "u1"), ("g", "u1")]))),
    "NumPy of dates": ("a.npy", _array(np.zeros((4, 4), "M8[s]"))),
    "NumPy of long floats": ("a.npy", _array(np.zeros((4, 4, 3), np.longdouble))),
    "NumPy archive by the name of an array": ("a.npy", lambda: _archive()),
    "JPEG without its end": ("a.jpg", lambda: saved("RGB", "JPEG")()[:-2]),
    "NumPy of grey": ("a.npy", _array(_GREY)),
}

_ODD: dict[str, tuple[str, Callable[[], bytes]]] = {
    "PNG with fewer rows than it says": ("a.png", lambda: png(23, 31, zlib.compress(bytes(70 * 9)))),
    "animation of no frames": ("a.png", lambda: _apng_of_frames(0)),
    "JPEG without tables": ("a.jpg", _changed(saved("RGB", "JPEG"), b"\xff\xc4", b"\xff\xed")),
    "JPEG of arithmetic coding": ("a.jpg", _changed(saved("RGB", "JPEG"), b"\xff\xc0", b"\xff\xc9")),
    "TIFF of 10,000 pages": ("a.tif", _pages(*[np.zeros((2, 2), np.uint8)] * 10_000)),
    "TIFF of ImageJ with 10^9 pages": ("a.tif", _imagej(10**9)),
    "TIFF of ImageJ with pages below zero": ("a.tif", _imagej(-5)),
    "TIFF bomb": (
        "a.tif",
        lambda: _tiff(np.zeros((13_000, 13_000, 3), np.uint8), compression="zlib", rowsperstrip=13_000)(),
    ),
}
"""Read by some programs and refused by others."""


def _archive() -> bytes:
    written = io.BytesIO()
    np.savez(written, a=_COLOURS)
    return written.getvalue()


def _all() -> Iterator[tuple[str, Write]]:
    for name, (file, make) in _FINE.items():
        yield f"{HARMLESS}{name}", file_of(file, make)
    for name, (file, make) in _BROKEN.items():
        yield f"{BROKEN}{name}", file_of(file, make)
    for name, (file, make) in _ODD.items():
        yield name, file_of(file, make)
    yield f"{BROKEN}NumPy of 10 GB that are there", _sparse_array
    yield "TIFF that names other files", _ome


RARE_PICTURES: dict[str, Write] = dict(_all())
