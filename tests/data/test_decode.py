"""Decoding for training gives the pixels of `read_image`, and says the same of broken files."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from mae_deploy.data import decode as module
from mae_deploy.data.decode import decode
from mae_deploy.images.read import UnreadableImage, is_image


def jpeg(mode: str = "RGB", size: tuple[int, int] = (67, 41), orientation: int = 1) -> bytes:
    """A smooth picture: the two halves of a JPEG's chroma differ by the decoder's upsampling where it is not."""
    across, down = np.meshgrid(np.linspace(0, 250, size[0]), np.linspace(0, 250, size[1]))
    image = Image.fromarray(np.stack([across, down, 255 - across], axis=2).astype(np.uint8)).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85, exif=exif)
    return buffer.getvalue()


def whole(width: int, height: int) -> int:
    return 1


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pixels_are_those_of_pillow(mode: str, orientation: int, channels: int) -> None:
    content = jpeg(mode, orientation=orientation)
    np.testing.assert_array_equal(
        np.asarray(decode("a.jpg", content, channels, shrink=whole)), np.asarray(decode("a.jpg", content, channels))
    )


def test_the_faster_decoder_is_used_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("simplejpeg", reason="simplejpeg is not installed")
    assert not is_image(decode("a.jpg", jpeg(), 3, shrink=whole))
    assert is_image(decode("a.jpg", jpeg(orientation=6), 3, shrink=whole))
    monkeypatch.setattr(module, "_simplejpeg", None)
    assert is_image(decode("a.jpg", jpeg(), 3, shrink=whole))


def test_large_ones_come_smaller() -> None:
    image = decode("a.jpg", jpeg(size=(160, 120)), 3, shrink=lambda width, height: 4)
    assert is_image(image)
    assert image.size == (40, 30)
    small = np.asarray(image, np.float32)
    expected = (
        np.asarray(decode("a.jpg", jpeg(size=(160, 120)), 3), np.float32).reshape(30, 4, 40, 4, 3).mean(axis=(1, 3))
    )
    assert np.abs(small - expected).mean() < 2  # grey levels


@pytest.mark.parametrize("content", [b"", b"\xff\xd8", jpeg()[:600]])
def test_broken_files_are_named(content: bytes) -> None:
    with pytest.raises(UnreadableImage, match=r"^shard.tar/a.jpg: "):
        decode("shard.tar/a.jpg", content, 3, shrink=whole)
