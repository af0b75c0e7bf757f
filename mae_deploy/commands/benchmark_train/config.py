"""Settings of `mae-deploy benchmark-train`. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mae_deploy.config import Settings, section, setting
from mae_deploy.errors import ConfigError, MaeDeployError
from mae_deploy.models.config import DecoderConfig, EncoderConfig
from mae_deploy.models.mask_config import keep_count
from mae_deploy.training.config import Device, TrainingPrecision


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkTrainConfig(Settings, resume="never"):
    """Settings of `mae-deploy benchmark-train`."""

    batch_size: int = setting(16, basic=True, at_least=1)
    """Images a step."""
    mask_ratio: float = setting(0.75, basic=True, above=0, below=1)
    """Share of the patches that the encoder does not see."""
    precision: TrainingPrecision = setting("auto", basic=True)
    """Arithmetic of the step: fp32, bf16, fp16; auto is bf16 on a GPU that has it, else fp32. The plain step is FP32 on
    a CPU, on a GPU FP16 with loss scaling."""
    compile: bool = setting(False, basic=True)
    """Compile the transformer blocks with torch.compile."""
    measure_kernels: bool = True
    """Not used: PyTorch's own kernels are taken, as training does."""
    steps: int | None = setting(None, basic=True, at_least=1)
    """Steps of a round; default: 1 on a CPU, 10 on a GPU."""
    repeats: int = setting(7, basic=True, at_least=1)
    """Timed rounds."""
    warmup: int = setting(1, at_least=0)
    """Rounds before them that are not timed."""
    threads: int | None = setting(None, basic=True, at_least=1, at_most=4096)
    """CPU threads; default: one for each granted core."""
    out: Path | None = setting(None, basic=True)
    """Folder to write the report to: benchmark-train.json and .md."""
    seed: int = 0
    """Seed of weights, images and masks."""
    device: Device = setting("auto", basic=True)
    """Where to compute; auto takes the GPU where there is one."""
    model: EncoderConfig = section(EncoderConfig)
    decoder: DecoderConfig = section(DecoderConfig)

    def faults(self) -> Iterator[MaeDeployError]:
        if not 1 <= keep_count(self.model.num_patches, 1 - self.mask_ratio, least=0) < self.model.num_patches:
            yield ConfigError(
                f"--mask-ratio {self.mask_ratio:g} of {self.model.num_patches} patches leaves none to see, or none to"
                " predict"
            )
        if (groups := self.model.band_groups) is not None:
            given = ";".join(",".join(map(str, group)) for group in groups)
            yield ConfigError(f"--band-groups {given}: benchmark-train compares with an autoencoder without")
        if self.decoder.decoder_depth < 1:
            yield ConfigError(
                f"--decoder-depth must be at least 1, got {self.decoder.decoder_depth}: benchmark-train compares with"
                " the paper's autoencoder"
            )
