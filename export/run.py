"""Export: write the graph, prove it against PyTorch, and only then leave a bundle behind."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from rich.table import Table
from rich.text import Text

from mae_deploy import __version__
from mae_deploy.checkpoint import NON_COMMERCIAL, UNKNOWN_LICENCE
from mae_deploy.config import from_dict, to_dict
from mae_deploy.errors import CheckFailed, MissingDependency
from mae_deploy.export.config import ExportConfig
from mae_deploy.export.graph import GraphSpec, available_outputs, build_graph
from mae_deploy.export.onnx_builder import OPSET, GraphBuilder
from mae_deploy.export.reference import reference_outputs
from mae_deploy.export.samples import Samples, read_samples, visible_patches
from mae_deploy.files import atomic_path, refuse_to_overwrite, write_json
from mae_deploy.models.config import EncoderConfig
from mae_deploy.models.load import Loaded, encoder_of, read_weights
from mae_deploy.models.position import interpolate_position_embedding
from mae_deploy.options import Result
from mae_deploy.preprocess import Array, Preprocess
from mae_deploy.progress import notice, progress
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.engine import run_in_chunks
from mae_deploy.runtime.manifest import GOLDEN_FILE, GRAPH_FILE, IDS_KEEP, IMAGES, MANIFEST_FILE, SCHEMA_VERSION, Manifest, ModelEntry, file_entry
from mae_deploy.runtime.parity import Comparison, Tolerance, compare
from mae_deploy.runtime.registry import load_engine
from mae_deploy.runtime.verify import Verification, verify_engine

TOLERANCE = Tolerance(cosine=0.99999, max_abs=1e-4)
"""FP32 against FP32: two orders of summation over the same numbers differ by a few 1e-6."""

_GOLDEN = 8
"""Samples that go into the bundle; also how many are run at a time."""

_EXTREME = 2
"""Samples that are also run with one patch and with all of them, where K is dynamic."""


def run(config: ExportConfig) -> Result:
    """Export a checkpoint to a bundle; nothing is left behind unless every output meets its tolerance.

    Raises:
        CheckFailed: the graph does not compute what PyTorch computes.
    """
    refuse_to_overwrite(config.out)
    with progress("export", 4) as bar:
        loaded = _resized(read_weights(config.checkpoint), config.image_size)
        graph_spec = GraphSpec(token_mode=config.token_mode, keep=config.keep, batch=config.fixed_batch, outputs=config.outputs)
        graph = build_graph(loaded.metadata, loaded.tensors, graph_spec)
        bar.advance(1, "graph built")
        spec = from_dict(Preprocess, loaded.metadata.preprocess)
        samples = read_samples(config.samples, loaded.metadata, spec, config.num_samples)
        inputs = {IMAGES: samples.images}
        if config.token_mode == "visible":
            inputs[IDS_KEEP] = visible_patches(loaded.encoder_config.num_patches, config.keep, len(samples.images), config.seed)
        names = config.outputs or available_outputs(loaded.metadata)
        model, device = encoder_of(loaded), _device(config)
        expected = reference_outputs(model, samples.images, inputs.get(IDS_KEEP), names, device)
        extremes = [(few, reference_outputs(model, few[IMAGES], few[IDS_KEEP], names, device)) for few in _extremes(config, loaded, samples)]
        bar.advance(1, "PyTorch reference computed")
        with atomic_path(config.out) as aside:
            bundle = _write_bundle(aside, config, loaded, samples, graph, inputs, expected)
            bar.advance(1, "bundle written")
            verification, ladder = _prove(bundle, inputs, expected, extremes)
            bar.advance(1, "proven")
            manifest = cast(dict[str, Any], bundle.manifest)
            manifest["parity"] = {
                "onnx-fp32": {**{k: v for k, v in verification.to_dict().items() if k != "bundle"}, "num_samples": len(samples.images), "outputs": ladder}
            }
            write_json(aside / MANIFEST_FILE, manifest)
            files = {name: entry["size"] for name, entry in bundle.manifest["files"].items()}
    _say_licence(loaded.metadata.licence)
    data = {
        "out": str(config.out),
        "tokens": config.tokens,
        "precision": config.precision,
        "parity": ladder,
        "samples": samples.source,
        "licence": loaded.metadata.licence,
        "files": files,
    }
    return Result(data, _view(data))


def _resized(loaded: Loaded, image_size: tuple[int, int] | None) -> Loaded:
    """The same weights for another input size, the position embeddings interpolated once and for all."""
    if image_size is None or image_size == loaded.encoder_config.image_size:
        return loaded
    source = loaded.encoder_config
    target = from_dict(EncoderConfig, {**loaded.metadata.encoder, "image_size": image_size})
    positions = interpolate_position_embedding(loaded.tensors["pos_embed"].float(), source.grid_size, target.grid_size)
    preprocess = {**loaded.metadata.preprocess, "image_size": list(image_size)}
    metadata = replace(loaded.metadata, encoder=to_dict(target), preprocess=preprocess)
    return Loaded(metadata, {**loaded.tensors, "pos_embed": positions}, loaded.record)


def _write_bundle(
    folder: Path, config: ExportConfig, loaded: Loaded, samples: Samples, graph: GraphBuilder, inputs: dict[str, Array], expected: dict[str, Array]
) -> Bundle:
    folder.mkdir()
    files = graph.save(folder / GRAPH_FILE)
    golden: dict[str, Any] = {name: array[:_GOLDEN] for name, array in {**inputs, **expected}.items()}
    with (folder / GOLDEN_FILE).open("wb") as file:
        np.savez_compressed(file, **golden)
    encoder, metadata = loaded.encoder_config, loaded.metadata
    manifest: Manifest = {
        "schema_version": SCHEMA_VERSION,
        "mae_deploy_version": __version__,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "kind": "classifier" if metadata.kind == "classifier" else "encoder",
        "model": cast(ModelEntry, to_dict(encoder)),
        "class_names": list(metadata.class_names) if metadata.class_names is not None else None,
        "token_mode": config.token_mode,
        "num_patches": encoder.num_patches,
        "batch": config.fixed_batch,
        "keep": config.keep,
        "precision": config.precision,
        "graph": {"file": GRAPH_FILE, "opset": OPSET, "inputs": graph.inputs(), "outputs": graph.outputs()},
        "preprocess": metadata.preprocess,
        "provenance": {"export": to_dict(config), "checkpoint": loaded.record},
        "licence": metadata.licence,
        "tolerance": {"cosine": TOLERANCE.cosine, "max_abs": TOLERANCE.max_abs},
        "parity": {},
        "golden": {"file": GOLDEN_FILE, "source": samples.source, "num_samples": len(golden[IMAGES])},
        "engines": [],
        "files": {path.name: file_entry(path) for path in [*files, folder / GOLDEN_FILE]},
    }
    write_json(folder / MANIFEST_FILE, manifest)
    return Bundle.load(folder)


def _extremes(config: ExportConfig, loaded: Loaded, samples: Samples) -> list[dict[str, Array]]:
    """Inputs for the smallest and the largest K of a graph that leaves K open."""
    if config.token_mode != "visible" or config.keep is not None:
        return []
    images, N = samples.images[:_EXTREME], loaded.encoder_config.num_patches
    return [{IMAGES: images, IDS_KEEP: visible_patches(N, K, len(images), config.seed)} for K in (1, N)]


def _prove(
    bundle: Bundle, inputs: dict[str, Array], expected: dict[str, Array], extremes: list[tuple[dict[str, Array], dict[str, Array]]]
) -> tuple[Verification, list[dict[str, Any]]]:
    """All samples against PyTorch, a few at both ends of K, and the invariances on the golden ones."""
    with load_engine(bundle) as engine:

        def judge(inputs: dict[str, Array], expected: dict[str, Array]) -> list[Comparison]:
            found = run_in_chunks(engine, inputs, batch=bundle.fixed_batch or _GOLDEN)
            return [compare(expected[name], found[name], name) for name in bundle.output_names]

        comparisons = judge(inputs, expected)
        at_the_ends = [comparison for pair in extremes for comparison in judge(*pair)]
        verification = verify_engine(bundle, engine)
    failures = [failure for comparison in comparisons + at_the_ends for failure in comparison.failures(TOLERANCE)] + verification.failures
    if failures:
        raise CheckFailed(
            f"the exported graph misses parity with PyTorch: {'; '.join(failures)}",
            hint="nothing was written; please report this with the checkpoint's metadata.json",
        )
    return verification, [_figures(comparison) for comparison in comparisons]


def _view(data: dict[str, Any]) -> Table:
    table = Table(title=Text(f"{data['out']}: {data['tokens']} tokens, {data['precision']}, parity with PyTorch on {data['samples']}"), title_justify="left")
    for name in ("output", "cosine", "centred cosine", "max abs", "SQNR dB"):
        table.add_column(name, justify="left" if name == "output" else "right")
    for row in data["parity"]:
        noise = "inf" if row["sqnr_db"] is None else f"{row['sqnr_db']:.1f}"
        table.add_row(row["name"], f"{row['cosine']:.7f}", f"{row['centred_cosine']:.7f}", f"{row['max_abs']:.2e}", noise)
    return table


def _figures(comparison: Comparison) -> dict[str, Any]:
    return {key: value for key, value in comparison.to_dict().items() if key != "reason"}


def _device(config: ExportConfig) -> str:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise MissingDependency("--device cuda, but torch sees no CUDA device")
    return "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"


def _say_licence(licence: str) -> None:
    if NON_COMMERCIAL in licence:
        notice("licence:", f"{licence}: these weights derive from a non-commercial release, and so does this bundle")
    elif UNKNOWN_LICENCE in licence:
        notice("licence:", f"{licence}: pass --license to 'mae-deploy import' to record what these weights may be used for")
