"""`mae-deploy doctor` names what is there and what is missing for which command, and always succeeds."""

from __future__ import annotations

import json
import os
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import typer

from mae_deploy import __version__, machine
from mae_deploy.cli import app, main
from mae_deploy.commands import doctor
from mae_deploy.commands.config import DoctorConfig
from mae_deploy.commands.doctor import NEEDS, requirements
from mae_deploy.errors import MissingDependency
from mae_deploy.runtime.cuda.driver import Gpu
from tests.test_cli import TRAINING, run_without


def test_with_everything_installed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert captured.err == ""
    assert found["machine"]["mae_deploy"] == __version__
    assert found["packages"]["torch"] == metadata.version("torch")
    assert found["packages"]["sklearn"] == metadata.version("scikit-learn"), "under the name of its distribution"
    assert "CPU" in found["engines"]["onnxruntime"]
    assert set(found["commands"]) == {name for names in NEEDS.values() for name in names}
    assert found["commands"]["pretrain"] is None
    assert found["machine"]["nvidia_gpus"] == len(found["machine"]["gpus"])
    assert found["machine"]["cpu_cores"] == os.cpu_count()
    assert found["machine"]["cpu"] == machine.cpu_name()
    assert found["machine"]["granted_cores"] == machine.granted_cores()
    assert found["machine"]["cpu_features"] == machine.cpu_features()
    assert Path(found["machine"]["cache"]) / "kernels" == machine.cache_folder("kernels")


def test_openvino_says_in_which_precisions_it_computes(capsys: pytest.CaptureFixture[str]) -> None:
    openvino = pytest.importorskip("openvino")
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["packages"]["openvino"] == metadata.version("openvino")
    core = openvino.Core()
    name, _, precisions = found["engines"]["openvino"].rpartition(": ")
    assert name == core.get_property("CPU", "FULL_DEVICE_NAME")
    assert precisions.startswith("FP32")
    assert set(precisions.split(", ")) == {"FP32", "FP16", "BF16", "INT8"} & set(
        core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    )


def test_an_engine_that_is_installed_and_does_not_load(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("openvino")

    def fail() -> str:
        raise RuntimeError("no plugin\nfor the CPU")

    monkeypatch.setattr(doctor, "_openvino", fail)
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["engines"]["openvino"] == "cannot be loaded: no plugin for the CPU"


H200 = Gpu(index=0, name="NVIDIA H200", compute_capability=(9, 0), memory_bytes=1 << 37, driver="12.4")


@pytest.mark.parametrize(
    ("there", "gpus", "state", "missing"),
    [
        ({"tensorrt", "pycuda", "cuda.bindings"}, [H200], "10.3.0 with pycuda on NVIDIA H200", None),
        ({"tensorrt", "cuda.bindings"}, [H200], "10.3.0 with cuda.bindings on NVIDIA H200", None),
        (
            {"tensorrt"},
            [H200],
            "10.3.0, but neither pycuda nor cuda-bindings is installed: pip install 'mae-deploy[trt]'",
            ["pycuda"],
        ),
        ({"tensorrt", "pycuda"}, [], "10.3.0 with pycuda, but there is no driver", None),
        ({"pycuda"}, [H200], "not installed: pip install 'mae-deploy[trt]'", ["tensorrt"]),
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
    assert {extra for extras in NEEDS for extra in extras.split(",")} <= set(required)


def test_sources_that_are_not_installed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def requires(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", requires)
    assert main(["doctor"]) == 3
    assert "error: mae-deploy is not installed" in capsys.readouterr().err


def test_without_the_training_packages() -> None:
    done = run_without((*TRAINING, "openvino"), "doctor", "--json")
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
        *("verify", "predict", "eval BUNDLE", "benchmark", "data", "info", "schema"),
        *("predict --out FILE.parquet", "predict on TIFF"),
    ]


def test_without_torch_for_people() -> None:
    done = run_without(("torch", "pyarrow"), "doctor")
    assert (done.returncode, done.stderr) == (0, "")
    words = " ".join(done.stdout.split())
    assert "needs torch: pip install 'mae-deploy[train]'" in words
    assert "needs pyarrow: pip install 'mae-deploy[parquet]'" in words
    assert "verify ready" in words


def test_without_an_engine() -> None:
    done = run_without(("onnxruntime",), "doctor", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["engines"]["onnxruntime"] == "not installed: pip install onnxruntime"
    assert found["commands"]["predict"]["missing"] == ["onnxruntime"]
    assert found["commands"]["predict"]["install"] == "pip install --force-reinstall mae-deploy"
    assert found["commands"]["info"]["missing"] == ["onnxruntime"], "what pip installs is there, or is not"
