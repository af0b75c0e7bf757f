"""ViTDet's simple feature pyramid: four maps for a detector from a plain ViT's last one.

Li et al. 2022, "Exploring Plain Vision Transformer Backbones for Object Detection" (https://arxiv.org/abs/2203.16527), section 3.
State-dict names, initialisation and arithmetic are those of Detectron2's `SimpleFeaturePyramid` with `norm="LN"`.
Shapes: B images, D width, H' x W' patches, E output channels.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from mae_deploy.checkpoint import OWN_LICENCE, UNKNOWN_LICENCE
from mae_deploy.errors import CheckFailed, ConfigError
from mae_deploy.weights.read.check_names import check_names
from mae_deploy.weights.read.files import read_source
from mae_deploy.seeding import derive_seed

LEVELS = ("p2", "p3", "p4", "p5")
"""Names of the maps, fine to coarse. For patches of 16 pixels their strides are 4, 8, 16 and 32 (two to the power of the digit)."""

OUT_CHANNELS = 256

_NAME = re.compile(r"((?:.*\.)?)(simfp_\d+\..+)")
"""Where the pyramid stands in a detector, such as `backbone.`, and the name of a tensor in it."""

_CONVERT_PICKLE = (
    "where you trust the file: python -c "
    "\"import pickle, safetensors.numpy as s; s.save_file(pickle.load(open('model.pkl', 'rb'))['model'], 'model.safetensors')\""
)
"""Detectron2's model zoo pickles NumPy arrays."""


class NormedConv(nn.Conv2d):
    """A convolution without bias that keeps height and width, then LayerNorm over the channels of each pixel."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = LayerNorm2d(out_channels, eps=1e-6)

    def forward(self, input: Tensor) -> Tensor:
        """`(B, C, H, W) -> (B, E, H, W)`."""
        return self.norm(super().forward(input))  # type: ignore[no-any-return]


class SimpleFeaturePyramid(nn.Module):
    """Scales one feature map by 4, 2, 1 and 1/2, and takes each to the same number of channels."""

    def __init__(self, width: int, out_channels: int = OUT_CHANNELS) -> None:
        super().__init__()
        self.out_channels = out_channels
        half, quarter = width // 2, width // 4
        self.simfp_2 = nn.Sequential(_double(width, half), LayerNorm2d(half, eps=1e-6), nn.GELU(), _double(half, quarter), *_project(quarter, out_channels))
        self.simfp_3 = nn.Sequential(_double(width, half), *_project(half, out_channels))
        self.simfp_4 = nn.Sequential(*_project(width, out_channels))
        self.simfp_5 = nn.Sequential(nn.MaxPool2d(kernel_size=2, stride=2), *_project(width, out_channels))

    def forward(self, feature_map: Tensor) -> dict[str, Tensor]:
        """The maps by name, p2 first: `(B, D, H', W') -> (B, E, ...)`, of the sizes that `pyramid_sizes` gives.

        Args:
            feature_map: the last block's patch tokens. ViTDet's encoder has no final norm: its pyramid is trained on what comes before ours.
        """
        return {"p2": self.simfp_2(feature_map), "p3": self.simfp_3(feature_map), "p4": self.simfp_4(feature_map), "p5": self.simfp_5(feature_map)}


@dataclass(frozen=True, slots=True)
class Pyramid:
    """A pyramid in evaluation mode, with what goes into the record of whatever is derived from it."""

    module: SimpleFeaturePyramid
    record: dict[str, Any]
    """Where its weights come from."""
    licence: str
    """What its weights may be used for."""


def pyramid_sizes(grid_size: tuple[int, int]) -> dict[str, tuple[int, int]]:
    """Height and width of each map above a grid of patches; of an odd grid, p5 leaves the last row or column out.

    Raises:
        ConfigError: a grid of one row or column, which has no half.
    """
    rows, columns = grid_size
    if min(grid_size) < 2:
        raise ConfigError(f"a feature pyramid needs at least 2x2 patches, the image has {rows}x{columns}", hint="take a larger --image-size")
    return {"p2": (4 * rows, 4 * columns), "p3": (2 * rows, 2 * columns), "p4": (rows, columns), "p5": (rows // 2, columns // 2)}


def random_pyramid(width: int, seed: int, out_channels: int = OUT_CHANNELS) -> Pyramid:
    """An untrained pyramid, to build and time what stands on it; the same seed gives the same weights, and torch's own state stays."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(seed, "pyramid"))
        module = SimpleFeaturePyramid(width, out_channels)
    return Pyramid(module.eval(), {"source": "random", "seed": seed}, OWN_LICENCE)


def load_pyramid(path: Path, width: int) -> Pyramid:
    """Read a trained pyramid, alone or out of a whole detector: .safetensors, or a .pth of Detectron2; the file's other tensors are left aside.

    Raises:
        ConfigError: no such file.
        CheckFailed: the file is damaged, carries code, or its pyramid is not exactly one for maps `width` wide.
    """
    if not path.is_file():
        raise ConfigError(f"no pyramid weights at {path}", hint="give a .safetensors or .pth file, or 'random' for untrained weights")
    if path.suffix == ".pkl":
        raise CheckFailed(f"refused to unpickle {path}: a .pkl can run code", hint=_CONVERT_PICKLE)
    source = read_source(path)
    tensors = _pyramid_tensors(source.tensors, path)
    last = tensors.get("simfp_4.0.weight")
    with torch.device("meta"):  # nothing is allocated or initialised that the weights replace
        module = SimpleFeaturePyramid(width, last.shape[0] if last is not None and last.ndim == 4 else OUT_CHANNELS)
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    check_names(tensors, expected, path, hint=f"it must be Detectron2's SimpleFeaturePyramid with norm='LN' on an encoder {width} wide")
    module.load_state_dict(tensors, assign=True)
    return Pyramid(module.eval(), {"source": path.name, "source_sha256": source.sha256}, UNKNOWN_LICENCE)


def _pyramid_tensors(tensors: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """The one pyramid among the tensors of a detector, in float32 and under its own names."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if match := _NAME.fullmatch(name):
            found.setdefault(match[1], {})[match[2]] = tensor.float()
    if not found:
        raise CheckFailed(f"{file} holds no feature pyramid: none of its {len(tensors)} tensors is named simfp_… (found {', '.join(list(tensors)[:4])} …)")
    if len(found) > 1:
        raise CheckFailed(f"{file} holds {len(found)} feature pyramids: {', '.join(f'{prefix}simfp_…' for prefix in found)}", hint="give a file with one")
    return next(iter(found.values()))


def _double(in_channels: int, out_channels: int) -> nn.Module:
    """Twice the height and width."""
    return nn.ConvTranspose2d(in_channels, out_channels, kernel_size=2, stride=2)


def _project(in_channels: int, out_channels: int) -> tuple[nn.Module, nn.Module]:
    """To the channels of the output."""
    return NormedConv(in_channels, out_channels, 1), NormedConv(out_channels, out_channels, 3)
