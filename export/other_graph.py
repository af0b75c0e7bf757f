"""Somebody else's ONNX file of a checkpoint's weights, put to the checks of our own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mae_deploy.config import from_dict
from mae_deploy.errors import ConfigError
from mae_deploy.export.config import ExportConfig
from mae_deploy.export.graph.spec import available_outputs
from mae_deploy.export.job import ExportJob, compute_reference, prepare
from mae_deploy.export.reference import ALL_TOKENS
from mae_deploy.export.trials import GOLDEN as SAMPLES
from mae_deploy.export.trials import Trial
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.images.read import Array
from mae_deploy.progress import notice
from mae_deploy.runtime.engines.base import Engine, EngineOptions, run_in_chunks
from mae_deploy.runtime.graph.check import Network, check_graph
from mae_deploy.runtime.manifest import CLASS_OUTPUTS, IDS_KEEP, IMAGES
from mae_deploy.runtime.onnx_file import read_inputs
from mae_deploy.runtime.parity.checks import GOLDEN, RUN_AGAIN, Check, Verification
from mae_deploy.runtime.parity.compare import compare
from mae_deploy.runtime.parity.trials import tolerance_of_trial
from mae_deploy.runtime.registry import open_graph
from mae_deploy.runtime.tolerance import TOLERANCES, Tolerance

Arrays = dict[str, Array]

MOST_IMAGES = 1024
"""That a graph with a fixed batch may take at once."""


@dataclass(frozen=True)
class _Input:
    name: str
    dtype: str
    shape: tuple[int | None, ...]
    """None: any."""

    @property
    def batch(self) -> int | None:
        return self.shape[0] if self.shape else None

    @property
    def keep(self) -> int | None:
        """Where these are indices of patches, how many."""
        return self.shape[1] if len(self.shape) == 2 else None

    def takes(self, array: Array) -> bool:
        """Whether this is of its shape, but for the batch."""
        return array.ndim == len(self.shape) and all(
            side in (None, found) for side, found in zip(self.shape[1:], array.shape[1:], strict=True)
        )

    def __str__(self) -> str:
        return f"{self.dtype} ({', '.join('?' if side is None else str(side) for side in self.shape)})"


def verify_graph(
    checkpoint: Path,
    graph: Path,
    *,
    engine: str = "auto",
    options: EngineOptions = EngineOptions(),
    precision: str = "fp32",
    samples: Path | None = None,
) -> Verification:
    """Run images through PyTorch and through the graph, and compare each of its outputs with what it must be.

    The graph takes the images, float32 `(B, C, H, W)` normalised as the checkpoint says, or uint8 `(B, H, W, C)`, and
    may take int64 `ids_keep (B, K)`, under whatever names. An output is known by its name, where that is ours, else by
    its shape; which it is taken for is said.

    Args:
        precision: whose tolerance the outputs must meet.
        samples: a folder of images; default: the data of the checkpoint.

    Raises:
        ConfigError: no such graph, or inputs or outputs that this checkpoint does not have.
        MissingDependency: the engine's package is absent.
        MaeDeployError: the engine refuses the graph or the images.
    """
    inputs = _graph_inputs(graph)
    if (inputs[0].batch or 1) > MOST_IMAGES:
        raise ConfigError(f"{graph} takes {inputs[0].batch:,} images at once; at most {MOST_IMAGES:,} can be checked")
    if len(inputs) > 2:
        raise ConfigError(
            f"{graph} takes {', '.join(entry.name for entry in inputs)}; a graph of images, or of images and ids_keep,"
            " can be checked"
        )
    keep = next((f":{entry.keep}" for entry in inputs[1:] if entry.keep), "")
    config = ExportConfig(
        checkpoint=checkpoint,
        out=graph,
        tokens="full" if len(inputs) == 1 else f"visible{keep}",
        samples=samples,
        num_samples=SAMPLES,
    )
    job = prepare(config)
    known = available_outputs(job.loaded.metadata, config.token_mode)
    job = replace(job, names=(*(name for name in known if not name.startswith("block_")), ALL_TOKENS))
    compute_reference(job)
    given = _given(job.trials[0], graph, inputs)
    shapes, fixed = {name: array.shape for name, array in given.items()}, inputs[0].batch
    batches = (fixed,) if fixed else (1, len(given[inputs[0].name]))
    encoder = job.loaded.encoder_config
    check = check_graph(
        graph,
        [{name: (batch, *shape[1:]) for name, shape in shapes.items()} for batch in batches],
        Network(tokens=encoder.num_prefix + encoder.num_tokens, dim=encoder.width, heads=encoder.heads),
    )
    with open_graph(graph, engine, options, precision=precision, check=check) as loaded:
        found = _verification(job, graph, inputs, given, loaded, precision)
        if not found.outputs_pass:
            _say_what_fits(job, graph, inputs[0], given, loaded, TOLERANCES[precision])
        return found


def _say_what_fits(
    job: ExportJob, graph: Path, images: _Input, given: Arrays, engine: Engine, tolerance: Tolerance
) -> None:
    """Where outputs miss because of what was done to the images before, say what would be right."""
    right, own = job.trials[0].expected, given[images.name]
    last = own.shape[1:] == job.samples.pixels.shape[1:]
    pixels = (job.samples.pixels if last else job.samples.pixels.transpose(0, 3, 1, 2)).astype(np.float64)
    largest = from_dict(Preprocess, job.loaded.metadata.preprocess).divisor
    for what, other in {
        "images as pixels from 0 to 1, which the graph normalises": pixels / largest,
        "images as pixels from 0 to 255, which the graph normalises": 255 / largest * pixels,
        "images with their channels in the other order": own[..., ::-1] if last else own[:, ::-1],
    }.items():
        inputs = {**given, images.name: np.ascontiguousarray(other.astype(own.dtype))}
        found = run_in_chunks(engine, inputs, batch=images.batch)
        meant = {output: right[_meaning(graph, output, array, right)] for output, array in found.items()}
        if not any(compare(meant[output], array, output).failures(tolerance) for output, array in found.items()):
            notice("input:", f"{graph} is right for {what}")
            return


def _graph_inputs(graph: Path) -> list[_Input]:
    """What the graph takes, images first.

    Raises:
        ConfigError: no such file, or none that ONNX can read.
    """
    found = []
    for entry in read_inputs(graph):
        shape = tuple(side if isinstance(side, int) else None for side in entry["shape"])
        found.append(_Input(entry["name"], entry["dtype"], shape))
    if not found:
        raise ConfigError(f"{graph} takes no input")
    return sorted(found, key=lambda entry: len(entry.shape) != 4)


def _given(trial: Trial, graph: Path, inputs: Sequence[_Input]) -> Arrays:
    """What the graph is fed with, by its own names.

    Raises:
        ConfigError: an input that neither images of this checkpoint nor indices of patches are.
    """
    samples, dtype = trial.inputs, inputs[0].dtype
    if dtype not in ("float32", "float16", "bfloat16", "float64", "uint8"):
        raise ConfigError(f"{graph} takes images of {dtype}", hint="float32 (B, C, H, W), or uint8 (B, H, W, C)")
    images = trial.pixels if dtype == "uint8" else samples[IMAGES].astype(dtype)
    own, turned = inputs[0], (0, 2, 3, 1) if dtype != "uint8" else (0, 3, 1, 2)
    if not own.takes(images) and own.takes(images.transpose(turned)):
        images = np.ascontiguousarray(images.transpose(turned))
        if not trial.name:
            notice(f"input '{own.name}':", f"images with channels {'first' if dtype == 'uint8' else 'last'}")
    given = {own.name: images, **{entry.name: samples[IDS_KEEP] for entry in inputs[1:]}}
    for entry in inputs:
        array = given[entry.name]
        if not entry.takes(array) or (entry is not own and entry.dtype not in ("int64", "int32")):
            what = "images of this checkpoint" if entry is own else "indices of patches, ids_keep,"
            raise ConfigError(
                f"input '{entry.name}' of {graph} takes {entry}; {what} are {array.dtype}"
                f" ({', '.join(map(str, ('?', *array.shape[1:])))})",
                hint="export the graph for them, or give the checkpoint that it was made of",
            )
        given[entry.name] = array.astype(entry.dtype) if entry is not own else array
    return given


def _verification(
    job: ExportJob, graph: Path, inputs: Sequence[_Input], given: Arrays, engine: Engine, precision: str
) -> Verification:
    samples, *others = job.trials
    expected, batch, S, tolerance = samples.expected, inputs[0].batch, len(samples.pixels), TOLERANCES[precision]

    def run(order: Array, step: int | None = batch) -> Arrays:
        return run_in_chunks(engine, {name: array[order] for name, array in given.items()}, batch=step)

    order = np.arange(S)
    found = run(order)
    names = {output: _meaning(graph, output, array, expected) for output, array in found.items()}
    for output, name in names.items():
        if output != name:
            notice(f"output '{output}':", f"taken for {name}, {' x '.join(map(str, found[output].shape[1:]))}")
    right = {output: expected[name] for output, name in names.items()}
    runs = [
        (GOLDEN, right, found, tolerance),
        (RUN_AGAIN, found, run(order), TOLERANCES["fp32"]),
    ]
    for trial in others:
        outputs = run_in_chunks(engine, _given(trial, graph, inputs), batch=batch)
        limits = tolerance_of_trial(trial.name, precision, tolerance)
        runs.append((trial.name, {output: trial.expected[name] for output, name in names.items()}, outputs, limits))
    if batch is None and S > 1:
        runs.append(("sample alone", right, run(order, 1), tolerance))
    elif S > 1 and batch != 1:
        turned = np.roll(order, 1)
        other = {output: array[turned] for output, array in right.items()}
        runs.append(("other neighbours", other, run(turned), tolerance))
    return Verification(
        bundle=str(graph),
        engine=engine.name,
        engine_version=engine.version,
        device=engine.device,
        num_samples=S,
        tolerance=tolerance,
        trials=tuple(trial.name for trial in others),
        checks=tuple(
            _check(check, names[output], must_be[output], array, limits)
            for check, must_be, outputs, limits in runs
            for output, array in outputs.items()
        ),
    )


def _check(check: str, name: str, expected: Array, found: Array, tolerance: Tolerance) -> Check:
    comparison = compare(expected, found, name)
    return Check(check, comparison, tuple(comparison.failures(tolerance)))


def _meaning(graph: Path, output: str, found: Array, expected: Mapping[str, Array]) -> str:
    """Which of PyTorch's outputs this is: the one of its name, else the nearest of its shape.

    Raises:
        ConfigError: none.
    """
    if found.dtype.kind not in "fiub":
        raise ConfigError(f"output '{output}' of {graph} holds {found.dtype.name}s, not numbers")
    if output in expected and expected[output].shape == found.shape:
        return output
    fitting = [name for name in expected if expected[name].shape == found.shape]
    if not fitting:
        known = ", ".join(f"{name} {expected[name].shape[1:]}" for name in expected)
        raise ConfigError(
            f"output '{output}' of {graph} has the shape {found.shape[1:]} an image; this checkpoint gives {known}"
        )
    if output not in CLASS_OUTPUTS and {*CLASS_OUTPUTS} <= {*fitting}:
        sums_to_one = np.allclose(found.sum(axis=1, dtype=np.float64), 1, atol=1e-2) and found.min() >= 0
        return "probs" if sums_to_one else "logits"
    return min(fitting, key=lambda name: float(np.square(expected[name] - np.nan_to_num(found)).sum()))
