"""From which share of the patches on a whole frame costs no more than an update, on this machine."""

from __future__ import annotations

import weakref

import numpy as np

from mae_deploy.runtime.cache import take_patches
from mae_deploy.runtime.streams.model import StreamModel
from mae_deploy.runtime.timing import measure

_SIZES = 16
_ROWS = 6
"""ONNX Runtime multiplies so many rows of a matrix at once (12 with AVX-512): with ViT-S on AVX2, 36 tokens take 0.226
of a whole frame's time and 37 tokens 0.241."""
_FEW, _MANY = 3, 8
"""How many sixteenths of the patches are measured: sizes that streams use most. Time is a line in their number."""
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


def step(backbone: StreamModel) -> int:
    """What numbers of tokens, CLS among them, are multiples of: few sizes are all that an engine prepares for, and
    where it prepares for none, full rows are best.
    """
    sixteenth = max(1, backbone.num_patches // _SIZES)
    return sixteenth if backbone.engine.prepares_sizes else min(sixteenth, _ROWS)


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
    sixteenth = max(1, N // _SIZES)
    many = min(N, _MANY * sixteenth) - 1
    few = min(many, _FEW * sixteenth) - 1
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
