"""Faults of a device: an engine that answers wrongly, and preprocessing that is not the export's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from unittest import mock

import numpy as np

from mae_deploy.images.preprocess import Preprocess
from mae_deploy.images.read import Array
from mae_deploy.runtime.engines.base import Engine
from mae_deploy.runtime.manifest import IDS_KEEP, follows_keep

Arrays = dict[str, Array]
Answer = Callable[[Mapping[str, Array], Arrays, Arrays | None], Arrays]
"""What an engine says instead, of the inputs, the right outputs and those of the run before."""


def _features(outputs: Arrays, edit: Callable[[Array], Array]) -> Arrays:
    return {name: edit(array) if array.dtype.kind == "f" else array for name, array in outputs.items()}


def _one_nan(inputs: Mapping[str, Array], outputs: Arrays, _: Arrays | None) -> Arrays:
    def edit(array: Array) -> Array:
        array = array.copy()
        array[-1] = np.nan
        return array

    return _features(outputs, edit)


def _before(inputs: Mapping[str, Array], outputs: Arrays, before: Arrays | None) -> Arrays:
    if before is None or any(before[name].shape != array.shape for name, array in outputs.items()):
        return outputs
    return before


def _jitter() -> Answer:
    rng = np.random.default_rng(0)
    return lambda inputs, outputs, _: _features(
        outputs, lambda array: (array + 1e-2 * array.std() * rng.standard_normal(array.shape)).astype(array.dtype)
    )


def _tokens(edit: Callable[[Array], Array]) -> Answer:
    return lambda inputs, outputs, _: {
        name: edit(array) if follows_keep(name) else array for name, array in outputs.items()
    }


def _exchanged(inputs: Mapping[str, Array], outputs: Arrays, _: Arrays | None) -> Arrays:
    """Two outputs of one shape under each other's name."""
    if {"cls", "pooled"} <= outputs.keys():
        return {**outputs, "cls": outputs["pooled"], "pooled": outputs["cls"]}
    return outputs


ANSWERS: dict[str, Callable[[], Answer]] = {
    "the batch in another order": lambda: lambda inputs, outputs, _: _features(outputs, lambda array: array[::-1]),
    "one image's NaN": lambda: _one_nan,
    "the outputs of the run before": lambda: _before,
    "outputs that change from run to run": _jitter,
    "tokens in the order of the image": lambda: lambda inputs, outputs, _: _in_order(inputs, outputs),
    "tokens in reverse": lambda: _tokens(lambda array: array[:, ::-1]),
    "two outputs exchanged": lambda: _exchanged,
    "all of the batch is its first image": lambda: (
        lambda inputs, outputs, _: _features(outputs, lambda array: np.repeat(array[:1], len(array), axis=0))
    ),
}


def _in_order(inputs: Mapping[str, Array], outputs: Arrays) -> Arrays:
    if IDS_KEEP not in inputs:
        return outputs
    order = np.argsort(inputs[IDS_KEEP], axis=1, kind="stable")
    return {
        name: np.take_along_axis(array, order[..., None], axis=1)
        if follows_keep(name) and array.shape[:2] == order.shape
        else array
        for name, array in outputs.items()
    }


@contextmanager
def answering(engine: Engine, make: Callable[[], Answer]) -> Iterator[Engine]:
    """The engine, which says something else than it computed."""
    answer, before, right = make(), [None], engine.run

    def run(inputs: Mapping[str, Array], outputs: Sequence[str] | None = None) -> Arrays:
        found = right(inputs, outputs)
        said = answer(inputs, found, before[0])
        before[0] = found  # type: ignore[call-overload]
        return said

    with mock.patch.object(engine, "run", run):
        yield engine


def other_caches(inputs: Mapping[str, Array]) -> Arrays:
    """Each stream with the keys and values of its neighbour."""
    return {
        name: np.roll(array, 1, axis=0) if name.startswith(("keys", "values")) else array
        for name, array in inputs.items()
    }


# --- preprocessing ---------------------------------------------------------------------------------------------------


def _without_antialias(crop: Callable[..., Array]) -> Callable[..., Array]:
    """The nearest pixel in place of a filtered one."""

    def cropped(spec: Preprocess, image: Array, channel_order: str = "rgb") -> Array:
        placed = spec.place((image.shape[1], image.shape[0]))
        left, top, right, bottom = placed.part
        part = image[top:bottom, left:right]
        rows = np.arange(placed.size[1]) * part.shape[0] // placed.size[1]
        columns = np.arange(placed.size[0]) * part.shape[1] // placed.size[0]
        box = placed.box
        found: Array = part[rows][:, columns][box[1] : box[3], box[0] : box[2]]
        return found

    return cropped


def _then(edit: Callable[[Array], Array]) -> Callable[[Callable[..., Array]], Callable[..., Array]]:
    return lambda crop: lambda spec, image, channel_order="rgb": edit(crop(spec, image, channel_order))


CROPS: dict[str, Callable[[Callable[..., Array]], Callable[..., Array]]] = {
    "order of the channels": _then(lambda pixels: pixels[..., ::-1]),
    "crop one pixel to the right": _then(lambda pixels: np.roll(pixels, 1, axis=1)),
    "crop one pixel down": _then(lambda pixels: np.roll(pixels, 1, axis=0)),
    "mirrored": _then(lambda pixels: pixels[:, ::-1]),
    "resized without antialiasing": _without_antialias,
    "range 0 to 254": _then(lambda pixels: (pixels * (254 / 255)).astype(pixels.dtype) - (pixels > 128)),
}
"""What takes the place of `Preprocess.crop`."""

SPECS: dict[str, dict[str, object]] = {
    "mean and deviation exchanged": {"mean": [0.229, 0.224, 0.225], "std": [0.485, 0.456, 0.406]},
    "mean of BGR": {"mean": [0.406, 0.456, 0.485]},
    "mean 0.5, deviation 0.5": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
    "another filter": {"interpolation": "bilinear"},
    "another share of the image": {"crop_pct": 0.9},
    "squashed": {"crop_mode": "squash"},
}
"""What takes the place of fields of the manifest's `preprocess`."""
