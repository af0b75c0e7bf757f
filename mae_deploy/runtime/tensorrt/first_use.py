"""An engine of TensorRT for RTX makes its kernels on the device, and is built where there may be none: so each kind of
GPU compares it with PyTorch's outputs when it first runs it, and the bundle records that.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from mae_deploy.errors import CheckFailed, MaeDeployError
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.engines.base import Engine
from mae_deploy.runtime.manifest import EngineEntry
from mae_deploy.runtime.parity.checks import Check, verify_engine
from mae_deploy.runtime.tensorrt.add_plan import record_parity
from mae_deploy.runtime.tensorrt.check_plan import parity_record
from mae_deploy.runtime.tensorrt.engine import TensorRtRtxEngine
from mae_deploy.runtime.tensorrt.plans import is_verified

_log = logging.getLogger(__name__)


def check_first_use(bundle: Bundle, engine: Engine) -> None:
    """Run the golden samples on an engine that was loaded from the bundle, unless a GPU like this one has done so.

    Raises:
        CheckFailed: it does not compute what PyTorch computed; it is closed.
    """
    entry = _unverified(bundle, engine)
    if entry is None:
        return
    verification = verify_engine(bundle, engine)
    if verification.failures:
        engine.close()
        raise CheckFailed(
            f"{entry['file']} was built without a GPU, and misses parity on this one:"
            f" {'; '.join(verification.failures)}",
            hint="--engine onnxruntime runs every bundle; another --precision or version may compute it right",
        )
    keep_proof(bundle, engine, verification.checks)


def keep_proof(bundle: Bundle, engine: Engine, checks: Sequence[Check]) -> None:
    """Record that an engine passed these checks on this GPU; in a bundle that cannot be written that is only logged."""
    entry = _unverified(bundle, engine)
    if entry is None or not isinstance(engine, TensorRtRtxEngine):
        return
    try:
        record_parity(bundle, entry["file"], engine.gpu, parity_record(checks))
    except MaeDeployError as error:
        _log.warning(
            "%s is verified on %s, and will be again when it is loaded: %s", entry["file"], engine.gpu.name, error
        )


def _unverified(bundle: Bundle, engine: Engine) -> EngineEntry | None:
    """The engine's entry in the bundle, where this kind of GPU has not verified it; one that was built for its inner
    tensors has none.
    """
    if not isinstance(engine, TensorRtRtxEngine):
        return None
    entries = (entry for entry in bundle.manifest["engines"] if bundle.path / entry["file"] == engine.plan)
    return next((entry for entry in entries if not is_verified(entry, engine.gpu)), None)
