"""From which share of the patches on a whole frame costs no more than an update, on this machine."""

from __future__ import annotations

import weakref

import numpy as np

from mae_deploy.runtime.cache import take_patches
from mae_deploy.runtime.streams.model import StreamModel
from mae_deploy.runtime.timing import measure

_SIZES = 16
_FEW, _MANY = 3, 8
"""How many steps of patches are measured: an engine that prepares for a size prepares for those that streams use most,
and time is a line in the number of patches.
"""
_GAIN, _MOST = 0.9, 0.85
"""An update must take less than this share of a whole frame's time to be worth being inexact, and have at most this
share of the patches: the line is not measured beyond.
"""

_measured: weakref.WeakKeyDictionary[StreamModel, float] = weakref.WeakKeyDictionary()


def measured_bypass(backbone: StreamModel) -> float:
    """The share up to which an update is faster than a whole frame, measured once for each backbone; 0: never."""
    if backbone not in _measured:
        _measured[backbone] = _measure(backbone)
    return _measured[backbone]


def step(num_patches: int) -> int:
    """What numbers of patches are multiples of: about 16 of them are all that an engine prepares for."""
    return max(1, num_patches // _SIZES)


def crossing(few: tuple[float, float], many: tuple[float, float], whole: float) -> float:
    """Where the line through two shares and their times reaches what a whole frame's time allows."""
    slope = (many[1] - few[1]) / (many[0] - few[0])
    share = few[0] + (_GAIN * whole - few[1]) / max(slope, 1e-9)
    return min(max(share, 0.0), _MOST)


def _measure(backbone: StreamModel) -> float:
    bundle = backbone.bundle
    N, P = bundle.num_patches, bundle.manifest["model"]["patch_size"]
    preprocess = backbone.preprocess
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (1, *preprocess.image_size, preprocess.channels)).astype(preprocess.dtype)
    cache = backbone.new_cache()
    many = min(N - 1, _MANY * step(N))
    few = min(many - 1, _FEW * step(N))
    if few < 1:
        return 0.0
    calls = {}
    for size in (few, many, N):
        ids = np.arange(size)
        patches = take_patches(pixels, ids[None], P)
        calls[size] = lambda patches=patches, ids=ids: backbone.update(cache, patches, ids)
    calls[N]()
    seconds = {size: timing.median for size, timing in measure(calls, repeats=5, warmup=1).items()}
    return crossing((few / N, seconds[few]), (many / N, seconds[many]), seconds[N])
