"""Settings of the commands that only look at, check or use what others made. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mae_deploy.config import setting
from mae_deploy.errors import ConfigError
from mae_deploy.training.config import Device


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportConfig:
    """Settings of `mae-deploy import`."""

    source: Path = setting(argument=True, flag="SRC")
    """Weights of the original implementation (.pth), timm or Hugging Face (.safetensors, .bin, or a model folder)."""
    out: Path
    """Checkpoint folder to write."""
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
class VerifyConfig:
    """Settings of `mae-deploy verify`."""

    bundle: Path = setting(argument=True)
    """Bundle folder."""
    engine: str = "auto"
    """auto, or onnxruntime (onnx)."""
    threads: int | None = None
    """CPU threads of the engine; default: one for each core."""
    seed: int = 0
    """Not used: the golden samples are fixed."""
    device: Device = "cpu"
    """auto, cpu or cuda."""


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
    """Patches that the encoder sees, row-major indices separated by commas (visible bundles); default: all."""
    num_keep: int | None = None
    """See this many patches of each image instead, drawn at random."""
    batch_size: int | None = None
    """Images at a time; default: the graph's fixed batch, or 8."""
    engine: str = "auto"
    """auto, or onnxruntime (onnx)."""
    threads: int | None = None
    """CPU threads of the engine; default: one for each core."""
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
    """Bundle folders; they are timed in turns, and compared with the first."""
    keep_ratio: float = 0.25
    """Share of the patches given to visible bundles without a fixed K."""
    batch_size: int = 1
    """Images a call; a fixed batch of a bundle wins."""
    repeats: int = 30
    """Timed rounds."""
    warmup: int = 5
    """Rounds before them that are not timed."""
    engine: str = "auto"
    """auto, or onnxruntime (onnx)."""
    threads: int | None = None
    """CPU threads of the engine; default: one for each core."""
    seed: int = 0
    """Seed of the random images and patches."""
    device: Device = "cpu"
    """auto, cpu or cuda."""

    def __post_init__(self) -> None:
        if not 0 < self.keep_ratio <= 1:
            raise ConfigError(f"--keep-ratio {self.keep_ratio} must be above 0 and at most 1")
        if self.batch_size < 1 or self.repeats < 1 or self.warmup < 0:
            raise ConfigError("--batch-size and --repeats must be at least 1, --warmup at least 0")


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
