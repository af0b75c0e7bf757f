"""What `compare --at-latency` compares: encoders that were opened, their graphs and their features at a point."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mae_deploy.commands.compare.graphs import BundleGraphs, CheckpointGraphs, Graphs
from mae_deploy.commands.compare.points import OperatingPoint
from mae_deploy.evaluation.compare import Entry
from mae_deploy.evaluation.config import CompareConfig
from mae_deploy.evaluation.features import BundleFeatures, EncoderFeatures, FeatureSource, random_like
from mae_deploy.runtime.engines.base import EngineOptions
from mae_deploy.weights.load import LoadedWeights, at_image_size, read_weights
from mae_deploy.weights.read.convert import ImportOptions, import_weights


@dataclass(frozen=True, slots=True)
class Subject:
    """One encoder."""

    entry: Entry
    config: CompareConfig
    loaded: LoadedWeights | None
    """At the size asked for; None of a bundle."""
    output: str
    """What its graph calls the feature that is read."""
    about: dict[str, Any]
    """For the report."""

    def graphs(self) -> Graphs:
        """What is timed; each call gives graphs of its own, which can be loaded beside others."""
        features = self.config.features
        options = EngineOptions(device=self.config.device, threads=features.threads)
        if self.loaded is None:
            assert self.entry.path is not None
            return BundleGraphs(self.entry.path, features.engine, options)
        return CheckpointGraphs(self.loaded, self.output, features.engine, options)

    def features(self, point: OperatingPoint, seed: int) -> FeatureSource:
        """What the probes read."""
        config, keep = self.config, None if point.whole else point.keep
        if self.loaded is None:
            assert self.entry.path is not None
            return BundleFeatures(self.entry.path, config.features, config.device, keep=keep, seed=seed)
        loaded = random_like(self.loaded, seed) if self.entry.kind == "random" else self.loaded
        features = replace(config.features, image_size=point.image_size)
        return EncoderFeatures(loaded, features, config.device, keep=keep, seed=seed)


def open_subject(entry: Entry, config: CompareConfig, network: Path | None) -> Subject:
    """Read an encoder's weights.

    Args:
        network: the checkpoint whose architecture random weights have.

    Raises:
        ConfigError: it has no such feature, or no graph can be exported of it.
        CheckFailed: it is damaged.
        MissingDependency: the device or the engine is absent.
    """
    about: dict[str, Any] = {
        "name": entry.name,
        "path": None if entry.path is None else str(entry.path),
        "kind": entry.kind,
    }
    if entry.kind == "bundle":
        assert entry.path is not None
        bundle = BundleFeatures(entry.path, config.features, config.device)
        bundle.close()
        return Subject(entry, config, None, "", {**about, "parameters": bundle.parameters, "licence": bundle.licence})
    loaded = at_image_size(_weights(entry, config, network), config.features.image_size)
    source = EncoderFeatures(loaded, config.features, config.device)
    about |= {"parameters": source.parameters, "licence": source.licence}
    return Subject(entry, config, loaded, source.output, about)


def _weights(entry: Entry, config: CompareConfig, network: Path | None) -> LoadedWeights:
    if entry.architecture is not None:
        assert entry.path is not None
        imported = import_weights(entry.path, ImportOptions(model=entry.architecture))
        record = {"path": str(entry.path), **imported.metadata.provenance}
        return LoadedWeights(imported.metadata, imported.tensors, record)
    path = entry.path or network
    assert path is not None
    loaded = read_weights(path)
    return random_like(loaded, config.seed) if entry.kind == "random" else loaded
