"""Settings of evaluation: linear probe, k-NN, comparison, top-1. No torch here."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mae_deploy.config import Settings, section, setting
from mae_deploy.data.config import CropConfig, DataConfig, ValidationConfig
from mae_deploy.errors import ConfigError, MaeDeployError, errors_of
from mae_deploy.models.mask_config import check_shares
from mae_deploy.training.config import Device, LoopConfig, OptimConfig, RunSettings, TrainingPrecision

Solver = Literal["ridge", "logistic"]


@dataclass(frozen=True, kw_only=True, slots=True)
class FeaturesConfig(Settings):
    """Features."""

    pool: Literal["auto", "cls", "avg"] = setting("auto", resume="fixed")
    """What is a feature: cls, the CLS token, or avg, the mean of the patch tokens, both after the last norm; auto: what
    a classifier's head reads, else the CLS token."""
    image_size: tuple[int, int] | None = setting(None, resume="fixed", basic=True)
    """Input height and width, H[,W], of checkpoints, their position embeddings interpolated; default: each its own.
    Bundles are fixed to theirs."""
    batch_size: int = setting(64, resume="fixed", basic=True, at_least=1)
    """Images at a time."""
    precision: TrainingPrecision = setting("auto", resume="fixed")
    """Arithmetic of checkpoints: fp32, bf16, fp16; auto is bf16 on a GPU that has it, else fp32."""
    engine: str = setting("auto", resume="fixed", metavar="ENGINE")
    """Engine of bundles: auto, onnxruntime (onnx), openvino (ov), tensorrt (trt) or tensorrt-rtx (trt-rtx)."""
    threads: int | None = setting(None, resume="free", at_least=1, at_most=4096)
    """CPU threads of a bundle's engine; default: one for each granted core."""
    num_workers: int = setting(-1, resume="free", at_least=-1)
    """Processes that decode images; 0 decodes in this process, -1 starts one for each granted core but one."""
    max_corrupt: int = setting(100, resume="free", at_least=0)
    """Unreadable files that are named and left out before the command gives up."""
    max_pixels: int | None = setting(None, resume="free", at_least=1)
    """Pixels of the largest image that is read, such as 300000000 for photos of 300 megapixels; default: 178956970."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LinprobeConfig(RunSettings):
    """Settings of `mae-deploy linprobe`."""

    data: Path = setting(argument=True, resume="free")
    """Labelled images: DATA/train/<class>/… and DATA/val/<class>/…."""
    init: Path = setting(resume="fixed", metavar="CKPT")
    """Encoder to evaluate: a run folder, a checkpoint folder or a weights file."""
    out: Path = setting(resume="free")
    """Run folder to write; its checkpoint is a classifier."""
    solver: Literal["lars", "logistic", "ridge"] = setting("lars", resume="fixed", basic=True)
    """lars: the paper's recipe, with augmentation. For small data, on features that are computed once: logistic,
    multinomial logistic regression, or ridge, least squares on one-hot labels in closed form."""
    pool: Literal["cls", "avg"] = setting("cls", resume="fixed")
    """What the head reads: the CLS token, as in the paper, or the mean of the patch tokens through a norm without
    weights."""
    image_size: tuple[int, int] | None = setting(None, resume="fixed")
    """Input height and width in pixels, H[,W]; default: that of --init, its position embeddings interpolated for
    another."""
    held_out: float = setting(0.2, resume="fixed", above=0, below=1)
    """Share of the training images on which logistic and ridge choose their regularisation, before they fit all of
    them."""
    resume: bool = setting(False, resume="free", basic=True)
    """Go on with the run in --out, or start it if it is not there. Settings that are left out are the run's: linprobe
    --resume RUN is enough."""
    seed: int = setting(0, resume="fixed", basic=True)
    """Seed of the head, data order and augmentation, and of the held-out share."""
    device: Device = setting("auto", resume="free", basic=True)
    """Where to compute; auto takes the GPU where there is one."""
    optim: OptimConfig = section(OptimConfig, epochs=90, batch_size=512, blr=0.1, weight_decay=0.0)
    augment: CropConfig = section(CropConfig, min_scale=0.08)
    images: DataConfig = section(DataConfig)
    validation: ValidationConfig = section(ValidationConfig)
    loop: LoopConfig = section(LoopConfig)

    def faults(self) -> Iterator[MaeDeployError]:
        if self.loop.sharding != "ddp":
            yield ConfigError(
                f"--sharding {self.loop.sharding} has nothing to share out: only a linear head is trained",
                hint="leave it out",
            )
        if self.loop.plan and self.solver != "lars":
            yield ConfigError(f"--plan is for runs in steps: --solver {self.solver} takes none", hint="leave it out")


@dataclass(frozen=True, kw_only=True, slots=True)
class KnnConfig(Settings, resume="never"):
    """Settings of `mae-deploy knn`."""

    data: Path = setting(argument=True)
    """Labelled images: DATA/train/<class>/… votes on DATA/val/<class>/…."""
    init: Path = setting(metavar="CKPT|BUNDLE")
    """Encoder to evaluate: a run folder, a checkpoint folder, a weights file or a bundle."""
    k: tuple[int, ...] = setting((20,), at_least=1)
    """Neighbours that vote; several numbers, separated by commas, are answered in one pass."""
    temperature: float = setting(0.07, above=0)
    """A neighbour's vote is exp(cosine / temperature)."""
    block_size: int = setting(4096, at_least=1)
    """Images of either side that are compared at a time: bounds the memory, changes no result."""
    seed: int = 0
    """Seed of --val-share."""
    device: Device = "auto"
    """Where to compute; auto takes the GPU where there is one."""
    validation: ValidationConfig = section(ValidationConfig)
    features: FeaturesConfig = section(FeaturesConfig)

    def faults(self) -> Iterator[MaeDeployError]:
        yield from _each_once("--k", self.k)


@dataclass(frozen=True, kw_only=True, slots=True)
class CompareConfig(Settings):
    """Settings of `mae-deploy compare`."""

    encoders: tuple[str, ...] = setting(argument=True, metavar="CKPT|BUNDLE", resume="fixed")
    """Encoders, each PATH or NAME=PATH: a run, checkpoint, weights file or bundle; PATH@ARCHITECTURE for a weights file
    of any timm model, such as dino=weights.safetensors@vit_small_patch14_dinov2; random for the first checkpoint's
    network with random weights."""
    data: Path = setting(resume="fixed")
    """Labelled images: DATA/train/<class>/… and DATA/val/<class>/…."""
    out: Path | None = setting(None, resume="free", basic=True)
    """Folder to write compare.json, compare.md and compare.png to; with --at-latency, the same command goes on in it
    where it was stopped."""
    at_latency: str | None = setting(None, basic=True, metavar="MS", resume="fixed")
    """Compare at equal latency of one image on this machine, such as 10ms: what is too slow as it is takes as large
    images, or as many of their patches, as its measured graph manages in that time. Encoders are what import and export
    take."""
    fit: Literal["tokens", "size", "both"] = setting("both", basic=True, resume="fixed")
    """How --at-latency makes an encoder faster: tokens, fewer patches, random ones; size, smaller images; both: a row
    for either."""
    finetune_epochs: int | None = setting(None, basic=True, at_least=1, at_most=100_000, resume="fixed")
    """With --at-latency, also fine-tune each checkpoint as it meets the latency, for so many epochs, with each seed."""
    finetune_recipe: str | None = setting(None, metavar="RECIPE", resume="fixed")
    """Settings of that fine-tuning from a YAML file, or the name of a recipe that ships with mae-deploy."""
    k: tuple[int, ...] = setting((20,), basic=True, at_least=1, resume="fixed")
    """Neighbours that vote; with several numbers, separated by commas, each is a column."""
    temperature: float = setting(0.07, above=0, resume="fixed")
    """A neighbour's vote is exp(cosine / temperature)."""
    linear: Solver = setting("logistic", basic=True, resume="fixed")
    """The linear probe: logistic or ridge, on standardised features."""
    held_out: float = setting(0.2, above=0, below=1, resume="fixed")
    """Share of the training images on which the linear probe chooses its regularisation."""
    seeds: tuple[int, ...] = setting((0, 1, 2), resume="free", basic=True)
    """Seeds of the held-out share and of random weights, with --at-latency also of the kept patches and of fine-tuning;
    figures are means over them."""
    seed: int = setting(0, basic=True, resume="fixed")
    """Added to each of --seeds."""
    device: Device = setting("auto", resume="free", basic=True)
    """Where to compute; auto takes the GPU where there is one."""
    validation: ValidationConfig = section(ValidationConfig)
    features: FeaturesConfig = section(FeaturesConfig)

    def faults(self) -> Iterator[MaeDeployError]:
        yield from _each_once("--k", self.k)
        if not self.seeds:
            yield ConfigError("--seeds '' must be at least one seed, such as 0,1,2")
        yield from errors_of(lambda: self.latency)
        if self.fit != "both" and self.at_latency is None:
            yield ConfigError(f"--fit {self.fit} needs --at-latency", hint="such as --at-latency 10ms")
        if self.finetune_epochs is not None and (self.at_latency is None or self.out is None):
            yield ConfigError(
                f"--finetune-epochs {self.finetune_epochs} needs --at-latency, and --out for its runs",
                hint="such as --at-latency 10ms --out compared",
            )
        if self.finetune_recipe is not None and self.finetune_epochs is None:
            yield ConfigError(
                f"--finetune-recipe {self.finetune_recipe} needs --finetune-epochs", hint="such as --finetune-epochs 20"
            )

    @property
    def latency(self) -> float | None:
        """Seconds of --at-latency; None without it.

        Raises:
            ConfigError: it is no time.
        """
        if self.at_latency is None:
            return None
        match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*(us|ms|s|)", self.at_latency.strip().lower())
        seconds = float(match[1]) * {"us": 1e-6, "s": 1.0}.get(match[2], 1e-3) if match else 0.0
        if not 0 < seconds < math.inf:
            raise ConfigError(f"--at-latency {self.at_latency} is no time above 0", hint="such as 10ms, 0.5s or 800us")
        return seconds


def _each_once(flag: str, numbers: tuple[int, ...]) -> Iterator[ConfigError]:
    if not numbers or len({*numbers}) < len(numbers):
        given = ",".join(map(str, numbers))
        yield ConfigError(f"{flag} '{given}' must be at least one number, and each once")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig(Settings, resume="never"):
    """Settings of `mae-deploy eval`."""

    model: Path = setting(argument=True, flag="CKPT|BUNDLE", metavar="CKPT|BUNDLE")
    """A classifier: a run folder, a checkpoint folder, a weights file, or a bundle with logits."""
    data: Path = setting(argument=True)
    """Labelled images: DATA/val/<class>/… if there is a val, else DATA/<class>/…."""
    val_split: str | None = None
    """Name of the split below DATA, such as test; default: val, validation or valid."""
    confusion: Path | None = None
    """Also write the confusion matrix to this .csv file: a row for each true class, a column for each class found."""
    keep_ratio: tuple[float, ...] | None = setting(None, above=0, at_most=1)
    """Shares of the patches that the classifier sees, separated by commas, such as 1,0.5,0.25: top-1 with each, every
    image with its own random patches; below 1 of checkpoints and of bundles of --tokens visible or ragged; default: all
    patches."""
    batch_size: int | None = setting(None, at_least=1)
    """Images at a time; default: a bundle's fixed batch, or 64."""
    engine: str = setting("auto", metavar="ENGINE")
    """Of a bundle: onnxruntime (onnx), openvino (ov), tensorrt (trt) or tensorrt-rtx (trt-rtx); auto: TensorRT where
    the bundle has an engine for this machine, else the one on which the bundle was checked, where it is installed,
    else onnxruntime."""
    precision: TrainingPrecision = "auto"
    """Arithmetic of a checkpoint: fp32, bf16, fp16; auto is bf16 on a GPU that has it, else fp32."""
    num_workers: int = setting(-1, at_least=-1)
    """Processes that decode images for a checkpoint; 0 decodes in this process, -1 starts one for each granted core but
    one."""
    max_pixels: int | None = setting(None, at_least=1)
    """Pixels of the largest image that is read, such as 300000000 for photos of 300 megapixels; default: 178956970."""
    threads: int | None = setting(None, at_least=1, at_most=4096)
    """CPU threads of a bundle's engine; default: one for each granted core, or for each of --affinity."""
    affinity: tuple[int, ...] | None = None
    """CPU cores that a bundle's engine is bound to, e.g. 0,1 (Linux); default: any."""
    seed: int = 0
    """Seed of the patches of --keep-ratio."""
    device: Device = "auto"
    """Where to compute; auto takes the GPU where there is one."""

    def faults(self) -> Iterator[MaeDeployError]:
        yield from errors_of(lambda: check_shares(self.keep_ratio))
        if self.confusion is not None and len(self.keep_ratio or (1,)) > 1:
            yield ConfigError(
                f"--confusion {self.confusion} is of one --keep-ratio", hint="give one share, or leave --confusion out"
            )
        if self.confusion is not None and self.confusion.suffix != ".csv":
            yield ConfigError(f"--confusion {self.confusion} must end in .csv")
