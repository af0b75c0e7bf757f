"""Whether a bundle computes on this device what PyTorch computed when it was exported; no torch needed."""

from __future__ import annotations

from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.engines.base import EngineOptions
from mae_deploy.runtime.parity.checks import Verification, verify_engine
from mae_deploy.runtime.registry import load_engine


def verify_bundle(bundle: Bundle, engine: str = "auto", options: EngineOptions = EngineOptions()) -> Verification:
    """Check the hash of every file, then run the golden samples and compare all outputs with PyTorch's and with
    themselves under invariances.

    Raises:
        CheckFailed: a file is not what was exported. A missed tolerance is not an exception: see `Verification.passed`.
        ConfigError: an unknown engine or device.
        MissingDependency: the engine's package or its device is absent.
        MaeDeployError: the engine refuses the graph or the samples.
    """
    bundle.check_files()
    with load_engine(bundle, engine, options) as loaded:
        return verify_engine(bundle, loaded)
