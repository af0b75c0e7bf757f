"""Images a second of one core from JPEG bytes to an augmented tensor: ours against Pillow and torchvision, in turns.

python scripts/measure_decoding.py FOLDER [--side 224] [--images 100] [--rounds 9]
"""

from __future__ import annotations

import argparse
import io
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import transforms

from mae_deploy.data import decode
from mae_deploy.data.config import CropConfig
from mae_deploy.data.transforms import train_transform
from mae_deploy.images.preprocess import default_preprocess


def main() -> None:
    """Print the rate of each way, and its ratio to the first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    files = [path.read_bytes() for path in sorted(options.folder.rglob("*.jp*g"))[: options.images]]
    ways = ways_of(options.side)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, way in ways.items():
            started = time.perf_counter()
            for content in files:
                way(content)
            seconds[name].append(time.perf_counter() - started)
    first = next(iter(seconds.values()))
    for name, found in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(first, found, strict=True))
        print(f"{name:36s} {len(files) / statistics.median(found):7.0f} images/s  {ratio:.2f}x")


def ways_of(side: int) -> dict[str, Callable[[bytes], Any]]:
    """From bytes to a uint8 tensor `(3, side, side)`: random resized crop (0.2, 1), bicubic, and flip."""
    crop = transforms.RandomResizedCrop(side, (0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC)
    usual = transforms.Compose([crop, transforms.RandomHorizontalFlip()])
    transform = train_transform(default_preprocess((side, side)), CropConfig())
    fast = decode._simplejpeg

    def pillow(content: bytes) -> Any:
        with Image.open(io.BytesIO(content)) as image:
            return torch.from_numpy(np.array(usual(image.convert("RGB"))).transpose(2, 0, 1).copy())

    def whole(width: int, height: int) -> int:
        return 1

    def ours(with_fast: bool, shrink: Callable[[int, int], int] | None) -> Callable[[bytes], Any]:
        def way(content: bytes) -> Any:
            decode._simplejpeg = fast if with_fast else None
            return transform(decode.decode("a.jpg", content, 3, shrink=shrink))

        return way

    return {
        "Pillow and torchvision": pillow,
        "resizing in PyTorch": ours(False, whole),
        "and simplejpeg": ours(True, whole),
        "and large JPEGs decoded smaller": ours(True, transform.shrink),
    }


if __name__ == "__main__":
    main()
