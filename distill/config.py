"""Settings of distillation. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mae_deploy.config import section, setting
from mae_deploy.data.config import CropConfig, DataConfig
from mae_deploy.errors import ConfigError
from mae_deploy.models.config import DecoderConfig
from mae_deploy.training.config import Device, LoopConfig, OptimConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureConfig:
    """Features (unlabelled images)."""

    mask_ratio: float = 0.75
    """Share of the patches that neither teacher nor student sees."""
    teacher_block: int | None = None
    """The teacher's block whose output is matched, counted from 1; default: at 3/4 of its depth."""
    student_block: int | None = None
    """The student's block that is matched to it, counted from 1; default: at 3/4 of its depth."""
    feature_weight: float = 1.0
    """Weight of the feature loss: smooth L1 between projected student tokens and normalised teacher tokens."""
    pixel_weight: float = 1.0
    """Weight of the student's own reconstruction loss; 0 trains without a decoder's help."""

    def __post_init__(self) -> None:
        if not 0 < self.mask_ratio < 1:
            raise ConfigError(f"--mask-ratio {self.mask_ratio} must be above 0 and below 1")
        if self.feature_weight < 0 or self.pixel_weight < 0 or self.feature_weight + self.pixel_weight == 0:
            raise ConfigError("--feature-weight and --pixel-weight cannot be negative, nor both 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class LogitsConfig:
    """Logits (labelled images)."""

    unlabelled: Path | None = None
    """More images without labels, from which the student learns the teacher's logits."""
    temperature: float = 1.0
    """Temperature of the softmax on both sides; the loss is multiplied by its square."""
    logits_weight: float = 1.0
    """Weight of the divergence from the teacher's distribution, on every image."""
    label_weight: float = 0.5
    """Weight of the cross-entropy with the labels, on labelled images."""
    pool: Literal["avg", "cls"] = "avg"
    """What the student's head reads: the mean of the patch tokens, or the CLS token."""
    layer_decay: float = 0.75
    """Learning-rate decay a layer from the head down."""
    drop_path: float = 0.0
    """Stochastic depth of the student."""

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ConfigError(f"--temperature {self.temperature} must be above 0")
        if self.logits_weight < 0 or self.label_weight < 0 or self.logits_weight + self.label_weight == 0:
            raise ConfigError("--logits-weight and --label-weight cannot be negative, nor both 0")
        if not 0 < self.layer_decay <= 1:
            raise ConfigError(f"--layer-decay {self.layer_decay} must be above 0 and at most 1")
        if not 0 <= self.drop_path < 1:
            raise ConfigError(f"--drop-path {self.drop_path} must be at least 0 and below 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillConfig:
    """Settings of `mae-deploy distill`."""

    data: Path = setting(argument=True)
    """Any tree of images for features; DATA/train/<class>/… and DATA/val/<class>/… for logits."""
    teacher: Path
    """The teacher: a run folder, a checkpoint folder or a weights file; a fine-tuned one for logits."""
    student: str = setting(flag="--student")
    """The student's model, such as vit_tiny_patch16 (see pretrain --help)."""
    out: Path
    """Run folder to write."""
    objective: Literal["auto", "features", "logits"] = "auto"
    """Match features on visible patches while the student reconstructs, or logits; auto: logits where the teacher is fine-tuned."""
    init: Path | None = None
    """The student's starting weights, such as a features run; default: random."""
    image_size: tuple[int, int] | None = None
    """The student's input height and width, H[,W]; default: the teacher's. The teacher sees the image at the size where its patches match."""
    patch_size: int | None = None
    """Side of the student's patch in pixels; default: its model's."""
    resume: bool = False
    """Go on with the run in --out, or start it if it is not there."""
    seed: int = 0
    """Seed of weights, data order, augmentation and masks."""
    device: Device = "auto"
    """auto, cpu or cuda."""
    features: FeatureConfig = section(FeatureConfig)
    logits: LogitsConfig = section(LogitsConfig)
    decoder: DecoderConfig = section(DecoderConfig, decoder_depth=1, decoder_embed_dim=256, decoder_num_heads=8)
    optim: OptimConfig = section(OptimConfig, epochs=100, blr=5e-4)
    augment: CropConfig = section(CropConfig)
    images: DataConfig = section(DataConfig)
    loop: LoopConfig = section(LoopConfig)
