"""Exported bundles as teachers, on any engine of the runtime; where blocks are tapped, only the graph's part
up to them is run.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from onnx.utils import Extractor
from torch import Tensor

from mae_deploy.checkpoint import CheckpointKind
from mae_deploy.config import from_dict, to_dict
from mae_deploy.distill.config import TeacherConfig
from mae_deploy.distill.teachers.answers import answers_for
from mae_deploy.distill.teachers.base import SPATIAL_KINDS, check_offered, key_of, reason_against_grid
from mae_deploy.distill.teachers.images import TeacherImages
from mae_deploy.errors import ConfigError, MaeDeployError, MissingDependency
from mae_deploy.files import temporary_folder
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.images.read import Array
from mae_deploy.models.config import EncoderConfig
from mae_deploy.models.masking import Masking
from mae_deploy.models.taps import Tap, Taps
from mae_deploy.models.vit import rows_of
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.engines.base import Engine, EngineOptions, run_in_chunks
from mae_deploy.runtime.inputs import token_batch
from mae_deploy.runtime.manifest import IMAGES, PLANNED
from mae_deploy.runtime.registry import (
    ALIASES,
    DEFAULT,
    TENSORRT_RTX,
    fall_back,
    is_installed,
    load_engine,
    open_graph,
)
from mae_deploy.training.step import StepBatch

_HINTS = {
    "tokens": "export it again: this bundle does not say what its blocks' tensors are called",
    "qkv": "give the checkpoint itself: --teacher RUN",
    "decoder": "give the checkpoint itself: --teacher RUN",
    "latent": "export with --outputs cls,tokens; a mean-pooled classifier has neither",
    "cls": "export with --outputs cls; a mean-pooled classifier has none",
    "pooled": "export with --outputs pooled",
    "logits": "export a fine-tuned checkpoint, with --outputs logits",
    "pixels": "export a pretraining run with --tokens reconstruct",
}


class BundleTeacher:
    """A bundle, run by an engine; see `Teacher`."""

    def __init__(self, path: Path, settings: TeacherConfig) -> None:
        if settings.teacher_engine == "torch":
            raise ConfigError(
                f"--teacher-engine torch runs checkpoints, and {path} is a bundle",
                hint="pass --teacher-engine auto, onnx, openvino, trt or trt-rtx",
            )
        if settings.teacher_compile or settings.teacher_precision != "auto":
            raise ConfigError(
                f"--teacher-compile and --teacher-precision are for PyTorch, and {path} is a bundle",
                hint="its precision is that of its export",
            )
        self.bundle = bundle = Bundle.load(path)
        manifest = bundle.manifest
        if bundle.token_mode == "cached":
            raise ConfigError(
                f"the graph of {path} is for streams, and teaches nothing about single images",
                hint="export it with --tokens visible",
            )
        shape = from_dict(
            EncoderConfig,
            {name: value for name, value in manifest["model"].items() if name in EncoderConfig.__dataclass_fields__},
        )
        self.encoder_config: EncoderConfig | None = shape
        self.depth, self.width, self.num_heads = shape.blocks, shape.width, shape.heads
        self.decoder_depth = self.decoder_width = 0
        self.class_names = tuple(bundle.class_names) if bundle.class_names is not None else None
        outputs = {entry["name"]: entry["shape"] for entry in manifest["graph"]["outputs"]}
        self.num_classes = int(outputs["logits"][1]) if "logits" in outputs else None
        self.kind: CheckpointKind = manifest["kind"]
        self.licence = bundle.licence
        self.record: dict[str, Any] = {"bundle": str(path), "precision": bundle.precision, **manifest["provenance"]}
        self.preprocess = bundle.preprocess
        self.reason_against_subset: str | None = None
        self.settings = settings
        self._shape = shape
        self._offered = _kinds_of(bundle)

    @property
    def key(self) -> str:
        """See `Teacher`."""
        engine = self.engine
        files = {name: entry["sha256"] for name, entry in self.bundle.manifest["files"].items() if ".onnx" in name}
        return key_of(files, self._answers, engine.name, engine.version, engine.device, engine.precision)

    def watch(self, wanted: Collection[Tap], *, student: EncoderConfig, spec: Preprocess) -> None:
        """See `Teacher`."""
        check_offered(wanted, kinds=self._offered, depth=self.depth, hints=_HINTS)
        config, bundle = self._shape, self.bundle
        self.wanted = tuple(sorted(wanted))
        self.found, self.asked = config.grid_size, student.grid_size
        unlike, spatial = reason_against_grid(self.found, self.asked), any(tap.kind in SPATIAL_KINDS for tap in wanted)
        if spatial and config.band_groups is not None:
            raise ConfigError(
                "the teacher has groups of bands, and so several tokens at each place", hint="distil its logits"
            )
        if spatial and unlike is not None and (self.settings.teacher_grid == "resize" or Tap("pixels") in wanted):
            size = ",".join(str(side * config.patch) for side in student.grid_size)
            raise ConfigError(
                f"the bundle's graph has one size: {unlike}",
                hint=f"export it with --image-size {size}, or pass --teacher-grid interpolate",
            )
        self.reason_against_subset = (
            "its graph takes every patch; export it with --tokens visible" if bundle.token_mode == "full" else unlike
        )
        self._images = TeacherImages(spec, self.preprocess, config.image_size)
        self._answers = [self.wanted, self.asked, to_dict(spec), to_dict(self.preprocess)]

    def to(self, device: torch.device) -> None:
        """See `Teacher`."""
        asked = self.settings.teacher_engine
        name = _engine_for(self.bundle, asked, device)
        try:
            self._start(name, device)
        except MaeDeployError as error:  # its package is there, and does not load, or not on this GPU
            refused = name in PLANNED or isinstance(error, MissingDependency)
            if asked != "auto" or name == DEFAULT or not refused:
                raise
            self._start(fall_back(self.bundle, error, name), device)

    def _start(self, name: str, device: torch.device) -> None:
        options = EngineOptions(
            device=_device_for(name, device), threads=torch.get_num_threads() if device.type == "cpu" else None
        )
        if any(tap.kind == "tokens" for tap in self.wanted):
            self._names = {name: output_of(name) for tap in self.wanted for name in self._tensors(tap)}
            with temporary_folder() as folder:
                graph = write_prefix(self.bundle.graph(), list(self._names), folder)
                self.engine: Engine = _open(self.bundle, graph, name, options)
        else:
            self._names = {name: name for tap in self.wanted for name in self._tensors(tap)}
            self.engine = load_engine(self.bundle, name, options)

    @torch.no_grad()
    def __call__(self, batch: StepBatch, masking: Masking | None, *, whole: bool) -> Taps:
        """See `Teacher`."""
        images = self._images(batch.images.cpu())
        kept = masking.ids_keep.cpu().numpy() if masking is not None and not whole else None
        inputs = {IMAGES: self._as_graph_takes(images), **token_batch(self.bundle, kept, None, len(images))}
        found = self._outputs(inputs, None if kept is None else kept.shape[1])
        taps = {tap: self._read(tap, found).to(batch.images.device) for tap in self.wanted}
        return answers_for(
            taps, masking.ids_keep if masking is not None and whole else None, found=self.found, asked=self.asked
        )

    def _tensors(self, tap: Tap) -> tuple[str, ...]:
        """The graph's tensors that a tap is read from."""
        if tap.kind == "tokens":
            return (self.bundle.blocks[tap.block - 1],)
        return ("cls", "tokens") if tap.kind == "latent" else (tap.kind,)

    def _read(self, tap: Tap, found: Mapping[str, Tensor]) -> Tensor:
        values = [found[name] for name in self._tensors(tap)]
        if tap.kind == "tokens":
            return rows_of(values[0], self._shape)
        return torch.cat([values[0].unsqueeze(1), values[1]], dim=1) if tap.kind == "latent" else values[0]

    def _as_graph_takes(self, images: Tensor) -> Array:
        """Normalised `(B, C, H, W)` in the graph's own type; where it normalises, the pixels that they were,
        `(B, H, W, C)`.
        """
        if self.bundle.image_dtype != "uint8":
            return images.numpy().astype(self.bundle.image_dtype, copy=False)
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.preprocess.mean, self.preprocess.std))
        pixels = ((images * std + mean) * self.preprocess.divisor).round().clamp(0, 255)
        return np.ascontiguousarray(pixels.byte().permute(0, 2, 3, 1).numpy())

    def _outputs(self, inputs: Mapping[str, Array], kept: int | None) -> dict[str, Tensor]:
        """The graph's tensors of any number of images; those of ragged graphs end in padding, which is cut."""
        names = tuple(self._names.values())
        found = run_in_chunks(self.engine, inputs, batch=self.bundle.fixed_batch, outputs=names)
        return {name: self._cut(name, found[output], kept) for name, output in self._names.items()}

    def _cut(self, name: str, values: Array, kept: int | None) -> Tensor:
        tensor = torch.from_numpy(values.astype(np.float32, copy=False))
        if kept is None or tensor.ndim < 3 or name == "pixels":
            return tensor
        return tensor[:, : kept + (self._shape.num_prefix if name in self.bundle.blocks else 0)]


def _kinds_of(bundle: Bundle) -> tuple[str, ...]:
    """What the graph gives."""
    names = bundle.output_names
    latent = ("latent",) if {"cls", "tokens"} <= set(names) else ()
    return (
        *(("tokens",) if bundle.blocks else ()),
        *latent,
        *(name for name in ("cls", "pooled", "logits", "pixels") if name in names),
    )


def output_of(tensor: str) -> str:
    """The name under which a tensor is an output of the graph that `write_prefix` writes."""
    return f"{tensor}:float32"


def write_prefix(graph: Path, tensors: Sequence[str], folder: Path) -> Path:
    """Write the part of a graph that gives these tensors, in float32, and return its path: engines run no more than it,
    and of the weights only its own are read.

    Args:
        tensors: names of outputs or inner tensors; `output_of` says what they are called.
    """
    model = onnx.load(graph, load_external_data=False)
    outputs = [output_of(tensor) for tensor in tensors]
    for tensor, output in zip(tensors, outputs, strict=True):
        model.graph.node.append(helper.make_node("Cast", [tensor], [output], to=TensorProto.FLOAT))
        model.graph.output.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, None))
    part = Extractor(model).extract_model([entry.name for entry in model.graph.input], outputs)
    onnx.load_external_data_for_model(part, str(graph.parent))
    path = folder / "teacher.onnx"
    onnx.save_model(part, path, save_as_external_data=True, location="teacher.onnx.data")
    return path


def _engine_for(bundle: Bundle, asked: str, device: torch.device) -> str:
    """The engine's name: auto is that on which the bundle was checked, where this machine has it."""
    if asked != "auto":
        return ALIASES.get(asked, asked)
    checked_on: str = bundle.manifest["engine"]
    if checked_on in PLANNED:
        return checked_on if device.type == "cuda" and is_installed(checked_on) else DEFAULT
    return checked_on if device.type == "cpu" and importlib.util.find_spec(checked_on) is not None else DEFAULT


def _device_for(engine: str, device: torch.device) -> str:
    if device.type == "cpu":
        return "cpu" if engine not in PLANNED else "cuda"
    return f"cuda:{device.index or 0}" if engine in PLANNED else "auto"


def _open(bundle: Bundle, graph: Path, engine: str, options: EngineOptions) -> Engine:
    """A part of the bundle's graph on an engine; TensorRT builds a plan of it, which is not kept."""
    if engine not in PLANNED:
        check = bundle.checks[bundle.manifest["graph"]["file"]]
        return open_graph(graph, engine, options, precision=bundle.arithmetic, check=check)
    from mae_deploy.runtime.tensorrt.build import build_plan
    from mae_deploy.runtime.tensorrt.engine import TensorRtEngine, TensorRtRtxEngine, gpu_index

    manifest, rtx = bundle.manifest, engine == TENSORRT_RTX
    profile = {name: (least, usual, most) for name, (least, usual, most) in manifest["profile"].items()}
    plan = graph.with_suffix(".plan")
    build_plan(
        graph,
        plan,
        precision=bundle.precision,
        typing=manifest["typing"],
        profiles=[profile],
        index=gpu_index(options.device),
        rtx=rtx,
    )
    kind = TensorRtRtxEngine if rtx else TensorRtEngine
    return kind(plan, options, precision=bundle.precision, profiles=[profile])
