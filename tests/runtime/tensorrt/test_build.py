"""What a build asks TensorRT for, on a stand-in that remembers it; tests/gpu builds for real, tests/packaging knows
every name in the bindings.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
from onnx import helper

from mae_deploy.errors import ConfigError, MaeDeployError
from mae_deploy.runtime.cuda.driver import Gpu
from mae_deploy.runtime.profiles import Profile
from mae_deploy.runtime.tensorrt import api as tensorrt_api
from mae_deploy.runtime.tensorrt import build as tensorrt_build
from mae_deploy.runtime.tensorrt.api import Api
from mae_deploy.runtime.tensorrt.build import BuiltPlan, build_plan, shape_at
from mae_deploy.runtime.tensorrt.options import BuildOptions
from tests.runtime.tiny_bundle import C, H, W, write_bundle

H200 = Gpu(index=0, name="NVIDIA H200", compute_capability=(9, 0), memory_bytes=3 << 30, driver="12.4")
PROFILES: list[Profile] = [{"B": (1, 2, 3), "K": (4, 5, 6)}, {"B": (8, 8, 8), "K": (1, 1, 1)}]
INNER = "block_0_tokens"


class Tensor:
    def __init__(self, name: str, *, is_output: bool = False) -> None:
        self.name, self.is_network_output = name, is_output


class Layer:
    def __init__(self, *outputs: Tensor) -> None:
        self.outputs, self.num_outputs = outputs, len(outputs)

    def get_output(self, index: int) -> Tensor:
        return self.outputs[index]


class Network:
    def __init__(self, flags: int) -> None:
        self.flags, self.marked = flags, list[Tensor]()
        self.layers = [Layer(Tensor("x"), Tensor(INNER)), Layer(Tensor("cls", is_output=True))]
        self.num_layers = len(self.layers)
        self.casts: list[tuple[Tensor, str]] = []

    def get_layer(self, index: int) -> Layer:
        return self.layers[index]

    def add_cast(self, tensor: Tensor, dtype: str) -> Layer:
        self.casts.append((tensor, dtype))
        return Layer(Tensor("unnamed"))

    def mark_output(self, tensor: Tensor) -> None:
        self.marked.append(tensor)


class Handle:
    """A network as the caller has it; what was done with it is known longer."""

    def __init__(self, network: Network) -> None:
        self._network = network

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)


class HostMemory(bytearray):
    """A plan in TensorRT's own memory."""


class Shapes(dict[str, tuple[Any, ...]]):
    """An optimisation profile."""

    def set_shape(self, name: str, *shapes: Any) -> None:
        self[name] = shapes


class Config:
    def __init__(self) -> None:
        self.flags, self.off, self.limits = set[str](), set[str](), dict[str, int]()
        self.profiles: list[Shapes] = []
        self.features: dict[str, bool] = {}
        self.sources = 0b1111
        self.progress_monitor: Any = None

    def set_flag(self, flag: str) -> None:
        self.flags.add(flag)

    def clear_flag(self, flag: str) -> None:
        self.off.add(flag)

    def set_memory_pool_limit(self, pool: str, size: int) -> None:
        self.limits[pool] = size

    def set_preview_feature(self, feature: str, on: bool) -> None:
        self.features[feature] = on

    def get_tactic_sources(self) -> int:
        return self.sources

    def set_tactic_sources(self, sources: int) -> None:
        self.sources = sources

    def add_optimization_profile(self, profile: Shapes) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1 if profile else -1


class Fake:
    """A `tensorrt` module of some version, and what was made with it."""

    def __init__(self, version: str) -> None:
        self.__version__ = version
        self.networks: list[Network] = []
        self.configs: list[Config] = []
        self.plan: bytes | None = b"plan"
        self.says = "no kernel for ForeignNode"
        self.errors: list[str] = []
        self.graphs: list[str] = []
        self.host_code: list[bool] = []
        self.gpus: list[int] = []
        self.alive: list[weakref.ref[Any]] = []
        self.in_memory: list[str] = []
        """What was alive when the engine was loaded."""
        fake = self

        class Logger:
            def __init__(self) -> None:
                pass

        class Builder:
            def __init__(self, logger: Any) -> None:
                self.logger = logger
                fake.lent(self)

            def create_network(self, flags: int) -> Any:
                fake.networks.append(Network(flags))
                return fake.lent(Handle(fake.networks[-1]))

            def create_builder_config(self) -> Config:
                fake.configs.append(Config())
                return fake.configs[-1]

            def create_optimization_profile(self) -> Shapes:
                return Shapes()

            def build_serialized_network(self, network: Network, config: Config) -> Any:
                if fake.plan is None:
                    self.logger.log(SimpleNamespace(name="ERROR"), fake.says)
                self.logger.log(SimpleNamespace(name="WARNING"), "slow tactic")
                if config.progress_monitor is not None:
                    config.progress_monitor.phase_start("build", None, 1)
                    if not config.progress_monitor.step_complete("build", 0):
                        return None
                if fake.plan is None:
                    return None
                return fake.lent(HostMemory(fake.plan))

        class OnnxParser:
            num_errors = property(lambda _: len(fake.errors))

            def __init__(self, network: Network, logger: Any) -> None:
                pass

            def parse_from_file(self, path: str) -> bool:
                fake.graphs.append(path)
                return not fake.errors

            def get_error(self, index: int) -> Any:
                return SimpleNamespace(node=lambda: index, desc=lambda: fake.errors[index])

        class Runtime:
            def __init__(self, logger: Any) -> None:
                self.engine_host_code_allowed = False

            def deserialize_cuda_engine(self, plan: Any) -> Any:
                assert bytes(memoryview(plan)) == b"plan"
                fake.in_memory = [type(found).__name__ for made in fake.alive if (found := made()) is not None]
                fake.host_code.append(self.engine_host_code_allowed)
                inspector = SimpleNamespace(get_engine_information=lambda _: '{"Layers": ["_gemm_mha_v2"]}')
                return SimpleNamespace(create_engine_inspector=lambda: inspector)

        self.ILogger, self.Builder, self.OnnxParser, self.Runtime = Logger, Builder, OnnxParser, Runtime
        major = int(version.split(".")[0])
        names = [
            "REFIT",
            "TF32",
            "VERSION_COMPATIBLE",
            *(["FP16", "INT8"] if major < 11 else []),
            *(["STRIP_PLAN"] if major > 8 else []),
        ]
        self.BuilderFlag = SimpleNamespace(**{name: name for name in names})
        self.NetworkDefinitionCreationFlag = SimpleNamespace(EXPLICIT_BATCH=3, STRONGLY_TYPED=4)
        self.MemoryPoolType = SimpleNamespace(WORKSPACE="workspace")
        self.ProfilingVerbosity = SimpleNamespace(DETAILED="detailed")
        self.HardwareCompatibilityLevel = SimpleNamespace(NONE="none", AMPERE_PLUS="ampere plus")
        self.PreviewFeature = SimpleNamespace(
            DISABLE_EXTERNAL_TACTIC_SOURCES_FOR_CORE_0805="external", PROFILE_SHARING_0806="sharing"
        )
        self.TacticSource = SimpleNamespace(CUBLAS=0, CUBLAS_LT=1, CUDNN=2)
        self.LayerInformationFormat = SimpleNamespace(JSON="json")
        self.float32 = "float32"
        if major > 8:
            self.IProgressMonitor = type("IProgressMonitor", (), {"__init__": lambda self: None})

    def lent(self, made: Any) -> Any:
        """What the caller gets, remembered as long as somebody has it."""
        self.alive.append(weakref.ref(made))
        return made


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle") / "encoder.onnx"


def use(monkeypatch: pytest.MonkeyPatch, version: str) -> Fake:
    fake = Fake(version)
    api = Api(fake, H200)

    class Memory:
        @contextlib.contextmanager
        def active(self) -> Iterator[None]:
            yield

        def __enter__(self) -> Memory:
            return self

        def __exit__(self, *_: Any) -> None:
            assert all(made() is None for made in fake.alive), "TensorRT's objects outlive the GPU's context"

    def open_memory(index: int) -> Memory:
        fake.gpus.append(index)
        return Memory()

    monkeypatch.setattr(tensorrt_build, "load_tensorrt", lambda index: api)
    monkeypatch.setattr(tensorrt_build, "open_memory", open_memory)
    monkeypatch.setattr(tensorrt_api, "loads_library", lambda name: name == "libcudnn.so.8")
    return fake


def build(graph: Path, **given: Any) -> BuiltPlan:
    return build_plan(
        graph,
        graph.with_suffix(".plan"),
        **{
            "precision": "fp32",
            "typing": "weak",
            "profiles": PROFILES,
            "options": BuildOptions(timing_cache="off"),
            **given,
        },
    )


def test_an_fp32_build_on_8_6(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = use(monkeypatch, "8.6.0")
    plan = build(graph)
    (config,), (network,) = fake.configs, fake.networks
    assert (plan.file.read_bytes(), fake.graphs, network.flags) == (b"plan", [str(graph)], 1 << 3)
    assert (config.flags, config.off) == (set(), {"TF32"})
    assert config.limits == {"workspace": 3 << 30}, "no more than the GPU has"
    assert config.features == {"sharing": True, "external": True}
    assert (config.sources, plan.record["kernel_sources_off"]) == (0b1100, ["CUBLAS", "CUBLAS_LT"])
    assert config.profiles == [
        {"images": ((1, C, H, W), (2, C, H, W), (3, C, H, W)), "ids_keep": ((1, 4), (2, 5), (3, 6))},
        {"images": ((8, C, H, W),) * 3, "ids_keep": ((8, 1),) * 3},
    ]
    assert plan.record["kernels"] == {"layers": 1, "fused_attention": 1, "precisions": {}}
    assert (plan.record["warnings"], plan.record["size"], plan.record["driver"]) == (["slow tactic"], 4, "12.4")
    assert "timing_cache" not in plan.record["options"], "a path of this machine"


@pytest.mark.parametrize(
    ("version", "precision", "typing", "network", "flags"),
    [
        ("8.6.0", "int8", "weak", 1 << 3, {"INT8", "FP16"}),
        ("8.6.0", "fp16", "strong", 1 << 3, {"FP16"}),
        ("10.3.0", "fp16", "weak", 0, {"FP16"}),
        ("10.3.0", "int8", "strong", 1 << 4, set()),
        ("11.4.0", "fp16", "strong", 0, set()),
    ],
)
def test_flags(
    graph: Path,
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    precision: str,
    typing: str,
    network: int,
    flags: set[str],
) -> None:
    fake = use(monkeypatch, version)
    build(graph, precision=precision, typing=typing)
    assert (fake.networks[0].flags, fake.configs[0].flags, fake.configs[0].off) == (network, flags, set())


def test_options(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = use(monkeypatch, "10.3.0")
    options = {
        "workspace": 7,
        "optimization_level": 5,
        "hardware_compatible": "ampere",
        "version_compatible": True,
        "strip": True,
        "refit": True,
    }
    build(graph, options=BuildOptions(timing_cache="off", **options))  # type: ignore[arg-type]
    config: Any = fake.configs[0]
    assert config.flags == {"VERSION_COMPATIBLE", "STRIP_PLAN", "REFIT"}
    assert (config.limits, config.builder_optimization_level, config.hardware_compatibility_level) == (
        {"workspace": 7 << 20},
        5,
        "ampere plus",
    )
    assert (config.profiling_verbosity, config.features, fake.host_code) == ("detailed", {}, [True])


def test_the_gpu_that_it_is_built_on(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = use(monkeypatch, "10.3.0")
    build(graph)
    build(graph, index=1)
    assert fake.gpus == [0, 1]


def test_inner_tensors_as_outputs(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = use(monkeypatch, "10.3.0")
    build(graph, outputs_marked=[INNER, "cls"])
    (network,) = fake.networks
    ((inner, dtype),) = network.casts
    assert (inner.name, dtype, [tensor.name for tensor in network.marked]) == (
        f"{INNER}/inner",
        "float32",
        [INNER],
    ), "cls is an output already"
    with pytest.raises(ConfigError, match="TensorRT's network has no tensor 'block_9'"):
        build(graph, outputs_marked=["block_9"])


def test_the_engine_is_inspected_when_nothing_of_its_build_is_left(
    graph: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a Jetson, the GPU's memory is the host's."""
    fake = use(monkeypatch, "10.3.0")
    build(graph)
    assert len(fake.alive) == 3, "a builder, a network and a plan"
    assert fake.in_memory == []


def test_fixed_sizes_need_no_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = use(monkeypatch, "10.3.0")
    build(write_bundle(tmp_path / "b", batch=2, keep=4) / "encoder.onnx")
    assert fake.configs[0].profiles == []


# --- failures --------------------------------------------------------------------------------------------------------


def test_every_error_of_the_parser_is_said(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, "8.6.0").errors = ["no importer for Gelu", "no importer for CumSum"]
    with pytest.raises(
        MaeDeployError,
        match=r"TensorRT 8\.6\.0 cannot read .*: node 0: no importer for Gelu; node 1: no importer for CumSum",
    ):
        build(graph)


def test_a_build_that_gives_nothing(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, "10.3.0").plan = None
    with pytest.raises(
        MaeDeployError, match=r"TensorRT 10\.3\.0 cannot build this engine: no kernel for ForeignNode"
    ) as caught:
        build(graph)
    assert caught.value.hint is None, "no kernel is no question of memory"


@pytest.mark.parametrize(
    "said",
    [
        "Some tactics do not have sufficient workspace memory to run.",
        "Tactic Device request: 2048MB Available: 1024MB. Device memory is insufficient to use tactic.",
        "Error Code 2: OutOfMemory (no further information)",
        "[virtualMemoryBuffer.cpp::resizePhysical::140] Error Code 2: Internal Error (out of memory)",
        "Requested amount of GPU memory (1073741824 bytes) could not be allocated.",
    ],
)
def test_what_is_short_of_memory(graph: Path, monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    fake = use(monkeypatch, "10.3.0")
    fake.plan, fake.says = None, said
    with pytest.raises(MaeDeployError, match="cannot build this engine") as caught:
        build(graph)
    assert caught.value.hint == "more --workspace where the GPU has it, or a smaller --profile"


def test_a_report_that_is_interrupted_ends_the_build(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, "10.3.0")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(graph, on_progress=interrupt)


def test_progress_where_the_version_has_it(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for version, expected in [("10.3.0", [("build", 1.0)]), ("8.6.0", [])]:
        seen: list[tuple[str, float]] = []
        use(monkeypatch, version)
        build(graph, on_progress=lambda phase, share, seen=seen: seen.append((phase, share)))
        assert seen == expected


def test_an_opset_that_8_6_does_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx.save(
        helper.make_model(helper.make_graph([], "empty", [], []), opset_imports=[helper.make_opsetid("", 19)]),
        tmp_path / "a.onnx",
    )
    use(monkeypatch, "8.6.0")
    with pytest.raises(ConfigError, match=r"a\.onnx has opset 19, and TensorRT 8\.6\.0 reads up to 17") as caught:
        build(tmp_path / "a.onnx")
    assert caught.value.hint == "export with --typing weak"
    use(monkeypatch, "10.3.0")
    assert build(tmp_path / "a.onnx").file.read_bytes() == b"plan"


def test_a_size_that_no_profile_gives() -> None:
    entry: Any = {"name": "images", "dtype": "float32", "shape": ["B", 3, "height", 7]}
    with pytest.raises(ConfigError, match="no size for 'height' of the input images"):
        shape_at(entry, {"B": 1, "K": 2})
    entry["shape"] = ["B", "K", 5]
    assert shape_at(entry, {"B": 1, "K": 2}) == (1, 2, 5)
