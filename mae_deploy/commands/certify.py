"""What `verify --certificate` measures on this machine: a bundle beside the same network in FP32."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mae_deploy.commands.benchmark.accuracy import Photos
from mae_deploy.config import from_dict
from mae_deploy.errors import ConfigError, MissingDependency
from mae_deploy.files import temporary_folder
from mae_deploy.images.read import Array
from mae_deploy.progress import notice, progress
from mae_deploy.runtime.backbone import Backbone
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.cache import runner
from mae_deploy.runtime.engines.base import Engine, EngineOptions, run_in_chunks
from mae_deploy.runtime.manifest import MANIFEST_FILE, PLANNED, QUANTIZED
from mae_deploy.runtime.parity.certificate import Classes, Speed, certificate, classes_of, time_both
from mae_deploy.runtime.parity.checks import Verification
from mae_deploy.runtime.parity.compare import Comparison, compare
from mae_deploy.runtime.registry import load_engine
from mae_deploy.seeding import random_patches

_IMAGES, _COMPARED = 1000, 128
"""At most so many images are classified; of so many all outputs are compared."""

_BATCH = 8
"""Images at a time, as at export: a dynamic range spans the batch."""

Arrays = dict[str, Array]


def certify(
    bundle: Bundle,
    verification: Verification,
    *,
    engine: str,
    options: EngineOptions,
    against: Path | None,
    samples: Path | None,
) -> tuple[dict[str, Any], list[str]]:
    """The certificate, and which of the budgets of the export are not shown to be met here.

    Args:
        verification: of the bundle, which passed.
        against: a bundle in FP32, or a checkpoint; None: what the bundle records.
        samples: a folder of images; None: what the bundle records.

    Raises:
        ConfigError: `against` is another export, or there are no such images.
    """
    asked = _recorded(bundle, "export")
    budget = _mapping(asked.get("int8")) if bundle.precision in QUANTIZED else {}
    max_drop, max_latency = budget.get("max_drop"), budget.get("max_latency")
    with ExitStack() as stack:
        loaded = stack.enter_context(load_engine(bundle, engine, options))
        baseline = _baseline(stack, bundle, loaded, against, samples)
        comparisons = [check.comparison for check in verification.outputs]
        images, classes, speed = f"{verification.num_samples} golden samples of the export", None, None
        if baseline is None:
            classes, max_drop = _golden_classes(bundle, loaded), None
        else:
            fp32 = stack.enter_context(load_engine(baseline, engine, options))
            calls = {name: _one_call(of, on) for name, of, on in (("mine", bundle, loaded), ("fp32", baseline, fp32))}
            speed = time_both(calls, "mine", "fp32")
            folder = samples or _recorded_samples(asked)
            if folder is None:
                notice("golden samples only:", "the images of the export are not here; pass --samples FOLDER")
                classes, max_drop = _golden_classes(bundle, loaded), None
            else:
                photos = Photos(folder, _IMAGES if bundle.class_output is not None else _COMPARED)
                comparisons, classes = _compared(Backbone(bundle, loaded), Backbone(baseline, fp32), photos)
                images = photos.source
        record = certificate(
            loaded,
            precision=bundle.precision,
            images=images,
            comparisons=comparisons,
            tolerance=verification.tolerance,
            classes=classes,
            speed=speed,
            max_drop=max_drop,
            max_latency=max_latency,
        )
    return record, _failures(record, comparisons, verification, classes, speed, max_drop, max_latency)


def _failures(
    record: Mapping[str, Any],
    comparisons: list[Comparison],
    verification: Verification,
    classes: Classes | None,
    speed: Speed | None,
    max_drop: float | None,
    max_latency: float | None,
) -> list[str]:
    """Every rule that is missed, in words."""
    if record["passed"]:
        return []
    found = [failure for comparison in comparisons for failure in comparison.failures(verification.tolerance)]
    if classes is not None and max_drop is not None and (missed := classes.failure(max_drop)) is not None:
        found.append(missed)
    if speed is not None and max_latency is not None and not speed.rule(max_latency).passed:
        found.append(f"it takes {speed.words()}; --max-latency {max_latency:g}")
    return found


def _baseline(
    stack: ExitStack, bundle: Bundle, loaded: Engine, against: Path | None, samples: Path | None
) -> Bundle | None:
    """The same export in FP32; None where there is neither one nor a checkpoint to make it of."""
    if against is not None and (against / MANIFEST_FILE).is_file():
        baseline = Bundle.load(against)
        same = ("model", "kind", "token_mode", "num_patches", "batch", "keep", "class_names", "preprocess")
        differing = [name for name in same if baseline.manifest.get(name) != bundle.manifest.get(name)]
        if baseline.precision != "fp32" or differing:
            what = f"in {baseline.precision}" if baseline.precision != "fp32" else f"of another {differing[0]}"
            raise ConfigError(f"--against {against} is {what}", hint="export the same checkpoint with --precision fp32")
        return baseline
    recorded = _recorded(bundle, "checkpoint").get("path")
    checkpoint = against or (Path(recorded) if isinstance(recorded, str) and Path(recorded).exists() else None)
    if checkpoint is None or loaded.name in PLANNED or (bundle.precision == "fp32" and against is None):
        if bundle.precision != "fp32":
            notice("golden samples only:", "there is no FP32 to compare with; pass --against BUNDLE in FP32")
        return None
    try:
        return _exported(stack, bundle, checkpoint, samples)
    except MissingDependency as error:
        if against is not None:
            raise
        notice("golden samples only:", f"{checkpoint} cannot be exported in FP32: {error}; pass --against BUNDLE")
        return None


def _exported(stack: ExitStack, bundle: Bundle, checkpoint: Path, samples: Path | None) -> Bundle:
    """A checkpoint, exported as the bundle was but in FP32, for as long as the stack is open."""
    from mae_deploy.export.config import ExportConfig
    from mae_deploy.export.run import run_export

    folder = stack.enter_context(temporary_folder())
    asked = _recorded(bundle, "export")
    if not asked:
        raise ConfigError(f"{bundle.path} does not record its export", hint="pass --against BUNDLE in FP32")
    twin = from_dict(ExportConfig, dict(asked)).in_precision("fp32")
    config = replace(
        twin,
        checkpoint=checkpoint,
        out=folder / "fp32",
        images="float32" if twin.images == "float16" else twin.images,
        features="float32",
        cache="auto",
        triton=None,
        deepstream=None,
        samples=samples or _recorded_samples(asked),
        num_samples=None,
    )
    notice("FP32:", f"{checkpoint} is exported to compare with")
    run_export(config)
    return Bundle.load(config.out)


def _recorded(bundle: Bundle, name: str) -> Mapping[str, Any]:
    """A part of the provenance; empty where the bundle has none."""
    return _mapping(bundle.manifest["provenance"].get(name))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _recorded_samples(asked: Mapping[str, Any]) -> Path | None:
    """The images of the export, where they are still there."""
    folder = asked.get("samples")
    return Path(folder) if isinstance(folder, str) and Path(folder).is_dir() else None


def _golden_inputs(bundle: Bundle) -> Arrays:
    golden = bundle.golden()
    return {name: golden[name] for name in bundle.sample_names}


def _one_call(bundle: Bundle, engine: Engine) -> Any:
    """One image, or a fixed batch, of the golden samples."""
    inputs = _golden_inputs(bundle)
    rows = np.arange(bundle.fixed_batch or 1) % bundle.manifest["golden"]["num_samples"]
    return partial(runner(engine, bundle.manifest).run, {name: array[rows] for name, array in inputs.items()})


def _golden_classes(bundle: Bundle, engine: Engine) -> Classes | None:
    if (output := bundle.class_output) is None:
        return None
    found = run_in_chunks(
        runner(engine, bundle.manifest), _golden_inputs(bundle), batch=bundle.fixed_batch, outputs=[output]
    )
    return classes_of(bundle.golden()[output], found[output], None)


def _compared(mine: Backbone, fp32: Backbone, photos: Photos) -> tuple[list[Comparison], Classes | None]:
    """Both on the same images and patches."""
    bundle = mine.bundle
    pixels, labels = photos.read(bundle.preprocess)[0], photos.labels(bundle)
    parts: dict[str, list[tuple[Array, Array]]] = {}
    with progress("certificate", len(pixels)) as bar:
        for first in range(0, len(pixels), _BATCH):
            batch = pixels[first : first + _BATCH]
            outputs = bundle.output_names if first < _COMPARED else tuple(filter(None, [bundle.class_output]))
            keep = None
            if "K" in bundle.manifest["profile"] and bundle.token_mode != "cached":
                items = range(first, first + len(batch))
                keep = random_patches(bundle.num_patches, bundle.manifest["profile"]["K"][1], items, 0)
            found, expected = (backbone.run_cropped(batch, keep, outputs=outputs) for backbone in (mine, fp32))
            for name in outputs:
                parts.setdefault(name, []).append((expected[name], found[name]))
            bar.advance(len(batch))
    joined = {name: [np.concatenate(arrays) for arrays in zip(*pairs, strict=True)] for name, pairs in parts.items()}
    comparisons = [compare(expected[:_COMPARED], found[:_COMPARED], name) for name, (expected, found) in joined.items()]
    if bundle.class_output is None:
        return comparisons, None
    reference, scores = joined[bundle.class_output]
    return comparisons, classes_of(reference, scores, labels)
