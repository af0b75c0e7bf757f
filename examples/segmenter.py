"""A linear segmenter on a bundle's feature map: which patches show the thing. No PyTorch, and no training but a fit.

    mae-deploy export runs/mae --out bundles/dense --outputs feature_map
    python examples/segmenter.py bundles/dense images masks --out segmenter.npz

masks/NAME.png is not black where images/NAME.* shows the thing. A fifth of the images is held out.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from mae_deploy.images.find import find_images
from mae_deploy.runtime import Backbone


def main(arguments: list[str] | None = None) -> float:
    """The intersection over union on the held-out images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", help="exported with --outputs feature_map")
    parser.add_argument("images", type=Path)
    parser.add_argument("masks", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ridge", type=float, default=1.0, help="regularisation")
    given = parser.parse_args(arguments)

    rows, targets = [], []
    with Backbone.load(given.bundle, crop_mode="squash") as backbone:  # so that masks can be resized the same way
        for path in find_images(given.images):
            feature_map = backbone(backbone.read(path)).feature_map[0]  # (D, H', W')
            mask = Image.open(given.masks / f"{path.stem}.png").convert("L")
            covered = mask.resize(feature_map.shape[:0:-1], Image.Resampling.BOX)  # the share of each patch
            rows.append(feature_map.reshape(len(feature_map), -1).T)
            targets.append(np.asarray(covered).reshape(-1) > 127)
    held_out = max(1, len(rows) // 5)
    x, y = np.concatenate(rows[held_out:]), np.concatenate(targets[held_out:])
    mean, std = x.mean(0), x.std(0) + 1e-6
    x = (x - mean) / std
    weight = np.linalg.solve(x.T @ x + given.ridge * np.eye(x.shape[1]), x.T @ (y - y.mean()))
    bias = y.mean() - 0.5

    found = ((np.concatenate(rows[:held_out]) - mean) / std) @ weight + bias > 0
    true = np.concatenate(targets[:held_out])
    iou = float((found & true).sum() / max((found | true).sum(), 1))
    np.savez(given.out, weight=weight, bias=bias, mean=mean, std=std)
    print(f"{len(rows) - held_out} images to fit, {held_out} held out: intersection over union {iou:.2f}")
    return iou


if __name__ == "__main__":
    main()
