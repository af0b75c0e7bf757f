"""k nearest neighbours: each training image votes for its class with exp(cosine / temperature).

Wu et al., Unsupervised Feature Learning via Non-Parametric Instance Discrimination: https://arxiv.org/abs/1805.01978
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mae_deploy.data.sources.splits import labelled_splits
from mae_deploy.evaluation.accuracy import Accuracy
from mae_deploy.evaluation.config import KnnConfig
from mae_deploy.evaluation.features import FeatureSet, extract, open_source
from mae_deploy.progress import notice
from mae_deploy.reporting.tables import Column, Table
from mae_deploy.results import Result
from mae_deploy.training.device import resolve_device

BLOCK_SIZE = 4096


def run_knn(config: KnnConfig) -> Result:
    """Evaluate an encoder by its nearest neighbours.

    Raises:
        CheckFailed: no image can be read.
        ConfigError: no encoder, no labelled images, or a feature that the encoder does not have.
        MissingDependency: the device or the engine is absent.
    """
    train, val = labelled_splits(config.data, config.validation, seed=config.seed)
    assert train.class_names is not None
    source = open_source(config.init, config.features, config.device)
    try:
        known = extract(source, train, config.features, title="train")
        asked = extract(source, val, config.features, title="val")
    finally:
        source.close()
    device = resolve_device(config.device)
    found = knn(
        known,
        asked,
        len(train.class_names),
        config.k,
        temperature=config.temperature,
        block_size=config.block_size,
        device=device,
    )
    data = {
        "encoder": str(config.init),
        "features": source.description,
        "train_images": len(known.labels),
        "val_images": len(asked.labels),
        "unreadable": [*known.unreadable, *asked.unreadable],
        "temperature": config.temperature,
        "images_per_second": known.images_per_second,
        "knn": found,
    }
    columns = (Column("k", "k"), Column("top-1", "top1", "{:.2f} %"), Column("top-5", "top5", "{:.2f} %"))
    rows = [{"k": k, **accuracy} for k, accuracy in found.items()]
    return Result(data, Table(f"k-NN, {source.description}", columns, rows))


def knn(
    train: FeatureSet,
    val: FeatureSet,
    num_classes: int,
    ks: tuple[int, ...],
    *,
    temperature: float,
    block_size: int = BLOCK_SIZE,
    device: torch.device | None = None,
) -> dict[int, dict[str, Any]]:
    """Top-1 and top-5 in per cent for each k; a k beyond the number of training images means all of them, and is
    reported as that.
    """
    if max(ks) > len(train.labels):
        notice("k-NN:", f"there are only {len(train.labels)} training images: --k {max(ks)} means all of them")
        ks = tuple(dict.fromkeys(min(k, len(train.labels)) for k in ks))
    counts = {k: Accuracy(num_classes, unranked=0.0) for k in ks}
    for first in range(0, len(val.labels), block_size):
        queries = val.features[first : first + block_size]
        similarities, neighbours = nearest(train.features, queries, max(ks), block_size=block_size, device=device)
        voters = train.labels[neighbours]
        for k, accuracy in counts.items():
            scores = votes(similarities[:, :k], voters[:, :k], num_classes, temperature)
            accuracy.add(scores.numpy(), val.labels[first : first + block_size].numpy())
    return {k: accuracy.summary() for k, accuracy in counts.items()}


def nearest(
    train: Tensor, queries: Tensor, k: int, *, block_size: int = BLOCK_SIZE, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """The k training features with the highest cosine, best first: `(S, D), (Q, D) -> (Q, k)` cosines and `(Q, k)`
    indices, on the CPU.

    The training features come in blocks, of which the best k so far are kept: never more than `Q * (block_size + k)`
    cosines are held.
    """
    queries = F.normalize(queries.to(device), dim=1)
    best = torch.empty(len(queries), 0, device=queries.device)
    indices = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for first in range(0, len(train), block_size):
        block = F.normalize(train[first : first + block_size].to(device), dim=1)
        cosines = torch.cat([best, queries @ block.T], dim=1)
        places = torch.arange(first, first + len(block), device=queries.device).expand(len(queries), -1)
        best, chosen = cosines.topk(min(k, cosines.shape[1]), dim=1)
        indices = torch.cat([indices, places], dim=1).gather(1, chosen)
    return best.cpu(), indices.cpu()


def votes(cosines: Tensor, labels: Tensor, num_classes: int, temperature: float) -> Tensor:
    """The sum of each class's votes: `(Q, k), (Q, k) -> (Q, classes)`; zero for a class without a neighbour.

    The nearest neighbour's vote is 1 and the others are relative to it, so that no temperature overflows.
    """
    weights = ((cosines - cosines[:, :1]) / temperature).double().exp().clamp_min(1e-300)
    return torch.zeros(len(cosines), num_classes, dtype=torch.float64).scatter_add_(1, labels, weights)
