"""Call what `mae_deploy.runtime.tensorrt.api` derives from the `tensorrt` module with the real bindings of one version;
needs no GPU.

`check_tensorrt_api.sh` runs it. The subclasses are made for real, and every type and flag goes through our code.
"""

from __future__ import annotations

import tensorrt as trt

from mae_deploy.errors import ConfigError, MaeDeployError
from mae_deploy.runtime.tensorrt import api


def available(function: object, *arguments: object, **options: object) -> bool:
    """Whether this version has what is asked for; a refusal must be ours."""
    try:
        function(*arguments, **options)  # type: ignore[operator]
    except (ConfigError, MaeDeployError):
        return False
    return True


messages = api.Messages()
logger = api.create_logger(trt, messages)
for severity in trt.ILogger.Severity.__members__.values():
    logger.log(severity, f"said with {severity.name}")
assert messages.errors == ["said with INTERNAL_ERROR", "said with ERROR"], messages.errors
assert messages.warnings == ["said with WARNING"], messages.warnings

told: list[object] = []


def step(*given: object) -> bool:
    told.append(given)
    return False


monitor = api.create_progress_monitor(trt, lambda *phase: told.append(phase), step, told.append)
assert (monitor is None) == (api.major_version(trt) == 8)
if monitor is not None:
    monitor.phase_start("build", None, 2)
    assert monitor.step_complete("build", 0) is False
    monitor.phase_finish("build")
    assert told == [("build", None, 2), ("build", 0), "build"], told

types = [name for name, dtype in trt.DataType.__members__.items() if available(api.numpy_dtype, trt, dtype)]
assert {"FLOAT", "HALF", "INT8", "INT32", "BOOL"} <= set(types), types
precisions = {
    typing: [
        precision
        for precision in ("fp32", "fp16", "bf16", "int8", "fp8")
        if available(api.precision_flags, trt, precision, strong=typing == "strong")
    ]
    for typing in ("weak", "strong")
}
levels = [level for level in ("none", "same", "ampere") if available(api.hardware_level, trt, level)]
flags = [hex(api.network_flags(trt, strong=strong)) for strong in (False, True)]
print(
    f"TensorRT {trt.__version__}: weak {','.join(precisions['weak'])}; strong {','.join(precisions['strong'])}; levels"
    f" {','.join(levels)}; network {flags}"
)
