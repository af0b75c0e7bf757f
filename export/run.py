"""Export: write the graph, check it against PyTorch, and only then leave a bundle behind."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np

from mae_deploy import __version__
from mae_deploy.checkpoint import inherited_licence
from mae_deploy.config import to_dict
from mae_deploy.errors import CheckFailed
from mae_deploy.export.config import ExportConfig
from mae_deploy.export.graph.spec import block_tensor
from mae_deploy.export.job import ExportJob, compute_reference, prepare
from mae_deploy.export.proof import (
    ParityRecord,
    check_parity,
    engine_name,
    refuse,
    tolerance_of,
)
from mae_deploy.export.quantization.plan import Int8Plan, plan_int8
from mae_deploy.export.samples import synthetic_frame
from mae_deploy.export.tensorrt import BASELINE_FILE, SPEED_LEFT, DeviceProof, build_and_gate, require_tensorrt
from mae_deploy.export.trials import GOLDEN
from mae_deploy.files import atomic_path, refuse_to_overwrite, remove, temporary_folder, write_json
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.models.config import BEYOND_PLAIN, EncoderConfig
from mae_deploy.progress import Bar, notice, progress
from mae_deploy.reporting.bundles import PARITY
from mae_deploy.reporting.card import write_card
from mae_deploy.reporting.command_line import next_command
from mae_deploy.reporting.licence import say_licence
from mae_deploy.reporting.preprocess import PREPROCESS_FROM
from mae_deploy.reporting.tables import Column, Table, facts_table
from mae_deploy.results import Result
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.engines.base import Engine
from mae_deploy.runtime.manifest import (
    BLOCKS,
    FRAME,
    FRAME_IMAGE,
    GOLDEN_FILE,
    GRAPH_FILE,
    IMAGES,
    MANIFEST_FILE,
    PLANNED,
    SCHEMA_VERSION,
    EngineEntry,
    Manifest,
    ModelEntry,
    file_entry,
    plan_engine,
)
from mae_deploy.runtime.parity.checks import Verification, verify_engine
from mae_deploy.runtime.parity.own_noise import noise_record
from mae_deploy.runtime.parity.trials import EXTREMES, exported_array, trial_arrays
from mae_deploy.serving.write import left_to_serve, refuse_to_serve_over, write_for_servers
from mae_deploy.weights.load import read_weights

_NO_SERVERS = {"triton": None, "deepstream": None}
"""Settings of an export that change nothing in its bundle."""


_BLOCK_SAMPLES, _BLOCK_TOKENS = 2, 17
"""How much of every block's output goes into the bundle for `verify --layers`."""


def run_export(config: ExportConfig) -> Result:
    """Export a checkpoint to a bundle; nothing is left behind unless every output meets its tolerance.

    Raises:
        CheckFailed: the graph does not compute what PyTorch computes, or INT8 is slower or less accurate than its
            budget.
        MissingDependency: the engine's package or its device is absent.
    """
    if (left := _left_to_serve(config)) is not None:
        return left
    refuse_to_overwrite(config.out)
    refuse_to_serve_over(config.out, triton=config.triton, deepstream=config.deepstream)
    if builds := config.is_planned and config.build:
        require_tensorrt(config)
    with progress("export", 4 + builds) as bar:
        job = prepare(config)
        bar.advance(1, "checkpoint and images read")
        compute_reference(job)
        bar.advance(1, "PyTorch reference computed")
        with atomic_path(config.out) as aside:
            rejected: dict[str, str] = {}
            try:
                made = _make(aside, job, bar)
            except CheckFailed as error:
                if config.int8.prefer is None:
                    raise
                rejected = {"rejected": str(error)}
                notice("FP16:", f"is exported in its place: {error}")
                remove(aside)
                made = _make(aside, job.in_precision("fp16"), bar)
            write_card(made.bundle, config.out.name)
            files = {name: entry["size"] for name, entry in made.bundle.manifest["files"].items()}
    say_licence(made.bundle.licence, "this bundle")
    served = _serve(Bundle.load(config.out), triton=config.triton, deepstream=config.deepstream)
    data = {**_data(made), **rejected, **({"served": served} if served else {}), "files": files}
    return Result(data, _view(data), then=next_command("verify", config.out))


def _left_to_serve(config: ExportConfig) -> Result | None:
    """What is left to do of this very call, which was ended when the bundle was there, but not all that serves it."""
    if (config.triton is None and config.deepstream is None) or not (config.out / MANIFEST_FILE).is_file():
        return None
    bundle = Bundle.load(config.out)
    made_of = bundle.manifest["provenance"]
    own = {"export": {**to_dict(config), **_NO_SERVERS}, "checkpoint": read_weights(config.checkpoint).record}
    before = {name: made_of.get(name) for name in own}
    if isinstance(before["export"], dict):
        before["export"] = {**before["export"], **_NO_SERVERS}
    if json.loads(json.dumps(own, default=str)) != before:
        return None
    left = left_to_serve(bundle, _first_engine(bundle), triton=config.triton, deepstream=config.deepstream)
    if not any(left.values()):
        return None
    notice("kept:", f"{config.out}, which the same call has exported before; what serves it is written now")
    served = _serve(bundle, **left)
    data = {"out": str(config.out), "served": served}
    return Result(data, facts_table(str(config.out), served), then=next_command("verify", config.out))


def _first_engine(bundle: Bundle) -> EngineEntry | None:
    return next(iter(bundle.manifest["engines"]), None)


def _serve(bundle: Bundle, *, triton: Path | None, deepstream: Path | None) -> dict[str, str]:
    """Write the new bundle for the servers that are asked for: its engine, where one was built, else its graph."""
    written = write_for_servers(bundle, _first_engine(bundle), triton=triton, deepstream=deepstream)
    for server, folder in written.items():
        notice(f"{server}:", f"written to {folder}")
    return written


@dataclass(frozen=True, kw_only=True, slots=True)
class _Made:
    """A bundle that was checked."""

    job: ExportJob
    bundle: Bundle
    plan: Int8Plan | None
    proof: ParityRecord
    device: DeviceProof | None
    """Of TensorRT's engine."""


def _make(folder: Path, job: ExportJob, bar: Bar) -> _Made:
    """Write a bundle and check it; for TensorRT also build its engine, unless that is left to the device."""
    folder.mkdir()
    plan = plan_int8(job, folder, partial(_verify_plan, job)) if job.config.quantized else None
    bundle = _write_bundle(folder, job, plan)
    bar.advance(1, "bundle written")
    proof = check_parity(job, bundle, bundle.tolerance, plan.speed if plan is not None else None)
    if proof.failures:
        raise refuse(job, bundle, proof, plan.leave_table(job.config.out) if plan is not None else None)
    _record(bundle, job, proof)
    bar.advance(1, "checked")
    device = None
    if job.config.is_planned and job.config.build:
        device = build_and_gate(job, bundle)
        _record_device(bundle, device)
        bar.advance(1, "engine built")
    return _Made(job=job, bundle=bundle, plan=plan, proof=proof, device=device)


def _verify_plan(job: ExportJob, plan: Int8Plan, engine: Engine) -> Verification:
    """The checks of the bundle that this plan would give."""
    with temporary_folder() as folder:
        return verify_engine(_write_bundle(folder, job, plan), engine)


def _data(made: _Made) -> dict[str, Any]:
    """What the command reports."""
    config, proof, plan, device = made.job.config, made.proof, made.plan, made.device
    measured = device if device is not None and device.comparisons else None
    classes = measured.classes if measured is not None else proof.classes
    accuracy = classes.top1 if classes is not None else None
    return {
        "out": str(config.out),
        "tokens": config.tokens,
        "precision": config.precision,
        "typing": config.resolved_typing,
        "engine": engine_name(config.engine),
        "parity": measured.record()["outputs"] if measured is not None else proof.figures(),
        "samples": made.job.samples.source,
        **({"accuracy": {"fp32": accuracy[0], config.precision: accuracy[1]}} if accuracy is not None else {}),
        **(
            {"quantization": {**plan.summary(), **(made.bundle.manifest["quantization"] or {})}}
            if plan is not None
            else {}
        ),
        **({"built": device.summary()} if device is not None else {}),
        "licence": made.bundle.licence,
    }


def _write_bundle(folder: Path, job: ExportJob, plan: Int8Plan | None) -> Bundle:
    config, loaded = job.config, job.loaded
    graph = plan.graph() if plan is not None else job.graph()
    files = graph.save(folder / GRAPH_FILE)
    if config.is_planned and plan is not None:
        files += job.in_precision("fp16").graph().save(folder / BASELINE_FILE)
    golden = _golden(job)
    encoder, metadata = loaded.encoder_config, loaded.metadata
    reports = plan.write_table(folder) if plan is not None else []
    told = {PREPROCESS_FROM: job.preprocess_from} if job.preprocess_from is not None else {}
    pyramid = {"pyramid": job.pyramid.record} if job.pyramid is not None else {}
    manifest: Manifest = {
        "schema_version": SCHEMA_VERSION,
        "mae_deploy_version": __version__,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "kind": metadata.kind if config.token_mode == "reconstruct" or metadata.kind == "classifier" else "encoder",
        "model": cast(ModelEntry, _given(encoder)),
        "decoder": metadata.decoder if config.token_mode == "reconstruct" else None,
        "class_names": list(metadata.class_names) if metadata.class_names is not None else None,
        "token_mode": config.token_mode,
        "num_patches": encoder.num_tokens,
        "batch": config.fixed_batch,
        "keep": config.keep,
        "profile": {name: list(sizes) for name, sizes in job.ranges.items()},
        "precision": config.precision,
        "typing": config.resolved_typing,
        "engine": engine_name(config.engine),
        "graph": {
            "file": GRAPH_FILE,
            "opset": graph.opset,
            "inputs": graph.inputs(),
            "outputs": graph.outputs(),
            "blocks": [block_tensor(index) for index in range(encoder.blocks)],
        },
        "preprocess": _preprocess(job.preprocess),
        "provenance": {"export": to_dict(config), "checkpoint": loaded.record, **told, **pyramid},
        "licence": (
            metadata.licence if job.pyramid is None else inherited_licence(metadata.licence, job.pyramid.licence)
        ),
        "tolerance": cast(Any, tolerance_of(job).to_dict()),
        "parity": {},
        "quantization": _quantization(config, plan) if plan is not None else None,
        "golden": {"file": GOLDEN_FILE, "source": job.samples.source, "num_samples": len(golden[job.names[0]])},
        "engines": [],
        "files": {path.name: file_entry(path) for path in [*files, *reports]},
    }
    golden |= exported_array(manifest)
    with (folder / GOLDEN_FILE).open("wb") as stream:
        np.savez_compressed(stream, **golden)
    manifest["files"][GOLDEN_FILE] = file_entry(folder / GOLDEN_FILE)
    write_json(folder / MANIFEST_FILE, manifest)
    return Bundle.load(folder)


def _given(encoder: EncoderConfig) -> dict[str, Any]:
    """Without what is not set or as in the original's ViT: an older version reads the manifest of a model that has
    nothing of it.
    """
    plain = {*BEYOND_PLAIN} - encoder.beyond_plain().keys()
    return {name: value for name, value in to_dict(encoder).items() if value is not None and name not in plain}


def _preprocess(spec: Preprocess) -> dict[str, Any]:
    """Without a crop mode where it is center, as older versions know no other."""
    return {
        name: value
        for name, value in to_dict(spec).items()
        if value is not None and (name, value) != ("crop_mode", "center")
    }


def _golden(job: ExportJob) -> dict[str, Any]:
    """The first samples as the graph takes them, PyTorch's outputs, and a part of what every block gives."""
    samples, *others = job.trials
    inputs, expected = (
        {name: array[:GOLDEN] for name, array in arrays.items()} for arrays in (samples.inputs, samples.expected)
    )
    blocks = job.reference.blocks(inputs, _BLOCK_SAMPLES, _BLOCK_TOKENS)
    frame = synthetic_frame(job.preprocess)
    more: dict[str, Any] = {}
    for trial in others:
        given = job.as_graph_takes(trial.inputs, trial.pixels)
        if trial.name != EXTREMES:  # of the golden samples
            given.pop(IMAGES, None)
        more |= trial_arrays(trial.name, {**given, **trial.expected})
    return {
        **job.as_graph_takes(inputs, samples.pixels),
        **expected,
        **more,
        BLOCKS: blocks,
        FRAME: frame,
        FRAME_IMAGE: job.preprocess([frame])[0],
    }


def _quantization(config: ExportConfig, plan: Int8Plan) -> dict[str, Any]:
    """The manifest's record; of TensorRT, what its engine is to be compared with."""
    return {**plan.record(), "baseline": BASELINE_FILE, "speed": SPEED_LEFT} if config.is_planned else plan.record()


def _record(bundle: Bundle, job: ExportJob, proof: ParityRecord) -> None:
    """Put what was checked into the manifest."""
    verification = {key: value for key, value in proof.verification.to_dict().items() if key != "bundle"}
    emulated = {"emulated": "bf16"} if job.config.emulates_bf16 else {}
    noise = noise_record(proof.verification.figures, proof.blocks_db)
    figures = {**verification, **noise, **emulated, "num_samples": len(job.samples.pixels), "outputs": proof.figures()}
    bundle.manifest["certificate"] = proof.certificate
    bundle.manifest["parity"] = {f"onnx-{job.config.precision}": figures}
    write_json(bundle.path / MANIFEST_FILE, bundle.manifest)


def _record_device(bundle: Bundle, device: DeviceProof) -> None:
    """Put into the manifest what was measured of the engine."""
    manifest = bundle.manifest
    if device.comparisons:
        engine = plan_engine(device.built.entry)
        manifest["parity"][f"{engine}-{device.built.entry['precision']}"] = device.record()
    if manifest["quantization"] is not None:
        manifest["quantization"] |= device.speed()
    write_json(bundle.path / MANIFEST_FILE, manifest)


def _view(data: dict[str, Any]) -> Table:
    """A row for each output; what was decided stands below."""
    title = (
        f"{data['out']}: {data['tokens']} tokens, {data['precision']} on {data['engine']}, parity with PyTorch on"
        f" {data['samples']}"
    )
    notes = [data[part]["text"] for part in ("quantization", "built") if part in data]
    if "built" not in data and data["engine"] in PLANNED:
        speed = f"; {SPEED_LEFT}" if "quantization" in data else ""
        notes.append(f"no engine was built: mae-deploy build-engine {data['out']} does that on the device{speed}")
    # JSON has no infinity: of an output that is equal to the last bit, the ratio is null.
    rows = [{**row, "sqnr_db": math.inf if row["sqnr_db"] is None else row["sqnr_db"]} for row in data["parity"]]
    columns = (Column("output", "name"), *PARITY, Column("top-1", "top1_agreement", "{:.1f} %", 100))
    return Table(title, columns, rows, notes)
