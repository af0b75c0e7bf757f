"""What one export works with, resolved once: weights, images, patches, and PyTorch's outputs to be met."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mae_deploy.checkpoint import Metadata
from mae_deploy.config import from_dict
from mae_deploy.errors import CheckFailed, ConfigError
from mae_deploy.export.budget import check_enough, class_count
from mae_deploy.export.config import ExportConfig
from mae_deploy.export.graph.builder import GraphBuilder
from mae_deploy.export.graph.encoder import build_graph
from mae_deploy.export.graph.precision import arithmetic
from mae_deploy.export.graph.spec import GraphSpec, available_outputs, check_mode, default_outputs, with_last_tokens
from mae_deploy.export.preprocessing import with_crop_mode, with_one_std
from mae_deploy.export.reference import Reference
from mae_deploy.export.samples import CalibrationImages, Samples, read_samples, stream_patches
from mae_deploy.export.trials import Arrays, Trial, chosen, forms
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.images.read import Array
from mae_deploy.models.config import EncoderConfig
from mae_deploy.models.pyramid import LEVELS, pyramid_sizes
from mae_deploy.models.quantization.policy import reason_against_int8_attention
from mae_deploy.runtime.cache import CacheShape, Sequences
from mae_deploy.runtime.engines.base import Engine, Runner
from mae_deploy.runtime.engines.openvino import import_openvino
from mae_deploy.runtime.manifest import CLASS_OUTPUTS, IDS_KEEP, IMAGES, PATCHES, UPDATES
from mae_deploy.runtime.profiles import Profile, Range
from mae_deploy.serving.deepstream import check_feeding
from mae_deploy.training.device import resolve_device
from mae_deploy.weights.load import LoadedWeights, at_image_size, encoder_of, model_of, read_weights
from mae_deploy.weights.pyramid import Pyramid, load_pyramid, random_pyramid

_MORE_BATCH = 32


@dataclass(frozen=True, kw_only=True)
class ExportJob:
    """One export."""

    config: ExportConfig
    loaded: LoadedWeights
    """The weights, at the size asked for."""
    preprocess: Preprocess
    preprocess_from: str | None
    """What tells it, where a training of ours did not."""
    samples: Samples
    more_samples: Samples
    """Others, of which the classes alone are compared; usually none."""
    ranges: dict[str, Range]
    names: tuple[str, ...]
    """Outputs, in order."""
    pyramid: Pyramid | None
    calib_images: CalibrationImages | None
    """For the ranges of INT8 and FP8."""
    trials: list[Trial] = field(default_factory=list)
    """All samples first, then a few in other forms."""
    more_scores: list[Array] = field(default_factory=list)
    """PyTorch's scores of `more_samples`, batch by batch, `(B, classes)`."""

    @cached_property
    def reference(self) -> Reference:
        """PyTorch's side."""
        model = model_of(self.loaded) if self.config.token_mode == "reconstruct" else encoder_of(self.loaded)
        pyramid = self.pyramid.module if self.pyramid is not None else None
        return Reference(
            model=model,
            preprocess=self.preprocess,
            pyramid=pyramid,
            pixels=self.config.pixels,
            device=resolve_device(self.config.device).type,
        )

    @property
    def _pyramid_weights(self) -> Arrays | None:
        return (
            None
            if self.pyramid is None
            else {name: tensor.cpu().numpy() for name, tensor in self.pyramid.module.state_dict().items()}
        )

    @property
    def profiles(self) -> list[Profile]:
        """The sizes of each optimisation profile."""
        return self.config.profiles(self.loaded.encoder_config.num_tokens)

    def graph(self, **changes: Any) -> GraphBuilder:
        """The graph that is asked for, or one with other parts of its spec."""
        config = self.config
        spec = GraphSpec(
            token_mode=config.token_mode,
            keep=config.keep,
            batch=config.fixed_batch,
            outputs=self.names,
            images=config.images,
            features=config.features,
            cache=config.cache_type,
            fixed_rows=self._fixed_rows,
            pixels=config.pixels,
            pyramid=self._pyramid_weights,
            precision=config.stored_precision,
            typing=config.resolved_typing,
            fp32_ops=config.islands,
            fuses_tanh=config.engine == "onnx",
            stores_rounded=not config.is_planned or config.resolved_typing == "strong",
        )
        return build_graph(self.loaded.metadata, self.loaded.tensors, replace(spec, **changes))

    def in_precision(self, precision: Literal["fp32", "fp16"]) -> ExportJob:
        """The same job without eight bits."""
        return replace(self, config=self.config.in_precision(precision))

    @property
    def _fixed_rows(self) -> bool:
        """See `CacheShape`."""
        return self.config.keep is not None or self.config.is_planned

    def runner(self, engine: Engine) -> Runner:
        """What runs these samples on a graph of this job."""
        return engine if self.cache_shape is None else Sequences(engine, self.cache_shape)

    @property
    def cache_shape(self) -> CacheShape | None:
        """Of a cached graph's keys and values; None of others."""
        if self.config.token_mode != "cached":
            return None
        c = self.loaded.encoder_config
        return CacheShape(
            num_patches=c.num_patches,
            depth=c.blocks,
            num_heads=c.heads,
            embed_dim=c.width,
            dtype=self.config.cache_type,
            num_prefix=c.num_prefix,
            fixed_rows=self._fixed_rows,
        )

    @property
    def class_output(self) -> str | None:
        """The output that tells classes: logits, else probs; None without either."""
        return next((name for name in CLASS_OUTPUTS if name in self.names), None)

    @cached_property
    def labels(self) -> Array | None:
        """The class of every image, of the samples and then of the others, int64 `(S,)`, where all lie in folders named
        by class.
        """
        return _labels(self.samples.paths + self.more_samples.paths, self.loaded.metadata)

    def more_batches(self) -> Iterator[tuple[Arrays, Array]]:
        """Inputs of `more_samples` with their pixels `(B, H, W, C)`, batch by batch."""
        for first in range(0, len(self.more_samples), _MORE_BATCH):
            pixels = self.more_samples.pixels[first : first + _MORE_BATCH]
            images = self.preprocess.normalise(pixels)
            yield {IMAGES: images, **chosen(self.config, self.loaded.encoder_config, images)}, pixels

    def graph_inputs(self, pixels: Array) -> Arrays:
        """What the graph takes of images `(B, H, W, C)`, with patches as the samples have them."""
        images = self.preprocess.normalise(pixels)
        return self.as_graph_takes({IMAGES: images, **chosen(self.config, self.loaded.encoder_config, images)}, pixels)

    def as_graph_takes(self, inputs: Arrays, pixels: Array | None = None) -> Arrays:
        """The same inputs with the images in the graph's form: float32 or float16 normalised, or uint8 pixels; or of
        streams, their patches.

        Args:
            pixels: of the images, `(B, H, W, C)`; default: those of the samples.
        """
        pixels = self.samples.pixels if pixels is None else pixels
        if self.config.token_mode == "cached":
            ids, updates = inputs[IDS_KEEP], inputs[UPDATES]
            patches = inputs[PATCHES].astype(self.config.images, copy=False)
            if self.config.images == "uint8":
                patches = stream_patches(pixels[: len(ids)], ids, updates, self.loaded.encoder_config.patch)
            return {PATCHES: patches, IDS_KEEP: ids, UPDATES: updates}
        if self.config.images == "uint8":
            return {**inputs, IMAGES: pixels[: len(inputs[IMAGES])]}
        return {**inputs, IMAGES: inputs[IMAGES].astype(self.config.images, copy=False)}


def prepare(config: ExportConfig) -> ExportJob:
    """Read the checkpoint and the images; everything that can be wrong with the settings is said here, before anything
    is computed.

    Raises:
        ConfigError: a setting that this model cannot have.
        CheckFailed: too few images for --max-drop.
        MissingDependency: the engine's package is absent.
    """
    if config.engine == "openvino":
        import_openvino()
    arithmetic(config.precision, config.resolved_typing, config.islands)
    loaded = at_image_size(read_weights(config.checkpoint), config.image_size)
    if config.one_std:
        loaded = with_one_std(loaded)
    loaded, preprocess_from = with_crop_mode(loaded, config.crop_mode)
    spec = from_dict(Preprocess, loaded.metadata.preprocess)
    if config.deepstream is not None:
        check_feeding(config.token_mode, config.images, spec, loaded.metadata.class_names)
    if config.images == "uint8" and spec.dtype != "uint8":
        raise ConfigError(
            f"--images uint8: this model's pixels have more than 8 bits (--pixel-max {spec.divisor:g})",
            hint="export with --images float32",
        )
    encoder = loaded.encoder_config
    check_mode(loaded.metadata, config.token_mode)
    names = output_names(config, loaded)
    ranges = config.ranges(encoder.num_tokens)
    calib_images = _calib_images(config, encoder, ranges, names, spec)
    pyramid = _pyramid(config, encoder)
    count = config.sample_count
    samples = read_samples(config.samples, loaded.metadata, spec, count, class_count(config))
    if config.int8.max_drop is not None:
        check_enough(config.int8.max_drop, len(samples))
    return ExportJob(
        config=config,
        loaded=loaded,
        preprocess=spec,
        preprocess_from=preprocess_from,
        ranges=ranges,
        names=names,
        pyramid=pyramid,
        calib_images=calib_images,
        samples=samples[:count],
        more_samples=samples[count:],
    )


def compute_reference(job: ExportJob) -> None:
    """Run PyTorch on all samples, and on a few in other forms; fills `job.trials`."""
    for name, pixels, inputs in forms(job.config, job.loaded.encoder_config, job.preprocess, job.samples.pixels):
        outputs = job.reference.outputs(inputs, job.names)
        broken = [output for output, values in outputs.items() if not np.isfinite(values).all()]
        if broken:
            raise CheckFailed(
                f"PyTorch itself gives NaN or infinite values{f' of {name}' if name else ''}: {', '.join(broken)}",
                hint="the checkpoint cannot be used: its weights or its image statistics are at fault, not the export",
            )
        job.trials.append(Trial(name, pixels, inputs, outputs))
    for inputs, _ in job.more_batches():
        assert job.class_output is not None
        job.more_scores.append(job.reference.outputs(inputs, (job.class_output,))[job.class_output])


def output_names(config: ExportConfig, loaded: LoadedWeights) -> tuple[str, ...]:
    """The outputs in order: those asked for, the blocks of --layers, the levels of --pyramid."""
    metadata = loaded.metadata
    names = list(config.outputs or default_outputs(metadata, config.token_mode))
    names += [f"block_{index}" for index in config.layers or ()]
    names += LEVELS if config.pyramid is not None and not set(LEVELS) & set(names) else ()
    known = available_outputs(metadata, config.token_mode, pyramid=config.pyramid is not None)
    for name in names:
        if name not in known and config.token_mode == "cached" and name in ("feature_map", *LEVELS):
            raise ConfigError(
                f"--tokens {config.tokens} gives no {name}, which is of the whole frame: it has the recomputed patches",
                hint="leave it out: a stream makes `seen.feature_map` of its tokens, and a pyramid can stand behind it",
            )
        if name not in known:
            hint = (
                "pass --pyramid with it" if name in LEVELS and config.pyramid is None else f"it has {_summary(known)}"
            )
            raise ConfigError(f"this model has no output '{name}' with --tokens {config.tokens}", hint=hint)
    chosen = tuple(dict.fromkeys(names))
    return with_last_tokens(chosen, metadata) if config.token_mode == "cached" else chosen


def _summary(names: Sequence[str]) -> str:
    blocks = [name for name in names if name.startswith("block_")]
    return ", ".join([*(name for name in names if name not in blocks), f"block_0 to {blocks[-1]}"])


def keep_of(inputs: Arrays) -> int | None:
    """K of these inputs, of streams that of the last update; None where all patches are seen."""
    if UPDATES in inputs:
        return int(inputs[UPDATES][0, -1])
    return inputs[IDS_KEEP].shape[1] if IDS_KEEP in inputs else None


def _calib_images(
    config: ExportConfig, encoder: EncoderConfig, ranges: dict[str, Range], names: tuple[str, ...], spec: Preprocess
) -> CalibrationImages | None:
    """The images of --calib-data, once it is clear that INT8 can be had as asked for."""
    int8 = config.int8
    if int8.max_drop is not None and not {*CLASS_OUTPUTS} & {*names}:
        raise ConfigError(
            "--max-drop is about logits or probs, which this graph does not give",
            hint="--min-sqnr and --min-cosine limit the loss of features",
        )
    if int8.int8_attention:
        K = ranges["K"][2] if "K" in ranges else encoder.num_tokens
        reason = reason_against_int8_attention(encoder.width // encoder.heads, encoder.num_prefix + K)
        if reason:
            raise ConfigError(
                f"--int8-attention: {reason}", hint="leave it out: the Linears alone are most of the arithmetic"
            )
    return None if int8.calib_data is None else CalibrationImages(int8.calib_data, spec, count=int8.calib_images)


def _labels(paths: Sequence[Path], metadata: Metadata) -> Array | None:
    """The class of every image, int64 `(S,)`, where all lie in folders named by class."""
    names = metadata.class_names
    if names is None or not paths:
        return None
    folders = [path.parent.name for path in paths]
    return np.array([names.index(folder) for folder in folders]) if set(folders) <= set(names) else None


def _pyramid(config: ExportConfig, encoder: EncoderConfig) -> Pyramid | None:
    if config.pyramid is None:
        return None
    pyramid_sizes(encoder.grid_size)
    return (
        random_pyramid(encoder.width, config.seed)
        if config.pyramid == "random"
        else load_pyramid(Path(config.pyramid), encoder.width)
    )
