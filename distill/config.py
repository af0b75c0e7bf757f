"""Settings of distillation. No torch here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mae_deploy.config import Settings, section, setting
from mae_deploy.data.config import CropConfig, DataConfig, ValidationConfig
from mae_deploy.errors import ConfigError, MaeDeployError, errors_of
from mae_deploy.models.config import DecoderConfig, SliceBlocks
from mae_deploy.models.mask_config import check_keep_ratio
from mae_deploy.training.config import Device, LoopConfig, OptimConfig, RunSettings, TrainingPrecision

Blocks = tuple[str, ...]
"""Pairs of blocks as they are written, STUDENT:TEACHER, counted from 1, or "last"."""

LAST_BLOCK = -1
"""What `block_pairs` gives for "last", before the depths are known."""

Schedule = tuple[tuple[float, float], ...]
"""Points (share of the run, factor of the weight), with straight lines between them."""

Distance = Literal["smooth_l1", "l1", "mse", "cosine"]
Projector = Literal["linear", "mlp", "none"]


FROM_TEACHER = Path("teacher")
"""What `--init` says for a slice of the teacher."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureObjectiveConfig(Settings, resume="fixed"):
    """Features."""

    mask_ratio: float = setting(0.75, at_least=0, below=1)
    """Share of the patches that the student does not see, in runs on features; 0: it sees the whole image (TinyMIM),
    and reconstructs nothing."""
    teacher_block: int | None = None
    """The teacher's block whose output is matched, counted from 1; default: at 3/4 of its depth."""
    student_block: int | None = None
    """The student's block that is matched to it, counted from 1; default: at 3/4 of its depth."""
    feature_blocks: Blocks | None = setting(None, metavar="BLOCKS")
    """Other pairs of blocks in place of these two, STUDENT:TEACHER, such as 6:12,12:24 or last:last."""
    feature_weight: float | None = setting(None, at_least=0)
    """Weight of the distance between projected student tokens and normalised teacher tokens (DMAE); default: 1 in runs
    on features, else 0."""
    feature_loss: Distance = "smooth_l1"
    """The distance of --feature-weight; smooth_l1 has beta 2, cosine is 1 minus the cosine."""
    projector: Projector = "linear"
    """From the student's width to the teacher's: linear, mlp (two layers) or none, where the widths are the same."""
    pixel_weight: float | None = setting(None, at_least=0)
    """Weight of the student's own reconstruction loss; default: 1 where there is a mask in a run on features, else
    0."""
    feature_schedule: Schedule | None = setting(None, hidden=True)
    """Factor of --feature-weight over the run: [[share of the run, factor], ...]."""
    pixel_schedule: Schedule | None = setting(None, hidden=True)
    """The same of --pixel-weight."""

    def faults(self) -> Iterator[MaeDeployError]:
        for flag, block in (("--student-block", self.student_block), ("--teacher-block", self.teacher_block)):
            if self.feature_blocks is not None and block is not None:
                yield ConfigError(
                    f"--feature-blocks {','.join(self.feature_blocks)} does not go with {flag} {block}",
                    hint="its pairs take the place of both",
                )
        yield from schedule_faults(self)
        yield from errors_of(lambda: block_pairs(self.feature_blocks, "--feature-blocks"))


@dataclass(frozen=True, kw_only=True, slots=True)
class RelationConfig(Settings, resume="fixed"):
    """Attention relations."""

    relation_weight: float = setting(0.0, at_least=0)
    """Weight of the divergence between the relations of queries, keys and values (TinyMIM)."""
    relation_blocks: Blocks | None = setting(None, metavar="BLOCKS")
    """Pairs of blocks, STUDENT:TEACHER; default: the student's last and the teacher's at 3/4 of its depth."""
    relations: tuple[Literal["qk", "vv", "qq", "kk"], ...] = ("qk", "vv")
    """Relations that are compared, of queries (q), keys (k) and values (v)."""
    attention_weight: float = setting(0.0, at_least=0)
    """Weight of the squared error of attention maps (MAE-Lite)."""
    attention_blocks: Blocks | None = setting(None, metavar="BLOCKS")
    """Pairs of blocks, STUDENT:TEACHER; default: the last of both."""
    relation_schedule: Schedule | None = setting(None, hidden=True)
    """Factor of --relation-weight over the run: [[share of the run, factor], ...]."""
    attention_schedule: Schedule | None = setting(None, hidden=True)
    """The same of --attention-weight."""

    def faults(self) -> Iterator[MaeDeployError]:
        yield from schedule_faults(self)
        yield from errors_of(lambda: block_pairs(self.relation_blocks, "--relation-blocks"))
        yield from errors_of(lambda: block_pairs(self.attention_blocks, "--attention-blocks"))
        if not self.relations:
            yield ConfigError("--relations '' must be at least one of qk, vv, qq, kk")


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderFeatureConfig(Settings, resume="fixed"):
    """Decoder features."""

    decoder_feature_weight: float = setting(0.0, at_least=0)
    """Weight of the distance between the decoders' tokens of the masked patches (G2SD, generic stage); the teacher
    needs its decoder."""
    decoder_blocks: Blocks | None = setting(None, metavar="BLOCKS")
    """The pair of decoder blocks, STUDENT:TEACHER; default: the student's last and the teacher's at half of its
    decoder's depth (G2SD: 4 of 8)."""
    decoder_feature_loss: Distance = "smooth_l1"
    """The distance of --decoder-feature-weight."""
    decoder_feature_patches: Literal["masked", "all"] = "masked"
    """Patches that --decoder-feature-weight counts."""
    decoder_feature_schedule: Schedule | None = setting(None, hidden=True)
    """Factor of --decoder-feature-weight over the run: [[share of the run, factor], ...]."""

    def faults(self) -> Iterator[MaeDeployError]:
        yield from schedule_faults(self)
        yield from errors_of(lambda: block_pairs(self.decoder_blocks, "--decoder-blocks"))
        if self.decoder_blocks is not None and len(self.decoder_blocks) > 1:
            yield ConfigError(f"--decoder-blocks {','.join(self.decoder_blocks)} must be one pair, STUDENT:TEACHER")


@dataclass(frozen=True, kw_only=True, slots=True)
class PooledConfig(Settings, resume="fixed"):
    """One vector an image."""

    cls_weight: float = setting(0.0, at_least=0)
    """Weight of the distance between the student's projected CLS token and the teacher's normalised one."""
    pooled_weight: float = setting(0.0, at_least=0)
    """The same for what a head would read: the mean of the patch tokens, or what the classifier pools."""
    pooled_loss: Distance = "smooth_l1"
    """The distance of --cls-weight and of --pooled-weight."""
    pooled_projector: Projector = "linear"
    """From the student's width to the teacher's, for both: linear, mlp or none."""
    cls_schedule: Schedule | None = setting(None, hidden=True)
    """Factor of --cls-weight over the run: [[share of the run, factor], ...]."""
    pooled_schedule: Schedule | None = setting(None, hidden=True)
    """The same of --pooled-weight."""

    def faults(self) -> Iterator[MaeDeployError]:
        yield from schedule_faults(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class LogitsConfig(Settings, resume="fixed"):
    """Logits (labelled images)."""

    unlabelled: Path | None = None
    """More images without labels, from which the student learns the teacher's logits."""
    logits_loss: Literal["kl", "hard", "dist"] = "kl"
    """kl: the divergence from the teacher's distribution; hard: the cross-entropy with its decision (DeiT); dist: the
    correlation with its distribution over classes and over images (DIST)."""
    temperature: float = setting(1.0, above=0)
    """Temperature of the softmax on both sides, of kl and dist; the loss is multiplied by its square."""
    logits_weight: float = setting(1.0, at_least=0)
    """Weight of --logits-loss on every image, in runs on logits."""
    label_weight: float = setting(0.5, at_least=0)
    """Weight of the cross-entropy with the labels, on labelled images."""
    pool: Literal["avg", "cls"] = "avg"
    """What the student's head reads: the mean of the patch tokens, or the CLS token."""
    layer_decay: float = setting(0.75, above=0, at_most=1)
    """Learning-rate decay a layer from the head down."""
    drop_path: float = setting(0.0, at_least=0, below=1)
    """Stochastic depth of the student."""
    logits_schedule: Schedule | None = setting(None, hidden=True)
    """Factor of --logits-weight over the run: [[share of the run, factor], ...]."""
    label_schedule: Schedule | None = setting(None, hidden=True)
    """The same of --label-weight."""

    def faults(self) -> Iterator[MaeDeployError]:
        yield from schedule_faults(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherConfig(Settings, resume="fixed"):
    """Teacher."""

    teacher_weights: Path | None = None
    """The weights of --teacher timm:NAME: a file or a model folder of timm's; nothing is downloaded."""
    teacher_view: Literal["visible", "whole"] = "visible"
    """What the teacher sees where the student sees some patches: the same, or the whole image, of which the student's
    patches are picked."""
    teacher_grid: Literal["resize", "interpolate"] = "resize"
    """Where its patches are more or fewer than the student's: resize shows it the image at the size at which they are
    as many; interpolate shows it its own size, and resamples the maps of its tokens (whole images only)."""
    teacher_precision: TrainingPrecision = "auto"
    """Arithmetic of the teacher: fp32, bf16, fp16; auto is bf16 where the device multiplies in it, else fp32."""
    teacher_compile: bool = setting(False, resume="free")
    """Compile the teacher with torch.compile: minutes at the start, then faster on a GPU."""
    teacher_engine: Literal["auto", "torch", "onnx", "openvino", "trt", "trt-rtx"] = "auto"
    """What runs the teacher: torch for checkpoints and timm's models; for bundles onnx (ONNX Runtime), openvino, trt
    (TensorRT) or trt-rtx (TensorRT for RTX), auto is the one on which the bundle was checked."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheConfig(Settings):
    """Feature cache."""

    teacher_cache: Path | None = setting(None, resume="free")
    """Keep the teacher's answers in this folder, and run the teacher only for images whose answers are not there yet;
    needs --fixed-views."""
    fixed_views: int = setting(0, resume="fixed", at_least=0)
    """Augmentations and masks of each image in all, which the epochs take in turn; 0: every epoch draws new ones."""

    def faults(self) -> Iterator[MaeDeployError]:
        if self.teacher_cache is not None and self.fixed_views == 0:
            yield ConfigError(
                f"--teacher-cache {self.teacher_cache} keeps answers to views that come again, and without"
                " --fixed-views every epoch has views of its own",
                hint="add --fixed-views, such as 1 for whole images without augmentation, 4 for crops",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class EdgeConfig(Settings, resume="fixed"):
    """Quantisation-aware distillation."""

    quantize: Literal["none", "dynamic", "static"] = "none"
    """Round the student's Linears in training as an INT8 export will: dynamic as for ONNX Runtime, with ranges found at
    run time; static as for OpenVINO and TensorRT, with ranges from the training images. The checkpoint holds plain
    weights either way."""
    quantize_from: float = setting(0.5, at_least=0, below=1)
    """Share of the run after which the student is rounded."""
    outlier_weight: float = setting(0.0, at_least=0)
    """Weight of the penalty on heavy tails among the inputs of the student's Linears, with --quantize or without."""
    outlier_schedule: Schedule | None = setting(None, hidden=True)
    """See feature_schedule."""
    ranges_observed: int = setting(50, hidden=True, at_least=1)
    """Into how many parts a run is split, from each of which static ranges are taken once: it costs some 30 ms a
    Linear."""
    ranges_until: float = setting(0.9, hidden=True, at_least=0, at_most=1)
    """Share of the run from which static ranges stay what they are."""
    smooth_quant: bool = setting(True, hidden=True)
    """As the option of export."""
    smooth_alpha: float = setting(0.5, hidden=True, at_least=0, at_most=1)
    """As the option of export."""
    calib_method: Literal["mse", "minmax", "percentile", "entropy"] = setting("mse", hidden=True)
    """As the option of export."""
    calib_percentile: float = setting(99.99, hidden=True, at_least=50, at_most=100)
    """As the option of export."""

    def faults(self) -> Iterator[MaeDeployError]:
        yield from schedule_faults(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamTrainingConfig(Settings, resume="fixed"):
    """Streams."""

    stream: tuple[float, float] | None = None
    """Train for streams: the student sees each image through keys and values that an earlier frame left behind, with a
    share of its patches computed, LOW,HIGH, drawn for each step; one share fixes it. Takes the place of
    --mask-ratio."""
    stream_frames: int = setting(0, at_least=0)
    """The earlier frame is one of so many before the image in DATA, where the two are frames of one scene; else, and
    with 0, it is made of the image: something moved, flicker, noise, a pixel of jitter."""

    def faults(self) -> Iterator[MaeDeployError]:
        yield from errors_of(lambda: check_keep_ratio(self.stream, "--stream"))
        if self.stream is None and self.stream_frames:
            yield ConfigError(f"--stream-frames {self.stream_frames} is for --stream", hint="add --stream 0.2,0.4")


@dataclass(frozen=True, kw_only=True, slots=True)
class ShapeConfig(Settings, resume="fixed"):
    """Student."""

    student_width: int | None = setting(None, at_least=1)
    """Width of the student's tokens; default: its model's. A multiple of 64 keeps heads of 64, which TensorRT fuses in
    INT8."""
    student_depth: int | None = setting(None, at_least=1)
    """The student's blocks; default: its model's."""
    student_heads: int | None = setting(None, at_least=1)
    """The student's attention heads; default: its model's, with --student-width one for every 64 of it."""
    init_blocks: SliceBlocks = "even"
    """Which of its blocks the student gets with --init teacher: even, spread from the first to the last, or first, the
    first ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillConfig(RunSettings):
    """Settings of `mae-deploy distill`."""

    data: Path = setting(argument=True, resume="free")
    """Any tree of images for features; DATA/train/<class>/… and DATA/val/<class>/… for logits."""
    teacher: Path = setting(resume="fixed", metavar="CKPT|BUNDLE")
    """The teacher: a run folder, a checkpoint folder, a weights file, a bundle, or timm:NAME with --teacher-weights; a
    fine-tuned one for logits."""
    student: str = setting(flag="--student", resume="fixed", metavar="MODEL")
    """The student's model, such as vit_tiny_patch16 (see pretrain --help); --student-width and the like change its
    shape."""
    out: Path = setting(resume="free")
    """Run folder to write."""
    objective: Literal["auto", "features", "logits"] = setting("auto", resume="fixed", basic=True)
    """Match features on visible patches while the student reconstructs, or logits; auto: logits where the teacher is
    fine-tuned."""
    init: Path | None = setting(None, resume="fixed", basic=True, metavar="CKPT")
    """The student's starting weights, such as a features run; `teacher`: a slice of the teacher, its own layers, heads
    and channels; default: random."""
    image_size: tuple[int, int] | None = setting(None, resume="fixed", at_least=1)
    """The student's input height and width, H[,W]; default: the teacher's. The teacher sees the image at the size where
    its patches match."""
    patch_size: int | None = setting(None, resume="fixed", at_least=1)
    """Side of the student's patch in pixels; default: its model's."""
    keep_ratio: tuple[float, float] | None = setting(None, resume="fixed", basic=True)
    """Share of the patches that the student sees, LOW,HIGH: each step draws a number between them, and each image as
    many of its patches, so that one student serves every number of patches; one share fixes it. With logits, the
    teacher sees the whole image; with features, it takes the place of --mask-ratio. Default: all patches with logits,
    --mask-ratio with features."""
    resume: bool = setting(False, resume="free", basic=True)
    """Go on with the run in --out, or start it if it is not there. Settings that are left out are the run's: distill
    --resume RUN is enough."""
    seed: int = setting(0, resume="fixed", basic=True)
    """Seed of weights, data order, augmentation and masks."""
    device: Device = setting("auto", resume="free", basic=True)
    """Where to compute; auto takes the GPU where there is one."""
    shape: ShapeConfig = section(ShapeConfig)
    features: FeatureObjectiveConfig = section(FeatureObjectiveConfig)
    relation: RelationConfig = section(RelationConfig)
    decoder_features: DecoderFeatureConfig = section(DecoderFeatureConfig)
    pooled: PooledConfig = section(PooledConfig)
    logits: LogitsConfig = section(LogitsConfig)
    teaching: TeacherConfig = section(TeacherConfig)
    caching: CacheConfig = section(CacheConfig)
    edge: EdgeConfig = section(EdgeConfig)
    streams: StreamTrainingConfig = section(StreamTrainingConfig)
    decoder: DecoderConfig = section(DecoderConfig, decoder_depth=1, decoder_embed_dim=256, decoder_num_heads=8)
    optim: OptimConfig = section(OptimConfig, epochs=100, blr=5e-4)
    augment: CropConfig = section(CropConfig)
    images: DataConfig = section(DataConfig)
    validation: ValidationConfig = section(ValidationConfig)
    loop: LoopConfig = section(LoopConfig)

    def faults(self) -> Iterator[MaeDeployError]:
        yield from errors_of(lambda: check_keep_ratio(self.keep_ratio))
        if self.keep_ratio is not None and self.streams.stream is not None:
            yield ConfigError(
                f"--keep-ratio {self.keep_ratio[0]:g},{self.keep_ratio[1]:g} does not go with --stream, which says"
                " itself how many patches are computed"
            )
        if self.shape.init_blocks != "even" and self.init != FROM_TEACHER:
            yield ConfigError(
                f"--init-blocks {self.shape.init_blocks} says which of the teacher's blocks to take",
                hint="add --init teacher",
            )


def block_pairs(written: Blocks | None, flag: str) -> tuple[tuple[int, int], ...] | None:
    """Pairs of blocks, the student's first.

    Raises:
        ConfigError: no pairs, or one of them twice.
    """
    if written is None:
        return None
    pairs = []
    for text in written:
        first, colon, second = text.partition(":")
        if not (colon and all(block.isdecimal() or block == "last" for block in (first, second))):
            raise ConfigError(
                f"{flag} '{text}' is not a pair of blocks",
                hint="write STUDENT:TEACHER, such as 9:18 or last:last, and in a recipe with quotes",
            )
        pairs.append((_block(first), _block(second)))
    if not pairs or len(set(pairs)) < len(pairs):
        raise ConfigError(
            f"{flag} '{','.join(written)}' must be at least one pair of blocks, and each once",
            hint="write STUDENT:TEACHER, such as 6:12,12:24",
        )
    return tuple(pairs)


def _block(written: str) -> int:
    return LAST_BLOCK if written == "last" else int(written)


def schedule_faults(config: Any) -> Iterator[ConfigError]:
    """Schedules whose shares of the run do not rise from the start to the end, or whose factors are negative."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name.endswith("_schedule") and value is not None:
            shares = [share for share, _ in value]
            rising = bool(shares) and shares == sorted(set(shares)) and 0 <= shares[0] <= shares[-1] <= 1
            if not rising or not all(0 <= factor < math.inf for _, factor in value):
                yield ConfigError(
                    f"{field.name} {[list(point) for point in value]} is not a schedule",
                    hint=(
                        "write [[share of the run, factor], ...] with shares that rise from 0 to 1, such as [[0, 1],"
                        " [0.5, 1], [1, 0]]"
                    ),
                )


RunKind = Literal["features", "logits"]
