"""In which forms the images of the parity check are given to PyTorch and to the graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from mae_deploy.export.config import ExportConfig
from mae_deploy.export.samples import every_patch, extreme_pixels, stream_patches, token_inputs, update_inputs
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.images.read import Array
from mae_deploy.models.config import EncoderConfig
from mae_deploy.runtime.manifest import IDS_KEEP, IMAGES, NUM_KEEP, PATCHES, UPDATES
from mae_deploy.runtime.parity.trials import EXTREMES

GOLDEN = 8
"""Samples that go into the bundle; also how many are run at a time."""

_FEW = 2
"""Samples that are also run with other patches."""

Arrays = dict[str, Array]


class Trial(NamedTuple):
    """Images and what PyTorch makes of them."""

    name: str
    """What is special about them; empty: they are all samples."""
    pixels: Array
    """`(S, H, W, C)`."""
    inputs: Arrays
    """Images are normalised float32 here."""
    expected: Arrays
    """PyTorch's outputs."""


def forms(
    config: ExportConfig, encoder: EncoderConfig, spec: Preprocess, pixels: Array
) -> Iterator[tuple[str, Array, Arrays]]:
    """Name, pixels and inputs: all samples; a few with the smallest, usual and largest K of every profile, where the
    graph leaves K open and the samples are not run with it anyway, else with every patch; and images of extremes.
    """
    mode, keep, N = config.token_mode, config.keep, encoder.num_tokens
    images, extremes = spec.normalise(pixels), extreme_pixels(spec)
    yield "", pixels, {IMAGES: images, **chosen(config, encoder, images)}
    if mode != "full" and keep is None:
        # Rows of ragged samples are as long as the largest K, which an engine of TensorRT may be built for alone.
        seen = {} if mode == "ragged" and config.is_planned else {config.ranges(N)["K"][1]}
        for K in sorted({K for profile in config.profiles(N) for K in profile["K"]}.difference(seen)):
            few = np.arange(min(_FEW, len(pixels)))
            rows = token_inputs("visible", N, (K, K, K), len(few), config.seed)[IDS_KEEP]
            yield f"K={K}", pixels[few], _with_rows(config, encoder, images[few], rows)
    elif keep is not None and keep < N:
        rows = every_patch(N, keep, config.seed)
        few = np.arange(1 if mode == "cached" else len(rows)) % min(GOLDEN, len(pixels))
        yield "every patch", pixels[few], _with_rows(config, encoder, images[few], rows)
    images = spec.normalise(extremes)
    yield EXTREMES, extremes, {IMAGES: images, **chosen(config, encoder, images)}


def chosen(config: ExportConfig, encoder: EncoderConfig, images: Array) -> Arrays:
    """Which patches of these images, `(S, C, H, W)`, are given, as often as they will be."""
    mode, N = config.token_mode, encoder.num_tokens
    if mode == "full":
        return {}
    if mode == "cached":
        return _stream(encoder, images, **update_inputs(N, config.ranges(N)["K"], len(images), config.seed))
    return token_inputs(mode, N, config.ranges(N)["K"], len(images), config.seed)


def _with_rows(config: ExportConfig, encoder: EncoderConfig, images: Array, rows: Array) -> Arrays:
    """Images with these patches, `(R, K)`; in streams K of them at a time, where K is open after a whole frame, else
    all rows one after the other.
    """
    R, K = rows.shape
    mode, N = config.token_mode, encoder.num_tokens
    if mode == "cached" and config.keep is None:
        given = update_inputs(N, (K, K, config.ranges(N)["K"][2]), len(images), config.seed)
        return {IMAGES: images, **_stream(encoder, images, **given)}
    if mode == "cached":
        ids, updates = np.tile(rows.reshape(1, -1), (len(images), 1)), np.full((len(images), R), K, np.int64)
        return {IMAGES: images, **_stream(encoder, images, ids, updates)}
    lengths = {NUM_KEEP: np.full(R, K, np.int64)} if mode == "ragged" else {}
    return {IMAGES: images, IDS_KEEP: rows, **lengths}


def _stream(encoder: EncoderConfig, images: Array, ids_keep: Array, updates: Array) -> Arrays:
    """A few updates of a stream for each image."""
    patches = stream_patches(images.transpose(0, 2, 3, 1), ids_keep, updates, encoder.patch)
    return {PATCHES: patches, IDS_KEEP: ids_keep, UPDATES: updates}
