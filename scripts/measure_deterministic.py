"""What `--deterministic` costs on this device: runs of a small network with and without it, in turns; on a CPU by the
time that it computed.

    python -m scripts.measure_deterministic [--rounds 7] [--device cpu]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mae_deploy.data.config import DataConfig
from mae_deploy.models.config import DecoderConfig, EncoderConfig
from mae_deploy.pretrain.config import PretrainConfig
from mae_deploy.pretrain.run import run_pretrain
from mae_deploy.training.config import LoopConfig, OptimConfig

_MODEL = EncoderConfig(name="small", image_size=(32, 32), patch_size=4, embed_dim=96, depth=3, num_heads=3)
_DECODER = DecoderConfig(decoder_depth=1, decoder_embed_dim=64, decoder_num_heads=2)


def main(arguments: Sequence[str] | None = None) -> float:
    """The ratio of medians, with to without."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    with tempfile.TemporaryDirectory(prefix="mae-deploy-") as folder:
        photos = Path(folder) / "photos"
        photos.mkdir()
        for number in range(32):
            pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(photos / f"{number}.png")
        for turn in range(given.rounds + 1):
            for wanted in (False, True):
                out = Path(folder) / f"{turn}-{wanted}"
                spent = _seconds(photos, out, deterministic=wanted, device=given.device)
                if turn:  # the first is to warm up
                    seconds[wanted].append(spent)
    medians = {wanted: statistics.median(found) for wanted, found in seconds.items()}
    ratio = medians[True] / medians[False]
    print(f"without {medians[False]:.3f} s, with {medians[True]:.3f} s for 40 steps: {ratio:.3f} times the time")
    return ratio


def _seconds(photos: Path, out: Path, *, deterministic: bool, device: Any) -> float:
    began = time.perf_counter() if device != "cpu" else time.process_time()
    run_pretrain(
        PretrainConfig(
            data=str(photos),
            out=out,
            model=_MODEL,
            decoder=_DECODER,
            optim=OptimConfig(epochs=10, batch_size=8),
            images=DataConfig(num_workers=0),
            loop=LoopConfig(deterministic=deterministic, checkpoint_every=10),
            pictures_every=1_000_000,
            device=device,
        )
    )
    return (time.perf_counter() if device != "cpu" else time.process_time()) - began


if __name__ == "__main__":
    main()
