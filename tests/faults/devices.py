"""Faults of a device: an engine that answers wrongly, and preprocessing that is not the export's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np

from mae_deploy.images.preprocess import Preprocess
from mae_deploy.images.read import Array
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.engines.base import Engine
from mae_deploy.runtime.manifest import IDS_KEEP, IMAGES, PATCHES, follows_keep

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


def _one_buffer() -> Answer:
    """An engine that hands out its own memory, to which the next call writes."""
    buffers: Arrays = {}

    def answer(inputs: Mapping[str, Array], outputs: Arrays, _: Arrays | None) -> Arrays:
        for name, array in outputs.items():
            if name not in buffers or buffers[name].shape != array.shape:
                buffers[name] = np.empty_like(array)
            buffers[name][...] = array
        return {name: buffers[name] for name in outputs}

    return answer


def _last_channel(array: Array) -> Array:
    array = array.copy()
    array[..., -1] *= 1.05
    return array


ANSWERS: dict[str, Callable[[], Answer]] = {
    "outputs in a buffer that is used again": _one_buffer,
    "one channel of the outputs 5 % too large": lambda: lambda inputs, outputs, _: _features(outputs, _last_channel),
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


def _size(inputs: Mapping[str, Array]) -> int:
    return len(next(iter(inputs.values())))


def _length(inputs: Mapping[str, Array]) -> int | None:
    return inputs[IDS_KEEP].shape[1] if IDS_KEEP in inputs else None


def _sorted(inputs: Mapping[str, Array]) -> bool:
    ids = inputs.get(IDS_KEEP)
    return ids is not None and ids.shape[1] > 1 and bool((np.diff(ids[0]) > 0).all())


def _dark(inputs: Mapping[str, Array]) -> bool:
    pixels = inputs[IMAGES] if IMAGES in inputs else inputs[PATCHES]
    return bool((pixels.reshape(len(pixels), -1).mean(axis=1) < -1.5).any())


SOMETIMES: dict[str, tuple[Callable[[Mapping[str, Array]], bool], Callable[[Bundle], bool]]] = {
    "wrong for three images": (lambda inputs: _size(inputs) == 3, lambda bundle: bundle.fixed_batch is None),
    "wrong for the largest batch": (
        lambda inputs: _size(inputs) == 32,
        lambda bundle: bundle.fixed_batch is None and bundle.token_mode != "cached",
    ),
    "wrong for one patch": (lambda inputs: _length(inputs) == 1, lambda bundle: bundle.keep_range[0] == 1),
    "wrong for sorted patches": (_sorted, lambda bundle: IDS_KEEP in bundle.input_names),
    "wrong for dark images": (_dark, lambda bundle: True),
}
"""For which inputs an engine is wrong, and which bundles can be given such."""


def off(outputs: Arrays) -> Arrays:
    """5 % of an output's deviation added to or taken from each value."""
    rng = np.random.default_rng(0)
    return _features(
        outputs,
        lambda array: (array + 0.05 * np.float32(array).std() * rng.choice((-1, 1), array.shape)).astype(array.dtype),
    )


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
    "a hundredth more of the image": {"crop_pct": 0.885},
    "a mean off by 0.005": {"mean": [0.49, 0.456, 0.406]},
    "pixels up to 254": {"pixel_max": 254.0},
    "squashed": {"crop_mode": "squash"},
}
"""What takes the place of fields of the manifest's `preprocess`."""


ENTRIES: dict[str, Callable[[Any], Any]] = {
    "class names shifted": lambda m: m.update(class_names=[*m["class_names"][1:], m["class_names"][0]]),
    "a tolerance that everything meets": lambda m: m.update(tolerance={"sqnr_db": 0.0}),
    "another precision": lambda m: m.update(precision="fp16" if m["precision"] == "fp32" else "fp32"),
    "names of the blocks in another order": lambda m: m["graph"].update(blocks=m["graph"]["blocks"][::-1]),
    "another number of heads": lambda m: m["model"].update(num_heads=2),
    "another licence": lambda m: m.update(licence="MIT"),
}
"""Edits of the manifest."""
