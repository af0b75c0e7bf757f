"""What rotary positions bring or cost a small MAE against a table of sines: k-NN and a linear probe at the size of
pretraining and at 1.5 times that, where the table is interpolated. The arms take turns, seed by seed, with the same
images, order and masks; prints a row for each run as it comes, and the page's table at the end.

    python -m scripts.measure_rotary UNLABELLED LABELLED OUT [--image-size 32] [--patch-size 4] [--epochs 10] …
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mae_deploy.config import from_dict
from mae_deploy.data.config import ValidationConfig
from mae_deploy.data.sources.splits import labelled_splits
from mae_deploy.evaluation.config import FeaturesConfig
from mae_deploy.evaluation.features import EncoderFeatures, extract
from mae_deploy.evaluation.knn import knn
from mae_deploy.evaluation.linear import fit_linear
from mae_deploy.pretrain.config import PretrainConfig
from mae_deploy.pretrain.run import run_pretrain
from mae_deploy.weights.load import read_weights

ARMS = ("none", "dinov3")
K = 20
"""Neighbours."""


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """A row for each seed, arm and size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("unlabelled", type=Path)
    parser.add_argument("labelled", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--patch-size", type=int, default=4)
    parser.add_argument("--embed-dim", type=int, default=64)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--num-heads", type=int, default=2)
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    for seed in given.seeds:
        for arm in ARMS:
            run = given.out / f"{arm}-{seed}"
            started = time.process_time()
            pretrained = run_pretrain(_settings(given, run, arm, seed))
            row = {"arm": arm, "seed": seed, "loss": pretrained["last_loss"], "cpu_s": time.process_time() - started}
            for size in (given.image_size, given.image_size * 3 // 2):
                rows.append({**row, "size": size, **_probes(given.labelled, run, size, seed)})
                print(json.dumps(rows[-1]), flush=True)
    return rows


def _settings(given: argparse.Namespace, out: Path, arm: str, seed: int) -> PretrainConfig:
    size = given.image_size
    model = {
        "name": "vit_small_of_its_own",
        "image_size": [size, size],
        "patch_size": given.patch_size,
        "embed_dim": given.embed_dim,
        "depth": given.depth,
        "num_heads": given.num_heads,
        "rotary": arm,
    }
    return from_dict(
        PretrainConfig,
        {
            "data": str(given.unlabelled),
            "out": str(out),
            "resume": True,
            "seed": seed,
            "model": model,
            "decoder": {"decoder_depth": 1, "decoder_embed_dim": 32, "decoder_num_heads": 2},
            "optim": {"epochs": given.epochs, "batch_size": 128, "lr": 1.5e-3, "warmup_epochs": 0.5},
            "augment": {"min_scale": 0.4},
            "images": {"crop_pct": 1.0, "cache": True, "num_workers": 0},
            "pictures_every": 1000,
        },
    )


def _probes(labelled: Path, run: Path, size: int, seed: int) -> dict[str, float]:
    train, val = labelled_splits(labelled, ValidationConfig(), seed=0)
    config = FeaturesConfig(pool="avg", image_size=(size, size), num_workers=0)
    source = EncoderFeatures(read_weights(run), config, "cpu")
    known, asked = (extract(source, images, config) for images in (train, val))
    classes = len(train.class_names or ())
    neighbours = knn(known, asked, classes, (K,), temperature=0.07)
    fitted = fit_linear("ridge", known.features, known.labels, classes, held_out=0.2, seed=seed)
    return {"knn": neighbours[K]["top1"], "linear": fitted.accuracy(asked.features, asked.labels).top1}


if __name__ == "__main__":
    main()
