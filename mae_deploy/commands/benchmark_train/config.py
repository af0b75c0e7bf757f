"""Settings of `mae-deploy benchmark-train`. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mae_deploy.config import Settings, section, setting
from mae_deploy.errors import ConfigError
from mae_deploy.models.config import DecoderConfig, EncoderConfig
from mae_deploy.models.mask_config import keep_count
from mae_deploy.training.config import Device, TrainingPrecision


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkTrainConfig(Settings, resume="never"):
    """Settings of `mae-deploy benchmark-train`."""

    batch_size: int = setting(16, basic=True)
    """Images a step."""
    mask_ratio: float = setting(0.75, basic=True)
    """Share of the patches that the encoder does not see."""
    precision: TrainingPrecision = setting("auto", basic=True)
    """Arithmetic of the step: fp32, bf16, fp16; auto is bf16 on a GPU that has it, else fp32. The plain step is FP32 on
    a CPU, on a GPU FP16 with loss scaling."""
    compile: bool = setting(False, basic=True)
    """Compile the model with torch.compile."""
    measure_kernels: bool = True
    """On a CPU, take the fastest FP32 kernel for every size, as training does."""
    steps: int | None = setting(None, basic=True)
    """Steps of a round; default: 1 on a CPU, 10 on a GPU."""
    repeats: int = setting(7, basic=True)
    """Timed rounds."""
    warmup: int = 1
    """Rounds before them that are not timed."""
    threads: int | None = setting(None, basic=True)
    """CPU threads; default: one for each core."""
    out: Path | None = setting(None, basic=True)
    """Folder to write the report to: benchmark-train.json and .md."""
    seed: int = 0
    """Seed of weights, images and masks."""
    device: Device = setting("auto", basic=True)
    """Where to compute; auto takes the GPU where there is one."""
    model: EncoderConfig = section(EncoderConfig)
    decoder: DecoderConfig = section(DecoderConfig)

    def __post_init__(self) -> None:
        given = [number for number in (self.batch_size, self.repeats, self.steps, self.threads) if number is not None]
        if min(given) < 1 or self.warmup < 0:
            raise ConfigError("--batch-size, --repeats, --steps and --threads must be at least 1, --warmup at least 0")
        if not 0 < self.mask_ratio < 1:
            raise ConfigError(f"--mask-ratio {self.mask_ratio:g} must be above 0 and below 1")
        if not 1 <= keep_count(self.model.num_patches, 1 - self.mask_ratio, least=0) < self.model.num_patches:
            raise ConfigError(
                f"--mask-ratio {self.mask_ratio:g} of {self.model.num_patches} patches leaves none to see, or none to"
                " predict"
            )
        if self.model.band_groups is not None or self.decoder.decoder_depth < 1:
            raise ConfigError(
                "benchmark-train compares with the plain autoencoder: no --band-groups, at least one decoder block"
            )
