"""Models that bear INT8 and BF16, images that they tell apart, and exports of them through the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from mae_deploy.cli import main
from mae_deploy.models.config import DecoderConfig, EncoderConfig
from mae_deploy.models.mae import MaskedAutoencoder
from mae_deploy.models.vit import Classifier, initialise_linear
from tests.export.tiny_exports import CLASS_NAMES
from tests.models.tiny_models import ENCODER

M = TypeVar("M", bound=nn.Module)

CONFIG = replace(ENCODER, embed_dim=40)
DECODER = DecoderConfig(decoder_depth=1, decoder_embed_dim=24, decoder_num_heads=3)
LINEARS = 8
"""qkv, proj, fc1 and fc2 of two blocks."""


def write_blots(folder: Path, count: int, *, first: int = 0, channels: int = 3) -> Path:
    """Images of a few soft colours: noise would look much the same to every model."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        coarse = np.random.default_rng(number).integers(0, 256, (2, 2, channels), dtype=np.uint8)
        Image.fromarray(coarse.squeeze(-1) if channels == 1 else coarse).resize(
            (13, 17), Image.Resampling.BICUBIC
        ).save(folder / f"{number:03d}.png")
    return folder


@torch.no_grad()
def settled(build: Callable[[], M], seed: int = 0) -> M:
    """A model with weights of the size that training starts from; what an image shows reaches every output, so that
    noise of 35 dB does not hide it.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = build().eval()
        model.apply(initialise_linear)
    for name, tensor in model.named_parameters():
        if name.endswith("bias"):
            tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
        elif "norm" in name:
            tensor.copy_(1 + 0.1 * torch.randn(tensor.shape, generator=generator))
        elif name == "patch_embed.proj.weight":
            tensor.mul_(4)
        elif name.endswith("attn.proj.weight"):
            tensor.mul_(2)
        elif name == "decoder_embed.weight":
            tensor.mul_(8)
    return model


def robust_mae(config: EncoderConfig = CONFIG) -> MaskedAutoencoder:
    return settled(lambda: MaskedAutoencoder(config, DECODER))


def robust_classifier() -> Classifier:
    return settled(lambda: Classifier(CONFIG, num_classes=len(CLASS_NAMES), pool="avg"))


class Exports:
    """`mae-deploy` on one checkpoint and one folder of images, on one thread."""

    def __init__(self, checkpoint: Path, photos: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.checkpoint, self.photos, self.out, self._capsys = checkpoint, photos, out, capsys

    def __call__(self, *arguments: object, **more: object) -> tuple[int, str]:
        """The exit code of an export, and what it printed: its JSON if it passed, else the error and the hint."""
        given = {"samples": self.photos, "out": self.out, "threads": 1, **more}
        options = [text for name, value in given.items() for text in (f"--{name.replace('_', '-')}", str(value))]
        code = main(["export", str(self.checkpoint), *options, *map(str, arguments), "--json"])
        captured = self._capsys.readouterr()
        return code, (
            captured.out
            if code == 0
            else "\n".join(line for line in captured.err.splitlines() if line.startswith(("error: ", "hint: ")))
        )

    def passed(self, *arguments: object, **more: object) -> dict[str, Any]:
        """The result of an export that must pass."""
        code, said = self(*arguments, **more)
        assert code == 0, said
        found: dict[str, Any] = json.loads(said)
        return found

    def verified(self, *arguments: object, out: Path | None = None) -> dict[str, Any]:
        """The result of `verify`, which must pass."""
        code = main(["verify", str(out or self.out), "--threads", "1", "--json", *map(str, arguments)])
        captured = self._capsys.readouterr()
        assert code == 0, captured.err
        found: dict[str, Any] = json.loads(captured.out)
        return found

    @property
    def manifest(self) -> dict[str, Any]:
        """Of the bundle that was written last."""
        found: dict[str, Any] = json.loads((self.out / "manifest.json").read_text())
        return found

    @property
    def left(self) -> set[str]:
        """What lies in the folder of `--out`."""
        return {path.name for path in self.out.parent.iterdir()} if self.out.parent.is_dir() else set()
