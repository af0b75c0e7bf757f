"""Settings of `mae-deploy import` and `export-weights`. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mae_deploy.checkpoint import Positions
from mae_deploy.config import Settings, setting
from mae_deploy.images.geometry import CropMode, Interpolation
from mae_deploy.training.config import Device


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportConfig(Settings, resume="never"):
    """Settings of `mae-deploy import`."""

    source: Path = setting(argument=True, flag="SRC")
    """Weights of the original implementation, timm, Hugging Face, torchvision, mmpretrain or MAE-Lite (.pth, .pt,
    .ckpt, .bin, .safetensors, or a model folder)."""
    out: Path
    """Checkpoint folder to write."""
    model: str | None = setting(None, metavar="NAME")
    """timm's name of the model that the file is of, such as vit_base_patch16_224.augreg_in21k; default: what
    config.json or the tensors say."""
    key: str | None = setting(None, metavar="NAME")
    """Under which of its keys the file has the weights, such as teacher or callbacks.ema; default: the usual ones, and
    what else is there is said."""
    prefix: str | None = setting(None, metavar="NAME")
    """How the names of the model's tensors begin in the file, such as backbone, and the rest is left out; default: the
    one prefix that all names have."""
    image_size: tuple[int, int] | None = None
    """Height and width, H[,W]; needed where the patches form no square; for another grid the position embeddings are
    interpolated."""
    num_heads: int | None = None
    """The encoder's attention heads; default: those of the model with this width, else head dim 64."""
    decoder_num_heads: int | None = None
    """The decoder's attention heads; default: head dim 32, as the original's."""
    norm_pix_loss: bool | None = None
    """Whether the decoder predicts normalised pixels; default: what the file says, else yes."""
    license: str | None = None
    """What the weights may be used for; default: CC-BY-NC-4.0 for the known releases, else unspecified."""
    positions: Positions | None = None
    """How position embeddings are taken to another image size, here and at export: bicubic as the original and
    transformers do, or as timm, its FlexiViT or torchvision; default: as --model, config.json or the names of the
    tensors tell, else bicubic."""
    class_names: Path | None = setting(None, metavar="FILE")
    """Names of the classes in the order of the logits, one a line or as JSON (a list, id2label or class_to_idx);
    default: those that the file or its folder has."""
    crop_mode: CropMode | None = None
    """How images of another form are fitted: center cuts out the middle, squash changes the aspect ratio, border pads
    with --mean, letterbox with black; the latter three show the whole image unless --crop-pct is given; default: what
    config.json, preprocessor_config.json or --model says, else center."""
    crop_pct: float | None = setting(None, above=0, at_most=1)
    """The crop's side as a share of the resized image's; default: as of --crop-mode, else 0.875 up to 224 px, 1.0
    above."""
    interpolation: Interpolation | None = None
    """Filter of the resize; default: as of --crop-mode, else bicubic."""
    mean: tuple[float, ...] | None = None
    """Mean of each channel for pixels in [0, 1]; default: as of --crop-mode, else ImageNet's for RGB, 0.5 otherwise."""
    std: tuple[float, ...] | None = None
    """Standard deviation of each channel; default: as of --crop-mode, else ImageNet's for RGB, 0.25 otherwise."""
    seed: int = 0
    """Not used: nothing here is random."""
    device: Device = "cpu"
    """Not used: weights are converted on the CPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportWeightsConfig(Settings, resume="never"):
    """Settings of `mae-deploy export-weights`."""

    checkpoint: Path = setting(argument=True, metavar="CKPT")
    """A run folder, a checkpoint folder, or a weights file that import reads."""
    to: Literal["timm", "huggingface", "original"]
    """Who is to load it: timm or transformers (a model folder), or the original implementation (a .pth file)."""
    out: Path
    """Folder to write, or for original the .pth file."""
    seed: int = 0
    """Seed of the images that both models are compared on."""
    device: Device = "cpu"
    """Not used: weights are converted and compared on the CPU."""
