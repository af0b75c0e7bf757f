"""What the golden file holds beside the golden samples: other numbers of patches, every patch where their number is
fixed, and images at the ends of what a camera gives; and what the manifest said when it was written.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from mae_deploy.errors import CheckFailed
from mae_deploy.images.read import Array
from mae_deploy.runtime.bundle import Bundle, are_updates
from mae_deploy.runtime.manifest import IDS_KEEP, IMAGES, QUANTIZED, UPDATES, Manifest
from mae_deploy.runtime.tolerance import Tolerance

EXTREMES = "black, white, noise"
"""The trial of images at both ends of what a pixel can be, and of every value side by side."""

_SEPARATOR = "/"
"""Between the name of a trial and that of an array."""

_FINITE = Tolerance(max_abs=1e100)

_EXPORTED = "exported"
"""The array of the golden file that holds, as UTF-8 of JSON, what the manifest says of the graph."""

_SEALED = (
    *("kind", "model", "decoder", "class_names", "token_mode", "num_patches", "batch", "keep", "profile"),
    *("precision", "typing", "engine", "graph", "preprocess", "licence", "tolerance"),
)
"""What no later command changes in a manifest."""


class Trial(NamedTuple):
    """Inputs and what PyTorch makes of them."""

    name: str
    inputs: dict[str, Array]
    expected: dict[str, Array]


def tolerance_of_trial(trial: str, precision: str, tolerance: Tolerance) -> Tolerance:
    """What the outputs of a trial must meet: those of images that no calibration has seen need only be numbers, where
    there are eight bits.
    """
    return _FINITE if trial == EXTREMES and precision in QUANTIZED else tolerance


def trial_arrays(name: str, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """As the golden file holds them."""
    return {f"{name}{_SEPARATOR}{key}": array for key, array in arrays.items()}


def trials(bundle: Bundle) -> Iterator[Trial]:
    """Those of the golden file; none in bundles of older versions. One without images has the golden ones, over and
    over.

    Raises:
        CheckFailed: the golden file is not what was exported, or an array is missing or of another length or type than
            the graph takes.
    """
    golden = bundle.golden()
    found: dict[str, dict[str, Array]] = {}
    for key, array in golden.items():
        trial, separator, name = key.rpartition(_SEPARATOR)
        if separator:
            found.setdefault(trial, {})[name] = array
    for trial, arrays in found.items():
        rows = len(next(iter(arrays.values())))
        if IMAGES in golden and IMAGES not in arrays:
            arrays[IMAGES] = golden[IMAGES][np.arange(rows) % len(golden[IMAGES])]
        for name in (*bundle.sample_names, *bundle.output_names):
            values, like = arrays.get(name), golden[name]
            kind = (like.dtype, like.ndim)
            if values is None or values.shape[:1] != (rows,) or (values.dtype, values.ndim) != kind:
                raise CheckFailed(_wrong(bundle, trial, name), hint="export the bundle again")
        if UPDATES in bundle.sample_names and not _is_stream(arrays[UPDATES], arrays[IDS_KEEP], bundle.num_patches):
            raise CheckFailed(_wrong(bundle, trial, UPDATES), hint="export the bundle again")
        inputs = {name: arrays[name] for name in bundle.sample_names}
        yield Trial(trial, inputs, {name: arrays[name] for name in bundle.output_names})


def _is_stream(updates: Array, ids_keep: Array, num_patches: int) -> bool:
    return are_updates(updates, ids_keep) and bool(0 <= ids_keep.min() <= ids_keep.max() < num_patches)


def _wrong(bundle: Bundle, trial: str, name: str) -> str:
    file = bundle.path / bundle.manifest["golden"]["file"]
    return f"{file}: '{name}' of '{trial}' is missing, or not what the graph takes or gives"


def exported_array(manifest: Manifest) -> dict[str, Array]:
    """What the manifest says of the graph, as the golden file holds it."""
    text = json.dumps({name: manifest[name] for name in _SEALED})  # type: ignore[literal-required]
    return {_EXPORTED: np.frombuffer(text.encode(), np.uint8)}


def changed_entries(bundle: Bundle) -> list[str]:
    """What the manifest says otherwise than when it was exported, a line each; nothing in bundles of older versions.

    Raises:
        CheckFailed: the golden file is not what was exported.
    """
    sealed = bundle.golden().get(_EXPORTED)
    if sealed is None:
        return []
    try:
        before = json.loads(sealed.tobytes())
    except ValueError:
        before = None
    if not isinstance(before, dict):
        return [f"{bundle.manifest['golden']['file']} does not tell what was exported"]
    return [line for name in _SEALED for line in _differing(name, before.get(name), bundle.manifest.get(name))]


def _differing(name: str, before: Any, now: Any) -> list[str]:
    if before == now:
        return []
    if isinstance(before, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*before, *now])
        return [line for key in keys for line in _differing(f"{name}.{key}", before.get(key), now.get(key))]
    return [f"{name} is {_short(now)}, at export it was {_short(before)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
