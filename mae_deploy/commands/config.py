"""Settings of the commands that only look at, check or use what others made. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mae_deploy.config import section, setting
from mae_deploy.errors import ConfigError
from mae_deploy.runtime.manifest import QUANTIZED
from mae_deploy.runtime.profiles import BuildOptions, read_profiles
from mae_deploy.training.config import Device, Precision


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportConfig:
    """Settings of `mae-deploy import`."""

    source: Path = setting(argument=True, flag="SRC")
    """Weights of the original implementation, timm, Hugging Face, mmpretrain or MAE-Lite (.pth, .pth.tar, .bin, .safetensors, or a model folder)."""
    out: Path
    """Checkpoint folder to write."""
    model: str | None = None
    """timm's name of the model that the file is of, such as vit_base_patch16_224.augreg_in21k; default: what config.json or the tensors say."""
    image_size: tuple[int, int] | None = None
    """Height and width, H[,W]; needed where the patches form no square; for another grid the position embeddings are interpolated."""
    num_heads: int | None = None
    """The encoder's attention heads; default: those of the model with this width, else head dim 64."""
    decoder_num_heads: int | None = None
    """The decoder's attention heads; default: head dim 32, as the original's."""
    norm_pix_loss: bool | None = None
    """Whether the decoder predicts normalised pixels; default: what the file says, else yes."""
    license: str | None = None
    """What the weights may be used for; default: CC-BY-NC-4.0 for the known releases, else unspecified."""
    seed: int = 0
    """Not used: nothing here is random."""
    device: Device = "cpu"
    """Not used: weights are converted on the CPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportWeightsConfig:
    """Settings of `mae-deploy export-weights`."""

    checkpoint: Path = setting(argument=True)
    """A run folder, a checkpoint folder, or a weights file that import reads."""
    to: Literal["timm", "huggingface", "original"]
    """Who is to load it: timm or transformers (a model folder), or the original implementation (a .pth file)."""
    out: Path
    """Folder to write, or for original the .pth file."""
    seed: int = 0
    """Seed of the images that both models are compared on."""
    device: Device = "cpu"
    """Not used: weights are converted and compared on the CPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyConfig:
    """Settings of `mae-deploy verify`."""

    bundle: Path = setting(argument=True)
    """Bundle folder."""
    layers: bool = False
    """Also compare the tokens after every block with PyTorch's, and name the block where precision is lost."""
    engine: str = "auto"
    """onnxruntime (onnx), openvino (ov) or tensorrt (trt); auto: TensorRT where the bundle has an engine for this machine, else the one on which the
    bundle was proven, where it is installed, else onnxruntime."""
    threads: int | None = None
    """CPU threads of the engine; default: one for each core, or for each of --affinity."""
    affinity: tuple[int, ...] | None = None
    """CPU cores that the engine is bound to, e.g. 0,1 (Linux); default: any."""
    seed: int = 0
    """Not used: the golden samples are fixed."""
    device: Device = "cpu"
    """auto, cpu or cuda."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildEngineConfig:
    """Settings of `mae-deploy build-engine`."""

    bundle: Path = setting(argument=True)
    """Bundle folder; the engine is added to it."""
    precision: Literal["fp32", "fp16", "bf16", "int8", "fp8"] | None = None
    """Arithmetic of the engine; default: the bundle's. An FP32 bundle with weak typing can also be built in fp16 and bf16, an INT8 or FP8 bundle in fp16."""
    profile: str | None = None
    """Smallest, usual and largest sizes to build for, such as 'B:1,8,32 K:20,49,196', several separated by ';'; default: those of the export."""
    prefer: Literal["fp16"] | None = None
    """fp16: keep FP16 where INT8 or FP8 is not faster, or misses its accuracy budget, instead of an error."""
    triton: Path | None = None
    """Also write the engine to this model repository of Triton Inference Server, under the bundle's name."""
    deepstream: Path | None = None
    """Also write the engine to this folder with configurations for DeepStream; for bundles of all patches."""
    build: BuildOptions = section(BuildOptions)
    seed: int = 0
    """Not used: the golden samples are fixed."""
    device: Device = "auto"
    """Not used: the engine is built for the first GPU."""

    def __post_init__(self) -> None:
        read_profiles(self.profile)
        if self.prefer is not None and self.precision not in (None, *QUANTIZED):
            raise ConfigError(f"--prefer {self.prefer} has no meaning with --precision {self.precision}", hint="it is for int8 and fp8")


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictConfig:
    """Settings of `mae-deploy predict`."""

    bundle: Path = setting(argument=True)
    """Bundle folder."""
    images: Path = setting(argument=True)
    """An image, or a folder of images."""
    out: Path | None = None
    """Write the outputs of every image to this .npz or .parquet file."""
    top_k: int = 5
    """Classes to print for each image, where the bundle has logits."""
    outputs: tuple[str, ...] | None = None
    """Outputs to compute, by name; default: all."""
    keep: tuple[int, ...] | None = None
    """Patches that the encoder sees, row-major indices separated by commas (visible, ragged and reconstruct bundles); default: all."""
    num_keep: int | None = None
    """See this many patches of each image instead, drawn at random."""
    batch_size: int | None = None
    """Images at a time; default: the graph's fixed batch, or 8."""
    engine: str = "auto"
    """onnxruntime (onnx), openvino (ov) or tensorrt (trt); auto: TensorRT where the bundle has an engine for this machine, else the one on which the
    bundle was proven, where it is installed, else onnxruntime."""
    threads: int | None = None
    """CPU threads of the engine; default: one for each core, or for each of --affinity."""
    affinity: tuple[int, ...] | None = None
    """CPU cores that the engine is bound to, e.g. 0,1 (Linux); default: any."""
    seed: int = 0
    """Seed of --num-keep."""
    device: Device = "cpu"
    """auto, cpu or cuda."""

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ConfigError(f"--top-k {self.top_k} must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkConfig:
    """Settings of `mae-deploy benchmark`."""

    bundles: tuple[Path, ...] = setting(argument=True)
    """Bundle folders; everything is timed in turns, and compared with the first row."""
    against: tuple[Path, ...] | None = None
    """Somebody else's ONNX files, separated by commas, timed beside the bundles on the same engines."""
    engine: tuple[str, ...] = ("auto",)
    """Engines, separated by commas: onnxruntime (onnx), openvino (ov), tensorrt (trt), or auto: TensorRT where a bundle has an engine for this machine,
    else the one on which it was proven, where it is installed."""
    keep: tuple[int, ...] | None = None
    """Numbers of patches, separated by commas, for bundles that leave K open; default: --keep-ratio 0.25."""
    keep_ratio: tuple[float, ...] | None = None
    """The same as shares of the patches; may be given beside --keep."""
    batch_size: tuple[int, ...] | None = None
    """Images a call, separated by commas; default: 1, or what a bundle is fixed to."""
    images: Path | None = None
    """Folder of images for the cosine with all patches, and for top-1 where they lie in folders named by class; default: the golden samples."""
    num_images: int = 128
    """At most this many of them, spread over the folder."""
    probe: bool = True
    """Measure load time and peak memory, each row in a fresh process."""
    out: Path | None = None
    """Folder to write the report to: benchmark.json, .md and .png."""
    repeats: int = 30
    """Timed rounds."""
    warmup: int = 5
    """Rounds before them that are not timed."""
    threads: int | None = None
    """CPU threads of the engine; default: one for each core, or for each of --affinity."""
    affinity: tuple[int, ...] | None = None
    """CPU cores that the engine is bound to, e.g. 0,1 (Linux); default: any."""
    seed: int = 0
    """Seed of the random images and patches."""
    device: Device = "cpu"
    """auto, cpu or cuda."""

    def __post_init__(self) -> None:
        if min(self.keep or (1,)) < 1:
            raise ConfigError(f"--keep {min(self.keep or ())} must be at least 1")
        check_shares(self.keep_ratio)
        if min(self.repeats, self.num_images, *(self.batch_size or ())) < 1 or self.warmup < 0:
            raise ConfigError("--batch-size, --repeats and --num-images must be at least 1, --warmup at least 0")
        if not self.engine:
            raise ConfigError("--engine needs at least one engine")

    @property
    def keeps(self) -> tuple[int | float, ...]:
        """Counts (int) and shares (float) of the patches."""
        return (*(self.keep or ()), *(self.keep_ratio or ())) or (0.25,)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """Settings of `mae-deploy eval`."""

    model: Path = setting(argument=True, flag="CKPT|BUNDLE")
    """A classifier: a run folder, a checkpoint folder, a weights file, or a bundle with logits."""
    data: Path = setting(argument=True)
    """Labelled images: DATA/val/<class>/… if there is a val, else DATA/<class>/…."""
    confusion: Path | None = None
    """Also write the confusion matrix to this .csv file: a row for each true class, a column for each class found."""
    keep_ratio: tuple[float, ...] | None = None
    """Shares of the patches that the classifier sees, separated by commas, such as 1,0.5,0.25: top-1 with each, every image with its own random patches;
    below 1 of checkpoints and of bundles of --tokens visible or ragged; default: all patches."""
    batch_size: int | None = None
    """Images at a time; default: a bundle's fixed batch, or 64."""
    engine: str = "auto"
    """Of a bundle: onnxruntime (onnx), openvino (ov) or tensorrt (trt); auto: TensorRT where the bundle has an engine for this machine, else the one on
    which the bundle was proven, where it is installed, else onnxruntime."""
    precision: Precision = "auto"
    """Arithmetic of a checkpoint: fp32, bf16, fp16; auto is bf16 on a GPU that has it, else fp32."""
    num_workers: int = -1
    """Processes that decode images for a checkpoint; 0 decodes in this process, -1 starts one for each core but one."""
    threads: int | None = None
    """CPU threads of a bundle's engine; default: one for each core, or for each of --affinity."""
    affinity: tuple[int, ...] | None = None
    """CPU cores that a bundle's engine is bound to, e.g. 0,1 (Linux); default: any."""
    seed: int = 0
    """Seed of the patches of --keep-ratio."""
    device: Device = "auto"
    """auto, cpu or cuda."""

    def __post_init__(self) -> None:
        if (self.batch_size or 1) < 1 or self.num_workers < -1:
            raise ConfigError("--batch-size must be at least 1, --num-workers at least -1")
        check_shares(self.keep_ratio)
        if self.confusion is not None and len(self.keep_ratio or (1,)) > 1:
            raise ConfigError("--confusion is of one --keep-ratio", hint="give one share, or leave --confusion away")
        if self.confusion is not None and self.confusion.suffix != ".csv":
            raise ConfigError(f"--confusion {self.confusion} must end in .csv")


@dataclass(frozen=True, kw_only=True, slots=True)
class InfoConfig:
    """Settings of `mae-deploy info`."""

    path: Path = setting(argument=True)
    """A run folder, a checkpoint folder, a weights file or a bundle."""
    seed: int = 0
    """Not used: nothing here is random."""
    device: Device = "cpu"
    """Not used: nothing is computed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DoctorConfig:
    """Settings of `mae-deploy doctor`."""

    seed: int = 0
    """Not used: nothing here is random."""
    device: Device = "auto"
    """Not used: every device is looked at."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QuickstartConfig:
    """Settings of `mae-deploy quickstart`."""

    out: Path = Path("quickstart")
    """Folder for data, runs, bundles and the report."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the few-label experiments; every accuracy is their mean."""
    seed: int = 0
    """Seed of pretraining and of the feature distillation."""
    device: Device = "auto"
    """auto, cpu or cuda."""

    def __post_init__(self) -> None:
        if not self.seeds:
            raise ConfigError("--seeds needs at least one seed")


def check_shares(keep_ratio: tuple[float, ...] | None) -> None:
    """Whether these are shares of the patches.

    Raises:
        ConfigError: names the one that is not.
    """
    if keep_ratio == ():
        raise ConfigError("--keep-ratio names no share", hint="such as 1,0.5,0.25")
    for ratio in keep_ratio or ():
        if not 0 < ratio <= 1:
            raise ConfigError(f"--keep-ratio {ratio:g} must be above 0 and at most 1")
