"""`mae-deploy doctor` names what is there and what is missing for which command, and always succeeds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata, util
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import pytest
import typer

from mae_deploy import __version__, machine, packages
from mae_deploy.cli import app, main
from mae_deploy.commands import doctor
from mae_deploy.commands.config import DoctorConfig
from mae_deploy.commands.doctor import NEEDS, requirements
from mae_deploy.commands.rates import MEASURED
from mae_deploy.errors import MissingDependency
from mae_deploy.runtime.cuda.driver import Gpu
from mae_deploy.runtime.cuda.open_memory import INSTALL
from mae_deploy.runtime.tensorrt import rtx
from tests.runtime.tensorrt.planned_bundle import RTX4090
from tests.test_cli import TRAINING, run_without

ROOT = Path(__file__).parents[2]


def test_with_everything_installed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert captured.err == ""
    assert found["machine"]["mae_deploy"] == __version__
    assert found["engines"]["torch"].startswith("CPU")
    assert found["packages"]["torch"] == metadata.version("torch")
    assert found["packages"]["sklearn"] == metadata.version("scikit-learn"), "under the name of its distribution"
    assert "CPU" in found["engines"]["onnxruntime"]
    assert set(found["gflops"]) == {name for name in MEASURED if found["packages"][name] is not None}
    assert all(rate > 0 for rates in found["gflops"].values() for rate in rates.values())
    assert "the engine for FP32 is" in found["advice"][0]
    assert set(found["commands"]) == {name for names in NEEDS.values() for name in names}
    assert found["commands"]["pretrain"] is None
    assert found["machine"]["nvidia_gpus"] == len(found["machine"]["gpus"])
    assert found["machine"]["cpu_cores"] == os.cpu_count()
    assert found["machine"]["cpu"] == machine.cpu_name()
    assert found["machine"]["granted_cores"] == machine.granted_cores()
    assert found["machine"]["cpu_features"] == machine.cpu_features()
    assert Path(found["machine"]["cache"]) / "kernels" == machine.cache_folder("kernels")
    openvino = pytest.importorskip("openvino")
    core = openvino.Core()
    name, _, precisions = found["engines"]["openvino"].rpartition(": ")
    assert name == core.get_property("CPU", "FULL_DEVICE_NAME")
    assert precisions.startswith("FP32")
    assert set(precisions.split(", ")) == {"FP32", "FP16", "BF16", "INT8"} & set(
        core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    )


def write_module(site: Path, module: str, content: str | None, **versions: str) -> None:
    """A package as pip leaves it in a folder for packages, given by these distributions; None: its folder alone."""
    (site / module / "left").mkdir(parents=True)
    if content is not None:
        (site / module / "__init__.py").write_text(content)
    for name, version in versions.items():
        info = site / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n")
        (info / "RECORD").write_text(f"{module}/__init__.py,,\n")


def run_with(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line with packages that come before those that are installed."""
    path = os.pathsep.join([str(site), str(Path(machine.__file__).parents[1])])
    return subprocess.run(
        [sys.executable, "-m", "mae_deploy", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )


ONNXRUNTIME = {
    *("verify", "predict", "eval BUNDLE", "benchmark", "export", "report", "quickstart", "export --engine trt"),
    *(
        "export --engine trt-rtx",
        "predict --out FILE.parquet",
        "embed",
        "embed --ray",
        "search",
        "predict on TIFF",
        "stream",
        "stream-eval",
    ),
    "serve",
    "verify --signature",
}
OPENVINO = {"export --engine openvino", "report --engine openvino", "predict --engine openvino"}


@pytest.mark.parametrize(
    ("onnxruntime", "openvino", "says"),
    [
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGILL)",
            "raise ImportError('libopenvino.so:\\n no such file')",
            ("dies of SIGILL", "libopenvino.so: no such file"),
        ),
        (
            "def get_available_providers(): return []",
            "import ctypes; ctypes.string_at(0)",
            ("has no attribute", "dies of SIGSEGV"),
        ),
    ],
)
def test_engines_that_are_installed_and_do_not_work(
    tmp_path: Path, onnxruntime: str, openvino: str, says: tuple[str, str]
) -> None:
    """They cannot take doctor along, and the commands that run on them are not ready; the others are."""
    write_module(tmp_path, "onnxruntime", onnxruntime)
    write_module(tmp_path, "openvino", openvino)
    done = run_with(tmp_path, "doctor", "--no-rates", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    data = json.loads(done.stdout)
    for module, said, concerned in zip(("onnxruntime", "openvino"), says, (ONNXRUNTIME, OPENVINO), strict=True):
        assert said in data["engines"][module]
        assert "pip install" in data["engines"][module]
        assert {name for name, lost in data["commands"].items() if lost and module in lost["missing"]} == concerned


def test_a_module_of_two_distributions(tmp_path: Path) -> None:
    """The later one has overwritten files of the earlier one, which works or does not."""
    write_module(tmp_path, "onnxruntime", "import os; os.abort()", onnxruntime_gpu="1.22.0")
    data = json.loads(run_with(tmp_path, "doctor", "--no-rates", "--json").stdout)
    ours = metadata.version("onnxruntime")
    assert data["packages"]["onnxruntime"] == f"{ours} (onnxruntime), 1.22.0 (onnxruntime-gpu)"
    remedy = "pip uninstall -y onnxruntime-gpu onnxruntime, then install one of them: pip install --force-reinstall"
    assert remedy in data["engines"]["onnxruntime"]
    assert remedy in data["commands"]["predict"]["install"]


@pytest.mark.usefixtures("no_trials")
def test_a_folder_that_an_uninstalled_package_left_behind_is_no_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What `pip uninstall onnxruntime` leaves where onnxruntime-gpu is installed."""
    write_module(tmp_path, "onnxruntime", None, onnxruntime_gpu="1.22.0")
    hollow = PathFinder.find_spec("onnxruntime", [str(tmp_path)])
    find_spec = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name: hollow if name == "onnxruntime" else find_spec(name))
    monkeypatch.setattr(packages, "distributions", lambda module: {"onnxruntime-gpu": "1.22.0"})
    monkeypatch.setattr(packages, "_by_module", packages._by_module.__wrapped__)  # what is found here is not kept
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["packages"]["onnxruntime"] is None
    remedy = "pip install --force-reinstall --no-deps 'onnxruntime-gpu>=1.19'"
    assert found["engines"]["onnxruntime"] == f"not installed: {remedy}"
    assert found["commands"]["predict"] == {"missing": ["onnxruntime"], "install": remedy}


@pytest.fixture
def no_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries are not tried, which takes seconds."""
    monkeypatch.setattr(doctor, "run_alone", lambda *_, **__: "CPU")
    monkeypatch.setattr(doctor, "measure_rates", lambda *_: {})


H200 = Gpu(index=0, name="NVIDIA H200", compute_capability=(9, 0), memory_bytes=1 << 37, driver="12.4")


@pytest.mark.usefixtures("no_trials")
@pytest.mark.parametrize(
    ("there", "gpus", "state", "missing"),
    [
        ({"tensorrt", "pycuda", "cuda.bindings"}, [H200], "10.3.0 with pycuda on NVIDIA H200", None),
        ({"tensorrt", "cuda.bindings"}, [H200], "10.3.0 with cuda.bindings on NVIDIA H200", None),
        (
            {"tensorrt"},
            [H200],
            f"10.3.0, but neither pycuda nor cuda-bindings is installed: {INSTALL}",
            ["pycuda"],
        ),
        ({"tensorrt", "pycuda"}, [], "10.3.0 with pycuda, but there is no driver", None),
        ({"pycuda"}, [H200], f"not installed: {INSTALL}", ["tensorrt"]),
    ],
)
def test_what_tensorrt_lacks(
    there: set[str], gpus: list[Gpu], state: str, missing: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def require_gpu() -> Gpu:
        if not gpus:
            raise MissingDependency("there is no driver")
        return gpus[0]

    version = doctor._version
    monkeypatch.setattr(doctor, "gpus", lambda: gpus)
    monkeypatch.setattr(doctor, "require_gpu", require_gpu)
    concerned = ("tensorrt", "pycuda", "cuda.bindings")
    monkeypatch.setattr(
        doctor,
        "_version",
        lambda module: ("10.3.0" if module in there else None) if module in concerned else version(module),
    )
    found = doctor.run_doctor(DoctorConfig()).data
    assert found["engines"]["tensorrt"] == state
    assert found["commands"]["build-engine"] == (
        None if missing is None else {"missing": missing, "install": "pip install 'mae-deploy[trt]'"}
    )
    assert found["machine"]["gpus"] == ["NVIDIA H200, compute capability 9.0, CUDA 12.4"] * len(gpus)


@pytest.mark.usefixtures("no_trials", "metadata_of_this_source")
@pytest.mark.parametrize(
    ("gpu", "backend", "state"),
    [
        (None, "cuda.bindings", "CPU builds engines; there is no driver"),
        (H200, "cuda.bindings", "CPU builds engines; TensorRT for RTX does not support NVIDIA H200, which has compute"),
        (RTX4090, "cuda.bindings", "CPU builds engines, and runs them on NVIDIA GeForce RTX 4090"),
        (RTX4090, None, "CPU builds engines; to run them on NVIDIA GeForce RTX 4090, pip install cuda-bindings"),
    ],
)
def test_tensorrt_for_rtx_builds_without_a_gpu(
    gpu: Gpu | None, backend: str | None, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def require_gpu(index: int) -> Gpu:
        if gpu is None:
            raise MissingDependency("there is no driver")
        return gpu

    version = doctor._version
    there = {"tensorrt_rtx_bindings", "onnxruntime_ep_nv_tensorrt_rtx", backend}
    concerned = {*there, "cuda.bindings", "pycuda", "tensorrt"}
    monkeypatch.setattr(rtx, "require_gpu", require_gpu)
    monkeypatch.setattr(
        doctor,
        "_version",
        lambda module: ("1.7" if module in there else None) if module in concerned else version(module),
    )
    found = doctor.run_doctor(DoctorConfig()).data
    assert found["engines"]["tensorrt_rtx_bindings"].startswith(state)
    missing = None if backend else {"missing": ["cuda.bindings"], "install": "pip install 'mae-deploy[trt-rtx]'"}
    assert found["commands"]["build-engine --engine trt-rtx"] == missing


@pytest.mark.usefixtures("no_trials")
def test_an_extra_that_is_newer_than_the_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [line for line in metadata.requires("mae-deploy") or [] if "trt-rtx" not in line]
    monkeypatch.setattr(metadata, "requires", lambda _: lines)
    found = doctor.run_doctor(DoctorConfig()).data["commands"]
    assert found["build-engine --engine trt-rtx"]["missing"] == ["mae-deploy"]
    assert found["build-engine --engine trt-rtx"]["install"] == "pip install -e ."
    assert found["pretrain"] is None


def test_every_command_is_listed() -> None:
    group: Any = typer.main.get_command(app)
    listed = [name for names in NEEDS.values() for name in names]
    assert {name.split()[0] for name in listed} == set(group.commands) - {"doctor"}
    assert len(set(listed)) == len(listed)


def test_what_is_needed_is_what_the_package_asks_for() -> None:
    """The names that are imported, of this package's own metadata; an extra that is not installed has them too."""
    required = requirements()
    assert {"numpy", "PIL", "onnxruntime"} <= set(required[""])
    assert {"torch", "yaml", "sklearn", "ml_dtypes"} <= set(required["train"])
    assert {"tensorrt", "pycuda"} <= set(required["trt"])
    assert required["mlflow"] == ["mlflow"]


@pytest.fixture
def metadata_of_this_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is installed."""
    tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [f'{line}; extra == "{extra}"' for extra, wanted in extras.items() for line in wanted]
    monkeypatch.setattr(metadata, "requires", lambda _: [*project["dependencies"], *lines])


@pytest.mark.usefixtures("metadata_of_this_source")
def test_every_extra_of_a_command_is_one() -> None:
    assert {extra for extras in NEEDS for extra in filter(None, extras.split(","))} <= set(requirements())


@pytest.mark.usefixtures("metadata_of_this_source")
def test_the_packages_for_tensorrt() -> None:
    """A name of an extra may have a hyphen."""
    rtx = ["tensorrt_rtx_bindings", "onnxruntime_ep_nv_tensorrt_rtx", "cuda.bindings"]
    assert requirements()["trt-rtx"] == rtx
    assert requirements()["trt"] == ["tensorrt", "pycuda"]
    assert requirements()["trt-bindings"] == ["tensorrt", "cuda.bindings"]
    assert "trt]" in INSTALL
    assert "trt-bindings]" in INSTALL


def test_sources_that_are_not_installed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def requires(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", requires)
    assert main(["doctor"]) == 3
    assert "error: mae-deploy is not installed" in capsys.readouterr().err


def test_without_the_training_packages() -> None:
    done = run_without((*TRAINING, "openvino"), "doctor", "--no-rates", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["packages"]["torch"] is None
    assert found["packages"]["onnxruntime"] is not None
    pretrain = found["commands"]["pretrain"]
    assert set(pretrain["missing"]) == set(TRAINING) & set(requirements()["train"])
    assert pretrain["install"] == "pip install 'mae-deploy[train]'"
    assert found["engines"]["openvino"] == "not installed: pip install 'mae-deploy[openvino]'"
    assert found["commands"]["predict --engine openvino"] == {
        "missing": ["openvino"],
        "install": "pip install 'mae-deploy[openvino]'",
    }
    assert [name for name, problem in found["commands"].items() if problem is None] == [
        *("verify", "predict", "eval BUNDLE", "benchmark", "data", "info", "schema", "push"),
        *("predict --out FILE.parquet", "embed", "embed --ray", "search", "predict on TIFF", "stream", "stream-eval"),
        "serve",
    ]


def test_without_torch_for_people() -> None:
    done = run_without(("torch", "pyarrow"), "doctor", "--no-rates")
    assert (done.returncode, done.stderr) == (0, "")
    words = " ".join(done.stdout.split())
    assert "needs torch: pip install 'mae-deploy[train]'" in words
    assert "needs pyarrow: pip install 'mae-deploy[parquet]'" in words
    assert "verify ready" in words


def test_without_an_engine() -> None:
    done = run_without(("onnxruntime",), "doctor", "--no-rates", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["engines"]["onnxruntime"] == "not installed: pip install onnxruntime"
    assert found["commands"]["predict"]["missing"] == ["onnxruntime"]
    assert found["commands"]["predict"]["install"] == "pip install --force-reinstall mae-deploy"
    assert found["commands"]["info"]["missing"] == ["onnxruntime"], "what pip installs is there, or is not"
