"""Every name of TensorRT's that our code uses is there in 8.6, 10.3, 10.16 and 11.4 wherever our code takes that
branch.

The listings in tensorrt_api/ are recorded from the real bindings by scripts/check_tensorrt_api.sh, which also compares
them.
"""

from __future__ import annotations

from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mae_deploy.errors import ConfigError
from mae_deploy.runtime.tensorrt import api as tensorrt_api
from tests.packaging.tensorrt_contract import Listing, check

ROOT = Path(__file__).parents[2]
LISTINGS = [Listing.read(path) for path in sorted((Path(__file__).parent / "tensorrt_api").glob("*.json"))]
NEEDED = {
    "Builder.build_serialized_network",
    "IBuilderConfig.set_memory_pool_limit",
    "ICudaEngine.get_tensor_profile_shape",
    "IExecutionContext.execute_async_v3",
    "IExecutionContext.set_input_shape",
    "IOptimizationProfile.set_shape",
    "OnnxParser.parse_from_file",
    "Runtime.deserialize_cuda_engine",
}
"""A few of the names that must have been found, or the check has lost its way through our code."""


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    runtime = modules_of("mae_deploy.runtime", ROOT / "mae_deploy" / "runtime")
    folders = {
        "mae_deploy.commands": "mae_deploy/commands",
        "mae_deploy.export": "export",
        "tests.gpu": "tests/gpu",
        "scripts": "scripts",
    }
    others = {
        name: text for package, folder in folders.items() for name, text in modules_of(package, ROOT / folder).items()
    }
    return runtime | {
        name: text for name, text in others.items() if "tensorrt" in text and "import tensorrt" not in text
    }


def modules_of(package: str, folder: Path) -> dict[str, str]:
    """The text of every module in a folder and those below it, by its dotted name."""
    return {
        ".".join([package, *path.relative_to(folder).with_suffix("").parts]): path.read_text()
        for path in folder.rglob("*.py")
        if path.name != "__init__.py"
    }


def by_version(listing: Listing) -> str:
    return listing.version


@pytest.mark.parametrize("listing", LISTINGS, ids=by_version)
def test_every_name_is_in_the_bindings(listing: Listing, sources: dict[str, str]) -> None:
    found = check(sources, listing)
    assert not found.problems, "\n".join(sorted(found.problems))
    assert found.used >= NEEDED


def test_oldest_and_newest_of_each_major_are_listed() -> None:
    assert [listing.version.split(".")[:2] for listing in LISTINGS] == [
        ["10", "16"],
        ["10", "3"],
        ["11", "4"],
        ["8", "6"],
    ]


@pytest.mark.parametrize("listing", LISTINGS, ids=by_version)
def test_network_and_precision_flags_are_those_of_the_version(listing: Listing) -> None:
    trt = recorded(listing)
    expected = {8: (1, 1), 10: (0, 2), 11: (0, 0)}[listing.major]
    assert (tensorrt_api.network_flags(trt, strong=False), tensorrt_api.network_flags(trt, strong=True)) == expected
    weak = {precision for precision in ("fp32", "fp16", "bf16", "int8", "fp8") if accepts(trt, precision, strong=False)}
    assert weak == {8: {"fp32", "fp16", "int8"}, 10: {"fp32", "fp16", "bf16", "int8"}, 11: {"fp32"}}[listing.major]
    assert accepts(trt, "int8", strong=True) is (listing.major >= 10)


# --- the check itself ------------------------------------------------------------------------------------------------


OLD, MIDDLE, NEW = "8.6.0", "10.3.0", "11.4.0.106"


@pytest.mark.parametrize(
    ("body", "lacking"),
    [
        ("def f(trt):\n    return trt.BuilderFlag.FP16", {NEW}),
        ("def f(trt):\n    return trt.BuilderFlag.FP16 if hasattr(trt.BuilderFlag, 'FP16') else None", set()),
        (
            (
                "def f(trt):\n    if major_version(trt) == 8:\n        return trt.UffParser\n    return"
                " trt.IProgressMonitor"
            ),
            {OLD},
        ),
        ("def f(trt):\n    if major_version(trt) == 11:\n        return None\n    return trt.BuilderFlag.INT8", set()),
        (
            "def f(trt, logger):\n    return trt.Builder(logger).create_builder_config().max_workspace_size",
            {MIDDLE, NEW},
        ),
        ("def f(trt, logger):\n    trt.Runtime(logger).num_DLA_cores = 1", {OLD, MIDDLE, NEW}),
        ("def f(context: 'trt.IExecutionContext'):\n    context.active_optimization_profile = 0", {MIDDLE, NEW}),
        (
            "def f(trt):\n    return g(trt.OnnxParser(1, 2))\ndef g(parser):\n    return parser.supports_model(b'')",
            {NEW},
        ),
        (
            (
                "def f(trt, logger):\n    return partial(g, trt.Runtime(logger))\ndef g(runtime):\n    return"
                " runtime.nothing"
            ),
            {OLD, MIDDLE, NEW},
        ),
        ("def f(engine: 'trt.ICudaEngine'):\n    return engine.get_tensor_profile_shape(0)", {OLD, MIDDLE, NEW}),
        ("def f(thing):\n    return thing.execute_async_v3(0)", {OLD, MIDDLE, NEW}),
        (
            (
                "class C:\n    def __init__(self, trt):\n        self.trt = trt\n    def f(self):\n        return"
                " self.trt.SubGraphCollection"
            ),
            {NEW},
        ),
        (
            "def f(trt):\n    class M(trt.IProgressMonitor):\n        def phase_start(self, name): ...",
            {OLD, MIDDLE, NEW},
        ),
    ],
)
def test_the_check_finds_what_a_version_lacks(body: str, lacking: set[str]) -> None:
    source = f"def major_version(trt):\n    return 0\n{body}\n"
    found = {listing.version: check({"module": source}, listing).problems for listing in LISTINGS}
    assert {version for version in (OLD, MIDDLE, NEW) if found[version]} == lacking, found


def test_the_check_names_the_line_and_the_version() -> None:
    findings = check({"module": "def f(trt):\n    return trt.Rainbow\n"}, LISTINGS[0])
    assert findings.problems == {"module:2: TensorRT 10.16.1.11: no Rainbow"}


def accepts(trt: Any, precision: str, *, strong: bool) -> bool:
    try:
        tensorrt_api.precision_flags(trt, precision, strong=strong)
    except ConfigError:
        return False
    return True


def recorded(listing: Listing) -> Any:
    """The enumerations of a version, with their real values, in place of the module."""
    enums = {name: IntEnum(name, members) for name, members in listing.enums.items() if "." not in name and members}
    return SimpleNamespace(__version__=listing.version, **enums)
