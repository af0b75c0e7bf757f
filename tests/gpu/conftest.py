"""What tests on a GPU need; a machine that lacks it skips them and says what is missing.

Neither torch nor onnx is imported here, so that these tests run beside TensorRT alone:
`pytest --confcutdir tests/gpu tests/gpu`.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mae_deploy.errors import MissingDependency
from mae_deploy.runtime.cuda.driver import Gpu, require_gpu
from mae_deploy.runtime.cuda.memory import Memory
from mae_deploy.runtime.cuda.open_memory import BACKENDS, open_memory
from mae_deploy.runtime.tensorrt.api import Api, load_tensorrt


@pytest.fixture(scope="session")
def gpu() -> Gpu:
    """The first GPU."""
    try:
        return require_gpu()
    except MissingDependency as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def api(gpu: Gpu) -> Api:
    """TensorRT, whichever version is installed."""
    try:
        return load_tensorrt()
    except MissingDependency as error:
        pytest.skip(str(error))


@pytest.fixture(params=tuple(BACKENDS))
def memory(gpu: Gpu, request: pytest.FixtureRequest) -> Iterator[Memory]:
    """The GPU's memory through each of the packages that give it, not made current."""
    try:
        opened = open_memory(request.param, gpu.index)
    except MissingDependency as error:
        pytest.skip(str(error))
    with opened:
        yield opened
