"""Settings of `mae-deploy benchmark`. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mae_deploy.config import Settings, setting
from mae_deploy.errors import ConfigError, MaeDeployError, errors_of
from mae_deploy.models.mask_config import check_shares
from mae_deploy.training.config import Device


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkConfig(Settings, resume="never"):
    """Settings of `mae-deploy benchmark`."""

    bundles: tuple[Path, ...] = setting(argument=True, metavar="BUNDLE")
    """Bundle folders; everything is timed in turns, and compared with the first row."""
    against: tuple[Path, ...] | None = setting(None, basic=True)
    """ONNX files of other origin, separated by commas, timed beside the bundles on the same engines."""
    engine: tuple[str, ...] = setting(("auto",), basic=True, metavar="ENGINE")
    """Engines, separated by commas: onnxruntime (onnx), openvino (ov), tensorrt (trt), tensorrt-rtx (trt-rtx), or auto:
    TensorRT where a bundle has an engine for this machine, else the one on which it was checked, where it is
    installed."""
    keep: tuple[int, ...] | None = setting(None, basic=True, at_least=1)
    """Numbers of patches, separated by commas, for bundles that leave K open; default: --keep-ratio 0.25."""
    keep_ratio: tuple[float, ...] | None = setting(None, basic=True, above=0, at_most=1)
    """The same as shares of the patches; may be given beside --keep."""
    batch_size: tuple[int, ...] | None = setting(None, basic=True, at_least=1)
    """Images a call, separated by commas; default: 1, or what a bundle is fixed to."""
    images: Path | None = setting(None, basic=True)
    """Folder of images for the cosine with all patches, and for top-1 where they lie in folders named by class;
    default: the golden samples."""
    num_images: int = setting(128, at_least=1)
    """At most this many of them, spread over the folder."""
    max_pixels: int | None = setting(None, at_least=1)
    """Pixels of the largest image that is read, such as 300000000 for photos of 300 megapixels; default: 178956970."""
    probe: bool = True
    """Measure load time and peak memory, each row in a fresh process."""
    out: Path | None = setting(None, basic=True)
    """Folder to write the report to: benchmark.json, .md and .png."""
    repeats: int = setting(30, basic=True, at_least=1)
    """Timed rounds."""
    warmup: int = setting(5, at_least=0)
    """Rounds before them that are not timed."""
    threads: int | None = setting(None, basic=True, at_least=1, at_most=4096)
    """CPU threads of the engine; default: one for each granted core, or for each of --affinity."""
    affinity: tuple[int, ...] | None = None
    """CPU cores that the engine is bound to, e.g. 0,1 (Linux); default: any."""
    seed: int = 0
    """Seed of the random images and patches."""
    device: Device = setting("cpu", basic=True)
    """Where to compute; auto takes the GPU where there is one."""

    def faults(self) -> Iterator[MaeDeployError]:
        yield from errors_of(lambda: check_shares(self.keep_ratio))
        if not self.engine:
            yield ConfigError("--engine '' must be at least one engine, such as onnx,ov")

    @property
    def keeps(self) -> tuple[int | float, ...]:
        """Counts (int) and shares (float) of the patches."""
        return (*(self.keep or ()), *(self.keep_ratio or ())) or (0.25,)
