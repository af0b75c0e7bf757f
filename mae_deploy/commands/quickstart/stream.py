"""A stream on made frames: a square that moves over a texture, every frame whole and through `backbone.stream`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mae_deploy.checkpoint import save_checkpoint
from mae_deploy.commands.quickstart.speed import MODELS, random_encoder
from mae_deploy.export import run as export
from mae_deploy.export.config import ExportConfig
from mae_deploy.files import remove
from mae_deploy.images.read import Array
from mae_deploy.models.config import EncoderConfig
from mae_deploy.progress import progress
from mae_deploy.runtime.backbone import Backbone
from mae_deploy.runtime.timing import Timing

MODEL = MODELS[0]

_SIDE, _SQUARE, _STEP = 256, 56, 6
"""Of a frame, of the square in it, and of its way from frame to frame, in pixels."""
_SHOWN = 4
"""Frames in the picture."""


def made_frames(count: int) -> list[Array]:
    """uint8 `(256, 256, 3)`: an orange square that moves over a texture, and a camera's noise."""
    rng = np.random.default_rng(0)
    texture = _texture(rng) * (0.8, 0.9, 1.0)
    square = 0.4 * _texture(rng)[:_SQUARE, :_SQUARE] + (150, 70, 0)
    frames = []
    for index in range(count):
        frame = texture.copy()
        left = index * _STEP % (_SIDE - _SQUARE)
        frame[100 : 100 + _SQUARE, left : left + _SQUARE] = square
        frames.append((frame + rng.normal(0, 1, frame.shape)).clip(0, 255).astype(np.uint8))
    return frames


def measure_stream(
    folder: Path, picture: Path, *, model: EncoderConfig = MODEL, num_frames: int = 32
) -> dict[str, Any]:
    """Median times of a whole frame and of a frame of the stream, in turns on one thread; what was computed; and the
    cosine of the features of both.

    Args:
        folder: gets the checkpoint of random weights, the bundle, and some frames.
        picture: PNG of some frames, in which what was not computed is dark.
    """
    frames = made_frames(num_frames)
    bundle = _export(folder, model, frames)
    seconds: dict[str, list[float]] = {"whole": [], "stream": []}
    shares: list[float] = []
    cosines: list[float] = []
    kept: list[list[int]] = []
    with Backbone.load(bundle, threads=1) as backbone, progress("stream", num_frames) as bar:
        stream = backbone.stream(audit=0.0)
        for frame in frames:
            started = time.perf_counter()
            whole = backbone(frame)
            between = time.perf_counter()
            seen = stream(frame)
            seconds["stream"].append(time.perf_counter() - between)
            seconds["whole"].append(between - started)
            shares.append(seen.cost)
            cosines.append(_cosine(whole["cls"][0], seen["cls"][0]))
            kept.append(seen.keep.tolist())
            bar.advance(1)
        P, crop = backbone.bundle.model["patch_size"], backbone.preprocess.crop
        shown = [crop(frames[index]) for index in _shown(num_frames)]
    # The first frame is a whole one.
    whole_times, stream_times = (Timing(tuple(seconds[name][1:])) for name in ("whole", "stream"))
    _draw(picture, shown, [kept[index] for index in _shown(num_frames)], P)
    return {
        "model": model.name,
        "frames": num_frames,
        "whole_ms": whole_times.median * 1000,
        "stream_ms": stream_times.median * 1000,
        "ratio": stream_times.ratio(whole_times),
        "operations": float(np.mean(shares[1:])),
        "cosine": float(np.mean(cosines[1:])),
        "patches": [len(ids) for ids in kept],
    }


def _export(folder: Path, model: EncoderConfig, frames: list[Array]) -> Path:
    """A bundle of `--tokens cached`, checked against PyTorch on some of the frames."""
    remove(folder)
    samples = folder / "frames"
    samples.mkdir(parents=True)
    for index in range(4):
        Image.fromarray(frames[index]).save(samples / f"{index}.png")
    metadata, tensors = random_encoder(model)
    save_checkpoint(folder / "checkpoint", tensors, metadata)
    out = folder / "bundle"
    config = ExportConfig(
        checkpoint=folder / "checkpoint", out=out, tokens="cached", samples=samples, num_samples=2, threads=1
    )
    export.run_export(config)
    return out


def _shown(count: int) -> list[int]:
    """Frames of the picture: the first, and others spread over the rest."""
    return [round(index * (count - 1) / (_SHOWN - 1)) for index in range(_SHOWN)]


def _draw(path: Path, crops: list[Array], kept: list[list[int]], patch_size: int) -> None:
    """The frames side by side, what was not computed of each in the dark."""
    gap = np.full((crops[0].shape[0], 8, 3), 255, np.uint8)
    cells: list[Array] = []
    for pixels, ids in zip(crops, kept, strict=True):
        rows, columns = pixels.shape[0] // patch_size, pixels.shape[1] // patch_size
        computed = np.zeros(rows * columns, bool)
        computed[ids] = True
        bright = computed.reshape(rows, columns).repeat(patch_size, 0).repeat(patch_size, 1)
        cells += [np.where(bright[:, :, None], pixels, pixels // 4), gap]
    Image.fromarray(np.concatenate(cells[:-1], axis=1).astype(np.uint8)).save(path)


def _texture(rng: np.random.Generator) -> Array:
    """float `(256, 256, 1)` from 0 to 255, with the spectrum of natural images."""
    frequency = np.hypot(np.fft.fftfreq(_SIDE)[:, None], np.fft.fftfreq(_SIDE)[None, :])
    frequency[0, 0] = 1.0
    image = np.fft.ifft2(np.fft.fft2(rng.standard_normal((_SIDE, _SIDE))) / frequency).real
    found: Array = 255 * ((image - image.min()) / (image.max() - image.min()))[:, :, None]
    return found


def _cosine(a: Array, b: Array) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
