"""How many of an image's neighbours are of its class, by the features that `embed` has written of a folder of classes.

    python -m scripts.measure_neighbours FEATURES [--output pooled]

Prints a row of docs/results/embed.md for each way to compare: features as they are, centred, and whitened as `search`
does it.
"""

from __future__ import annotations

import argparse
from pathlib import Path, PurePath

import numpy as np
import pyarrow.parquet

from mae_deploy.embedding.job import features_in
from mae_deploy.embedding.neighbours import Exact
from mae_deploy.embedding.vectors import Vectors
from mae_deploy.images.arrays import Array

K = 10


def shares(rows: Array, classes: Array) -> tuple[float, float, float]:
    """Of the nearest other image, of the K nearest, and by their majority (of equal counts, the first class).

    Args:
        rows: `(N, D)`, of any length.
        classes: `(N,)`, numbers.
    """
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    found = classes[Exact(rows).others(K)[0]]
    votes = np.array([np.bincount(row).argmax() for row in found])
    same = found == classes[:, None]
    return float(same[:, 0].mean()), float(same.mean()), float((votes == classes).mean())


def main() -> None:
    """Print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("features", type=Path)
    parser.add_argument("--output")
    given = parser.parse_args()
    found = Vectors.read(given.features, given.output)
    names = [PurePath(key).parent.name for key in found.keys]
    classes = np.unique(names, return_inverse=True)[1]
    shards = [pyarrow.parquet.read_table(shard, columns=[found.output]) for shard in features_in(given.features)]
    plain = np.concatenate([np.stack(shard[found.output].to_numpy()) for shard in shards]).astype(np.float32)
    print(f"{len(names)} images of {len(set(names))} classes\n")
    print(f"| `{found.output}` | nearest | of {K} | majority of {K} |\n|---|---|---|---|")
    ways = {"as it is": plain, "centred": plain - plain.mean(axis=0), "whitened, as `search` has it": found.rows}
    for name, rows in ways.items():
        print(f"| {name} | " + " | ".join(f"{share:.3f}" for share in shares(rows, classes)) + " |")


if __name__ == "__main__":
    main()
