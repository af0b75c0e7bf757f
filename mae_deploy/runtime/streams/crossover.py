"""From which share of the patches on a whole frame costs no more than an update, on this machine."""

from __future__ import annotations

import weakref

import numpy as np

from mae_deploy.runtime.cache import take_patches
from mae_deploy.runtime.streams.model import StreamModel
from mae_deploy.runtime.timing import measure

_SHARES = (0.25, 0.4, 0.55, 0.7, 0.85)
_GAIN = 0.9
"""An update must take less than this share of a whole frame's time to be worth being inexact."""

_measured: weakref.WeakKeyDictionary[StreamModel, float] = weakref.WeakKeyDictionary()


def measured_bypass(backbone: StreamModel) -> float:
    """The largest of some shares at which an update is faster than a whole frame, measured once for each backbone; 0
    where none is.
    """
    if backbone not in _measured:
        _measured[backbone] = _measure(backbone)
    return _measured[backbone]


def _measure(backbone: StreamModel) -> float:
    bundle = backbone.bundle
    N, P = bundle.num_patches, bundle.manifest["model"]["patch_size"]
    preprocess = backbone.preprocess
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (1, *preprocess.image_size, preprocess.channels)).astype(preprocess.dtype)
    cache = backbone.new_cache()
    sizes = {share: max(1, round(share * N)) for share in _SHARES} | {1.0: N}
    calls = {}
    for share, size in sizes.items():
        ids = np.arange(size)
        patches = take_patches(pixels, ids[None], P)
        calls[share] = lambda patches=patches, ids=ids: backbone.update(cache, patches, ids)
    calls[1.0]()
    timings = measure(calls, repeats=5, warmup=1)
    faster = [share for share in _SHARES if timings[share].ratio(timings[1.0]) < _GAIN]
    return max(faster, default=0.0)
