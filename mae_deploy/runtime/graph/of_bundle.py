"""What a bundle's graph may cost, from the numbers of its manifest."""

from __future__ import annotations

from pathlib import Path

from mae_deploy.runtime.graph.check import GraphCheck, Network, check_graph
from mae_deploy.runtime.manifest import Manifest, num_prefix

_MANY = 64
"""Images at once: what grows faster than their number shows."""


def check_graph_of(manifest: Manifest, path: Path) -> GraphCheck:
    """Refuse a graph that no engine should run, be it of one image with the fewest patches or of many with all.

    Returns:
        What checks it for the sizes of each call.

    Raises:
        ConfigError: as `check_graph`.
    """
    model, N = manifest["model"], manifest["num_patches"]
    network = Network(tokens=num_prefix(model) + N, dim=model["embed_dim"], heads=model["num_heads"])
    keeps = manifest["profile"].get("K", [N] * 3)
    batches = [manifest["batch"]] * 2 if manifest["batch"] else [1, _MANY]
    trials = [
        {
            entry["name"]: [
                side if isinstance(side, int) else {"B": batch, "K": keep, "R": network.tokens}.get(side, 1)
                for side in entry["shape"]
            ]
            for entry in manifest["graph"]["inputs"]
        }
        for batch, keep in zip(batches, (keeps[0], keeps[2]), strict=True)
    ]
    return check_graph(path, trials, network)
