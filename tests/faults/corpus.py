"""Bundles to plant faults into: small networks with random weights that tell images apart, in every token mode and
precision, exported by the command line.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import count, product
from pathlib import Path

from mae_deploy.cli import main
from mae_deploy.models.config import EncoderConfig
from mae_deploy.models.vit import Classifier
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.engines.base import EngineOptions
from mae_deploy.runtime.verify import verify_bundle
from tests.export.robust_exports import settled, write_blots
from tests.export.tiny_exports import CLASS_NAMES, write_checkpoint

CONFIG = EncoderConfig(name="small", image_size=(32, 32), patch_size=4, embed_dim=64, depth=3, num_heads=4)
ROTARY = {
    "dinov3": replace(CONFIG, rotary="dinov3", position_table=False, num_registers=2, activation="swiglu"),
    "mixed": replace(CONFIG, rotary="mixed", rotary_base=10.0, position_table=False),
}
_INT8 = ("--precision", "int8", "--max-latency", "1000", "--outputs", "cls,tokens,pooled")
EXPORTS: dict[str, tuple[str, ...]] = {
    "full fp32": (),
    "visible fp32": ("--tokens", "visible"),
    "visible:20 of 2 fp32": ("--tokens", "visible:20", "--batch", "2"),
    "ragged fp32": ("--tokens", "ragged"),
    "cached fp32": ("--tokens", "cached"),
    "visible fp32, OpenVINO": ("--tokens", "visible", "--engine", "openvino"),
    "full fp16": ("--precision", "fp16"),
    "ragged fp16": ("--tokens", "ragged", "--precision", "fp16"),
    "cached fp16": ("--tokens", "cached", "--precision", "fp16"),
    "full bf16": ("--precision", "bf16"),
    "full int8, dynamic": _INT8,
    "visible int8, static, OpenVINO": ("--tokens", "visible", "--engine", "openvino", *_INT8),
}
"""What is exported, by a name."""


def rotary_bundle(folder: Path, kind: str) -> Path:
    """Of a network with rotary positions, for faults in these."""
    checkpoint, photos = _network(folder, seed=0, config=ROTARY[kind])
    _export(checkpoint, photos, folder / kind, "--tokens", "visible", "--num-samples", "8")
    return folder / kind


def bundles(folder: Path, only: str | None = None) -> Iterator[tuple[str, Path]]:
    """Each kind of bundle, of the same network."""
    checkpoint, photos = _network(folder, seed=0)
    for name, options in EXPORTS.items():
        if only is None or only in name:
            out = folder / name.replace(" ", "-")
            _export(checkpoint, photos, out, *options)
            yield name, out


def clean_runs(folder: Path, runs: int, first_seed: int = 1) -> list[str]:
    """Right networks, exported and verified, with other seeds, engines and numbers of threads; what was refused.

    Each export and each `verify` is a run.
    """
    refused: list[str] = []
    done = 0
    for seed in count(first_seed):
        print(f"seed {seed}: {done} of {runs} clean runs, {len(refused)} refused", file=sys.stderr, flush=True)
        checkpoint, photos = _network(folder / str(seed), seed)
        for name, options in EXPORTS.items():
            if done >= runs:
                return refused
            out, done = folder / str(seed) / name.replace(" ", "-"), done + 1
            try:
                _export(checkpoint, photos, out, *options)
            except AssertionError as error:
                refused.append(f"seed {seed}, {name}: {error}")
                continue
            bundle = Bundle.load(out)
            other = {"onnxruntime", "openvino"} if bundle.precision == "fp32" else {bundle.manifest["engine"]}
            for engine, threads in product(sorted(other), (1, 2)):
                done += 1
                failures = verify_bundle(bundle, engine, EngineOptions(threads=threads)).failures
                refused += [f"seed {seed}, {name} on {engine}, {threads} threads: {failure}" for failure in failures]
        shutil.rmtree(folder / str(seed))
    return refused


def _network(folder: Path, seed: int, config: EncoderConfig = CONFIG) -> tuple[Path, Path]:
    """A classifier and its images, enough to calibrate with."""
    photos = write_blots(folder / "photos", 128, first=1000 * seed)
    model = settled(lambda: Classifier(config, num_classes=len(CLASS_NAMES), pool="cls"), seed)
    return write_checkpoint(folder / "checkpoint", model, class_names=CLASS_NAMES), photos


def _export(checkpoint: Path, photos: Path, out: Path, *options: str) -> None:
    calibration = ("--calib-data", str(photos)) if "int8" in options else ()
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        common = ("--samples", str(photos), "--out", str(out), "--threads", "1")
        code = main(["export", str(checkpoint), *common, *options, *calibration])
    assert code == 0, said.getvalue().splitlines()[-2:]
