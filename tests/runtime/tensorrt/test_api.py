"""What the versions of TensorRT do differently, on stand-ins for their modules; the real bindings are tried in
tests/packaging.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mae_deploy.errors import ConfigError, MaeDeployError, MissingDependency
from mae_deploy.runtime.cuda.driver import Gpu
from mae_deploy.runtime.tensorrt import api as tensorrt_api
from mae_deploy.runtime.tensorrt.api import (
    Api,
    Messages,
    builder_flags,
    check_precision,
    hardware_level,
    load_tensorrt,
    major_version,
    network_flags,
    parser_errors,
    precision_flags,
    set_kernel_sources,
    share_profiles,
)

T4 = Gpu(index=0, name="Tesla T4", compute_capability=(7, 5), memory_bytes=1 << 34, driver="12.4")


def module(version: str, **parts: Any) -> Any:
    """A `tensorrt` module with the flags that this version has; their numbers are none that a version uses."""
    major = int(version.split(".")[0])
    flags = {"REFIT": 31, "VERSION_COMPATIBLE": 32, "TF32": 33}
    if major < 11:
        flags |= {"FP16": 41, "INT8": 42, "FP8": 43}
    if major >= 10:
        flags |= {"STRIP_PLAN": 51} | ({"BF16": 52} if major == 10 else {})
    network = {8: {"EXPLICIT_BATCH": 5}, 10: {"EXPLICIT_BATCH": 5, "STRONGLY_TYPED": 6}, 11: {"STRONGLY_TYPED": 6}}
    return SimpleNamespace(
        __version__=version,
        BuilderFlag=SimpleNamespace(**flags),
        NetworkDefinitionCreationFlag=SimpleNamespace(**network.get(major, {})),
        **parts,
    )


@pytest.mark.parametrize(
    ("version", "weak", "strong"),
    [("8.6.0", 1 << 5, 1 << 5), ("8.6.2", 1 << 5, 1 << 5), ("10.16.1.11", 0, 1 << 6), ("11.4.0.106", 0, 0)],
)
def test_flags_of_the_network(version: str, weak: int, strong: int) -> None:
    assert [network_flags(module(version), strong=typed) for typed in (False, True)] == [weak, strong]


@pytest.mark.parametrize("version", ["8.5.3", "7.2", "9.3.0", "12.0.1"])
def test_versions_that_this_does_not_work_with(version: str) -> None:
    with pytest.raises(MissingDependency, match=rf"TensorRT {version} is installed; this works with 8\.6, 10 and 11"):
        major_version(module(version))


@pytest.mark.parametrize(
    ("version", "precision", "strong", "flags"),
    [
        ("8.6.0", "fp32", False, []),
        ("8.6.0", "fp16", False, [41]),
        ("8.6.0", "fp16", True, [41]),
        ("8.6.0", "int8", False, [42, 41]),
        ("10.3.0", "int8", False, [42, 41]),
        ("10.3.0", "bf16", False, [52]),
        ("10.3.0", "int8", True, []),
        ("10.3.0", "fp8", True, []),
        ("11.4.0", "fp16", True, []),
        ("11.4.0", "fp32", False, []),
    ],
)
def test_flags_of_the_precision(version: str, precision: str, strong: bool, flags: list[int]) -> None:
    assert precision_flags(module(version), precision, strong=strong) == flags


@pytest.mark.parametrize(
    ("version", "precision", "strong", "said", "hint"),
    [
        ("8.6.0", "bf16", False, "--precision bf16: TensorRT 8.6.0 has no BF16", "another version"),
        ("8.6.0", "int8", True, "TensorRT 8.6.0 cannot build a strongly typed int8 graph", "--typing weak"),
        ("8.6.0", "bf16", True, "cannot build a strongly typed bf16 graph", "--typing weak"),
        ("8.6.0", "fp8", False, "computes in FP8 only what a strongly typed graph has", "--typing strong"),
        ("10.3.0", "fp8", False, "computes in FP8 only what a strongly typed graph has", "--typing strong"),
        (
            "11.4.0",
            "fp16",
            False,
            "TensorRT 11.4.0 computes a weakly typed graph in FP32, not in fp16",
            "--typing strong",
        ),
        ("11.4.0", "int8", False, "in FP32, not in int8", "--typing strong"),
    ],
)
def test_precisions_that_a_version_cannot_build(
    version: str, precision: str, strong: bool, said: str, hint: str
) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        precision_flags(module(version), precision, strong=strong)
    assert hint in (caught.value.hint or "")


def test_precisions_that_a_gpu_has_not() -> None:
    for precision in ("fp32", "fp16", "int8"):
        check_precision(precision, T4)
    with pytest.raises(ConfigError, match=r"bf16 needs a GPU of compute capability 8\.0; Tesla T4 has 7\.5"):
        check_precision("bf16", T4)
    with pytest.raises(ConfigError, match=r"fp8 needs a GPU of compute capability 8\.9"):
        check_precision("fp8", T4)


def test_options_that_a_version_has_not() -> None:
    assert builder_flags(module("10.3.0"), ["STRIP_PLAN"], option="--strip") == [51]
    with pytest.raises(ConfigError, match=r"--strip: TensorRT 8\.6\.0 has no STRIP_PLAN"):
        builder_flags(module("8.6.0"), ["STRIP_PLAN"], option="--strip")
    levels = SimpleNamespace(NONE=1, AMPERE_PLUS=2)
    assert hardware_level(module("8.6.0", HardwareCompatibilityLevel=levels), "ampere") == 2
    with pytest.raises(
        ConfigError, match=r"--hardware-compatible same: TensorRT 8\.6\.0 has no SAME_COMPUTE_CAPABILITY"
    ):
        hardware_level(module("8.6.0", HardwareCompatibilityLevel=levels), "same")


class Config:
    """Takes what a builder's config takes of kernel sources and preview features."""

    def __init__(self) -> None:
        self.sources = 0b1111_1111
        self.features: dict[str, bool] = {}

    def get_tactic_sources(self) -> int:
        return self.sources

    def set_tactic_sources(self, sources: int) -> bool:
        self.sources = sources
        return True

    def set_preview_feature(self, feature: str, on: bool) -> None:
        self.features[feature] = on


SOURCES = SimpleNamespace(CUBLAS=1, CUBLAS_LT=3, CUDNN=4)
FEATURES = SimpleNamespace(DISABLE_EXTERNAL_TACTIC_SOURCES_FOR_CORE_0805="external", PROFILE_SHARING_0806="sharing")


@pytest.mark.parametrize(
    ("there", "off", "sources"),
    [
        (set(), ["CUBLAS", "CUBLAS_LT", "CUDNN"], 0b1110_0101),
        ({"libcublas.so.12", "libcublasLt.so.12"}, ["CUDNN"], 0b1110_1111),
        ({"libcublas.so.11", "libcublasLt.so.11", "libcudnn.so.8"}, [], 0b1111_1111),
        ({"libcublas.so.12", "libcublasLt.so.12", "libcudnn.so.9"}, ["CUDNN"], 0b1110_1111),
    ],
)
def test_8_6_takes_no_kernels_from_libraries_that_are_not_there(there: set[str], off: list[str], sources: int) -> None:
    config = Config()
    assert (
        set_kernel_sources(module("8.6.0", TacticSource=SOURCES, PreviewFeature=FEATURES), config, there.__contains__)
        == off
    )
    assert (config.sources, config.features) == (sources, {"external": True} if off else {})


def test_later_versions_have_kernels_of_their_own_and_share_profiles() -> None:
    for version in ("10.3.0", "11.4.0"):
        config = Config()
        trt = module(version, TacticSource=SOURCES, PreviewFeature=FEATURES)
        share_profiles(trt, config)
        assert set_kernel_sources(trt, config, lambda _: False) == []
        assert (config.sources, config.features) == (0b1111_1111, {})
    config = Config()
    share_profiles(module("8.6.0", PreviewFeature=FEATURES), config)
    assert config.features == {"sharing": True}


def test_every_error_of_the_parser() -> None:
    errors = [
        SimpleNamespace(node=lambda: 3, desc=lambda: "no importer\nfor Gelu"),
        SimpleNamespace(node=lambda: -1, desc=lambda: "no graph"),
    ]
    parser = SimpleNamespace(num_errors=2, get_error=errors.__getitem__)
    assert parser_errors(parser) == ["node 3: no importer for Gelu", "no graph"]


def test_messages() -> None:
    said = Messages()
    assert said.text() == "TensorRT gives no reason"
    for severity, text in [("INFO", "i"), ("WARNING", "w\n w"), ("VERBOSE", "v"), ("WARNING", "w w")]:
        said.add(severity, text)
    assert (said.errors, said.warnings, said.text()) == ([], ["w w"], "w w")
    said.add("INTERNAL_ERROR", "a")
    said.add("ERROR", "b")
    assert said.text() == "a; b"
    for index in range(100):
        said.add("ERROR", f"{index}")
    assert len(said.errors) == 50
    said.clear()
    assert said.text() == "TensorRT gives no reason"


class Logger:
    def __init__(self) -> None:
        pass


def make_api(**parts: Any) -> Api:
    return Api(module("10.3.0", ILogger=Logger, **parts), T4)


def test_what_the_bindings_raise_is_explained_with_tensorrt_s_own_words() -> None:
    api = make_api()

    def fail(said: str | None, error: Exception) -> None:
        with api.explained("build an engine"):
            if said is not None:
                api.logger.log(SimpleNamespace(name="ERROR"), said)
            raise error

    with pytest.raises(MaeDeployError, match=r"TensorRT 10\.3\.0 cannot build an engine: no memory"):
        fail("no memory", TypeError("factory function returned nullptr"))
    with pytest.raises(MaeDeployError, match="cannot build an engine: factory function returned nullptr"):
        fail(None, TypeError("factory function\n returned nullptr"))
    with pytest.raises(ConfigError, match=r"^mine$"):
        fail("no memory", ConfigError("mine"))


class Runtime:
    engine_host_code_allowed = False

    def __init__(self, logger: Any) -> None:
        self.logger = logger

    def deserialize_cuda_engine(self, plan: bytes) -> Any:
        if plan == b"foreign":
            self.logger.log(SimpleNamespace(name="ERROR"), "stale serialized plan")
            return None
        return SimpleNamespace(plan=plan, host_code=self.engine_host_code_allowed)


def test_a_plan_that_tensorrt_refuses() -> None:
    api = make_api(Runtime=Runtime)
    with pytest.raises(
        MaeDeployError, match=r"TensorRT 10\.3\.0 cannot load this engine: stale serialized plan"
    ) as caught:
        api.deserialize(b"foreign")
    assert "build-engine" in (caught.value.hint or "")


def test_host_code_is_refused_unless_asked_for() -> None:
    api = make_api(Runtime=Runtime)
    assert api.deserialize(b"plan").host_code is False
    assert api.deserialize(b"plan", host_code=True).host_code is True


def test_a_stripped_plan_where_weights_cannot_be_put_back(tmp_path: Path) -> None:
    with pytest.raises(
        MaeDeployError, match=r"TensorRT 10\.3\.0 cannot put weights into a plan that was built without"
    ):
        make_api(Runtime=Runtime).deserialize(b"plan", weights=tmp_path / "encoder.onnx")


def test_without_a_gpu_the_package_is_not_even_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_gpu(_: int) -> Gpu:
        raise MissingDependency("there is no NVIDIA driver")

    monkeypatch.setattr(tensorrt_api, "require_gpu", no_gpu)
    monkeypatch.setattr(tensorrt_api, "import_optional", lambda *_, **__: pytest.fail("imported"))
    with pytest.raises(MissingDependency, match="there is no NVIDIA driver"):
        load_tensorrt()


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_api, "require_gpu", lambda _: T4)
    monkeypatch.setattr(tensorrt_api, "_loaded", {})
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingDependency, match="needs the package 'tensorrt'") as caught:
        load_tensorrt()
    assert caught.value.hint == "pip install 'mae-deploy[trt]'"
