"""Settings of `mae-deploy embed`. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mae_deploy.config import Settings, setting
from mae_deploy.embedding.job import Store
from mae_deploy.errors import ConfigError, MaeDeployError
from mae_deploy.training.config import Device


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbedConfig(Settings):
    """Settings of `mae-deploy embed`."""

    data: str = setting(argument=True, resume="fixed")
    """Images: a folder in any tree, tar shards (also streamed: URLs, pipe: commands), a Hugging Face data set on disk;
    or videos: a file, a pattern, a folder."""
    bundle: Path = setting(argument=True, metavar="BUNDLE", resume="free")
    """Bundle folder, or hf://ORG/NAME on a model hub."""
    out: Path = setting(basic=True, resume="free")
    """Folder to write shards of features to; called again after a kill, it goes on."""
    outputs: tuple[str, ...] | None = setting(None, metavar="NAME,…", basic=True, resume="fixed")
    """Outputs to write, by name; default: those that are vectors."""
    store: Store = setting("fp32", basic=True, resume="fixed")
    """Numbers of 32 or of 16 bits."""
    every: int | None = setting(None, at_least=1, basic=True, resume="fixed")
    """DATA is videos: take every so many-th frame; default: every frame, where DATA has no image."""
    shard_images: int = setting(1000, at_least=1, basic=True, resume="fixed")
    """Images in a shard: what a kill costs at most."""
    batch_size: int | None = setting(None, at_least=1, basic=True, resume="fixed")
    """Images at a time; default: the graph's fixed batch, or 8."""
    engine_workers: int | None = setting(None, at_least=1, basic=True, resume="free")
    """Processes that each have an engine and decode for it; default: one for each 4 granted cores."""
    ray: str | None = setting(None, metavar="ADDRESS", basic=True, resume="free")
    """Share the work out on a Ray cluster: its address, auto for the one that this machine is part of, or local for one
    on this machine; --out is on a disk that all see."""
    image_column: str | None = setting(None, resume="fixed")
    """Column of the images in a Hugging Face data set; default: the one that holds images."""
    max_pixels: int | None = setting(None, at_least=1, resume="free")
    """Pixels of the largest image that is read, such as 300000000 for photos of 300 megapixels; default: 178956970."""
    engine: str = setting("auto", metavar="ENGINE", basic=True, resume="fixed")
    """onnxruntime (onnx), openvino (ov), tensorrt (trt) or tensorrt-rtx (trt-rtx); auto: TensorRT where the bundle has
    an engine for this machine, else the one on which the bundle was checked, where it is installed, else
    onnxruntime."""
    threads: int | None = setting(None, at_least=1, basic=True, resume="free")
    """CPU threads of each engine; default: the granted cores, shared among the --engine-workers."""
    seed: int = setting(0, resume="free")
    """Not used: nothing here is random."""
    device: Device = setting("cpu", basic=True, resume="fixed")
    """Where to compute; auto takes the GPU where there is one."""

    def faults(self) -> Iterator[MaeDeployError]:
        if self.outputs is not None and (clash := {"id", "key"}.intersection(self.outputs)):
            yield ConfigError(f"--outputs {','.join(clash)} is the name of a column")
