"""Settings of `mae-deploy stream`. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mae_deploy.config import Settings, section, setting
from mae_deploy.errors import ConfigError, MaeDeployError, errors_of
from mae_deploy.runtime.selection import Budget, Motion, Region, Selection
from mae_deploy.runtime.streams.config import StreamOptions
from mae_deploy.runtime.video.options import VideoOptions
from mae_deploy.training.config import Device

_MOTION = Motion()


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectionOptions(Settings, resume="never"):
    """Selection."""

    threshold: float = setting(_MOTION.threshold, above=0, basic=True)
    """A patch is computed where it differs by more than so many grey levels, from 0 to 255, from what was last computed
    of it."""
    noise: float = setting(_MOTION.noise, at_least=0)
    """And by more than so many times its own noise."""
    dilation: int = setting(0, at_least=0)
    """The patches around it as well, so many in each direction."""
    region: tuple[str, ...] = setting((), repeated=True, metavar="L,T,R,B", basic=True)
    """Only what changes in this box (left, top, right, bottom), in pixels of the frame or in shares of it, such as
    0,0.2,1,1; may be given several times."""
    at_most: float | None = setting(None, above=0)
    """Of that, what matters most: so many patches, or below 1 a share of all."""

    def select(self) -> Selection:
        """The rule."""
        rule: Selection = Motion(threshold=self.threshold, noise=self.noise, dilation=self.dilation)
        if self.region:
            rule = rule & Region([_box(text) for text in self.region])
        return rule if self.at_most is None else Budget(of=rule, at_most=self.at_most)

    def faults(self) -> Iterator[MaeDeployError]:
        yield from errors_of(self.select)


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamCommandConfig(Settings, resume="never"):
    """Settings of `mae-deploy stream`."""

    sources: tuple[str, ...] = setting(argument=True, flag="SOURCE", metavar="SOURCE")
    """A video file, a folder of images or a pattern of them, a camera's number, or an RTSP, HTTP or other URL; several
    are computed in one batch."""
    bundle: Path = setting(argument=True, metavar="BUNDLE")
    """Bundle folder; of --tokens cached, or every frame is computed whole."""
    out: Path | None = setting(None, basic=True)
    """Write features of every frame to this .npz, .parquet or .jsonl file, as they come; rows of several sources have
    the source's number, from 0, in the column camera."""
    outputs: tuple[str, ...] | None = setting(None, metavar="NAME,…")
    """Outputs to write, by name; default: those that are vectors."""
    report: Path | None = setting(None, basic=True)
    """Write a report to this folder: HTML and Markdown, with plots and frames."""
    annotate: Path | None = setting(None, basic=True)
    """Write the frames to this .mp4 with the computed patches and the label drawn on them; of several sources to
    OUT-0.mp4, OUT-1.mp4 and so on."""
    video: VideoOptions = section(VideoOptions)
    selection: SelectionOptions = section(SelectionOptions)
    stream: StreamOptions = section(StreamOptions)
    max_pixels: int | None = setting(None, at_least=1)
    """Pixels of the largest image that is read, such as 300000000; default: 178956970."""
    engine: str = setting("auto", metavar="ENGINE", basic=True)
    """onnxruntime (onnx), openvino (ov), tensorrt (trt) or tensorrt-rtx (trt-rtx); auto: TensorRT where the bundle has
    an engine for this machine, else the one on which the bundle was checked, where it is installed, else
    onnxruntime."""
    threads: int | None = setting(None, at_least=1, at_most=4096)
    """CPU threads of the engine; default: one for each granted core, or for each of --affinity."""
    affinity: tuple[int, ...] | None = None
    """CPU cores that the engine is bound to, e.g. 0,1 (Linux); default: any."""
    seed: int = 0
    """Not used: nothing here is random."""
    device: Device = "cpu"
    """Where to compute; auto takes the GPU where there is one."""


def _box(text: str) -> tuple[float, ...]:
    try:
        box = tuple(float(number) for number in text.split(","))
    except ValueError:
        box = ()
    if len(box) != 4 or not (box[0] < box[2] and box[1] < box[3]):
        raise ConfigError(f"--region {text} is no box", hint="give left,top,right,bottom, such as 0,0.2,1,1")
    return box
