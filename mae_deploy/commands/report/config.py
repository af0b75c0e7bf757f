"""Settings of `mae-deploy report`. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mae_deploy.config import section, setting
from mae_deploy.errors import ConfigError
from mae_deploy.export.config import Int8Config
from mae_deploy.models.mask_config import check_shares
from mae_deploy.training.config import Device


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportConfig:
    """Settings of `mae-deploy report`."""

    runs: tuple[Path, ...] = setting(argument=True, flag="RUN")
    """Classifiers: runs or checkpoints of `distill` and `finetune`; a row for each, or several (see --keep-ratio)."""
    data: Path
    """Labelled images: DATA/val/<class>/… judges; DATA/train, where it has enough images, calibrates."""
    out: Path
    """Folder to write: report.json, report.md, and the bundles in students/. The same command goes on where it was cut
    off."""
    engine: Literal["onnx", "openvino"] = "onnx"
    """What the bundles are made for, judged and timed on: ONNX Runtime or OpenVINO."""
    keep_ratio: tuple[float, ...] | None = None
    """Shares of the patches to judge and time, separated by commas, a row for each; default: those that a run was
    trained on with --keep-ratio, else 1."""
    repeats: int = 50
    """Timed rounds of one image; FP32 and INT8 of all rows take turns."""
    warmup: int = 5
    """Rounds before them that are not timed."""
    threads: int | None = None
    """CPU threads of the engine; default: one for each core, or for each of --affinity."""
    affinity: tuple[int, ...] | None = None
    """CPU cores that the engine is bound to while it is judged and timed, e.g. 0,1 (Linux); default: any."""
    int8: Int8Config = section(Int8Config, max_drop=0.5)
    seed: int = 0
    """Seed of the patches that are seen where not all are."""
    device: Device = "cpu"
    """Where PyTorch computes what the graphs are compared with, and the engine its answers: auto, cpu or cuda."""

    def __post_init__(self) -> None:
        check_shares(self.keep_ratio)
        if self.repeats < 1 or self.warmup < 0:
            raise ConfigError("--repeats must be at least 1, --warmup at least 0")
        if self.int8.max_drop is None:
            raise ConfigError("report judges INT8 by --max-drop", hint="0.5 by default")
