"""NVIDIA's own parser and builder as TensorRT for RTX, which needs no GPU: `make tensorrt` fetches it and runs this."""

from __future__ import annotations

import pytest

from mae_deploy.errors import MissingDependency
from mae_deploy.runtime.cuda.driver import Gpu
from mae_deploy.runtime.tensorrt.api import Api
from mae_deploy.runtime.tensorrt.rtx import import_rtx

GPU = Gpu(index=0, name="NVIDIA GeForce RTX 4090", compute_capability=(8, 9), memory_bytes=24 << 30, driver="13.0")
"""A GPU that it runs on, and that is not there."""


@pytest.fixture(scope="session")
def api() -> Api:
    """TensorRT for RTX."""
    try:
        return Api(import_rtx(), GPU)
    except MissingDependency as error:
        pytest.skip(f"{error}; make tensorrt")
