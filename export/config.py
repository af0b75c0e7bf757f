"""Settings of export. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mae_deploy.config import setting
from mae_deploy.errors import ConfigError
from mae_deploy.training.config import Device


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    """Settings of `mae-deploy export`."""

    checkpoint: Path = setting(argument=True)
    """A run folder, a checkpoint folder or a weights file."""
    out: Path
    """Bundle folder to write."""
    engine: Literal["onnx"] = "onnx"
    """onnx: a graph for ONNX Runtime and every engine that reads ONNX."""
    tokens: str = "full"
    """full: the whole image; visible: the patches given as ids_keep, any number of them; visible:K: exactly K."""
    precision: Literal["fp32"] = "fp32"
    """Arithmetic of the graph."""
    batch: str = "dynamic"
    """A fixed batch size, or dynamic."""
    outputs: tuple[str, ...] | None = None
    """Outputs by name: cls, tokens, pooled, logits; default: all that the model has."""
    image_size: tuple[int, int] | None = None
    """Input height and width, H[,W]; default: the checkpoint's, for another the position embeddings are interpolated."""
    samples: Path | None = None
    """Folder of images for the parity check; default: the data that the checkpoint was trained on."""
    num_samples: int = 32
    """Images of the parity check; the first 8 go into the bundle as golden samples."""
    seed: int = 0
    """Seed of the visible patches in the parity check."""
    device: Device = "cpu"
    """Where PyTorch computes the reference: auto, cpu or cuda."""

    def __post_init__(self) -> None:
        mode, colon, keep = self.tokens.partition(":")
        if mode not in ("full", "visible") or (colon and (mode == "full" or not keep.isdecimal() or int(keep) < 1)):
            raise ConfigError(f"--tokens {self.tokens}", hint="write full, visible, or visible:K such as visible:49")
        if self.batch != "dynamic" and not (self.batch.isdecimal() and int(self.batch) >= 1):
            raise ConfigError(f"--batch {self.batch}", hint="a number of at least 1, or dynamic")
        if self.outputs is not None and len(set(self.outputs)) < len(self.outputs):
            raise ConfigError(f"--outputs {','.join(self.outputs)} names an output twice")
        if self.num_samples < 1:
            raise ConfigError(f"--num-samples {self.num_samples} must be at least 1")

    @property
    def token_mode(self) -> Literal["full", "visible"]:
        """full or visible."""
        return "full" if self.tokens == "full" else "visible"

    @property
    def keep(self) -> int | None:
        """The fixed K of `visible:K`."""
        return int(self.tokens.partition(":")[2]) if ":" in self.tokens else None

    @property
    def fixed_batch(self) -> int | None:
        """The fixed batch."""
        return None if self.batch == "dynamic" else int(self.batch)
