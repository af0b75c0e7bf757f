"""Settings of `mae-deploy stream-eval`. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mae_deploy.config import Settings, section, setting
from mae_deploy.errors import ConfigError, MaeDeployError
from mae_deploy.runtime.selection import Motion
from mae_deploy.runtime.streams.config import StreamOptions
from mae_deploy.training.config import Device

Condition = Literal["clean", "reencoded", "flicker", "jitter"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamEvalConfig(Settings):
    """Settings of `mae-deploy stream-eval`."""

    videos: tuple[Path, ...] = setting(argument=True, metavar="VIDEO", resume="free")
    """Video files of your camera, each judged by itself: its first half chooses thresholds and trains the probe, its
    second half is reported."""
    bundle: Path = setting(argument=True, metavar="BUNDLE", resume="free")
    """Bundle folder, exported with --tokens cached."""
    out: Path | None = setting(None, resume="free", basic=True)
    """Folder to write: stream-eval.html, .md, .json and pictures. The same command goes on where it was cut off."""
    conditions: tuple[Condition, ...] = setting(
        ("clean", "reencoded", "flicker", "jitter"), resume="free", basic=True, metavar="NAME,…"
    )
    """What is done to the frames: nothing (clean), encoded again at a low quality (reencoded), brightness that varies
    by up to 5 % (flicker), moved by up to a pixel (jitter)."""
    cost: float | None = setting(None, resume="fixed", basic=True, above=0, at_most=1)
    """Choose the threshold on the first half: the smallest that keeps the stream's share of a whole frame's operations
    at this."""
    snr: float | None = setting(None, resume="fixed", basic=True)
    """Choose the threshold on the first half: the largest that keeps the tokens at so many dB."""
    threshold: float = setting(Motion().threshold, resume="fixed", basic=True, above=0)
    """Else the stream's threshold: the grey difference from which a patch has changed, from 0 to 255."""
    stream: StreamOptions = section(StreamOptions)
    every: int = setting(1, resume="fixed", basic=True, at_least=1)
    """Take every so many-th frame of the video."""
    max_frames: int = setting(1000, resume="fixed", basic=True, at_least=16)
    """Take at most so many frames."""
    engine: str = setting("auto", resume="fixed", metavar="ENGINE")
    """onnxruntime (onnx), openvino (ov), tensorrt (trt) or tensorrt-rtx (trt-rtx); auto: the one on which the bundle
    was checked, where it is installed, else onnxruntime."""
    threads: int | None = setting(1, resume="fixed", at_least=1)
    """CPU threads of the engine."""
    affinity: tuple[int, ...] | None = setting(None, resume="free")
    """CPU cores that the engine is bound to, e.g. 0,1 (Linux); default: any."""
    seed: int = setting(0, resume="fixed")
    """Seed of flicker and jitter."""
    device: Device = setting("cpu", resume="free")
    """Where to compute; auto takes the GPU where there is one."""

    def faults(self) -> Iterator[MaeDeployError]:
        if self.cost is not None and self.snr is not None:
            yield ConfigError("--cost and --snr exclude one another")
        if not self.conditions:
            yield ConfigError("--conditions '' must be at least one, such as clean,jitter")
