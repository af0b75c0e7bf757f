"""`mae-deploy doctor` names what is there and what is missing for which command, and always succeeds."""

from __future__ import annotations

import json
from importlib import metadata
from typing import Any

import pytest
import typer

from mae_deploy import __version__
from mae_deploy.cli import app, main
from mae_deploy.commands.doctor import NEEDS
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
    assert set(found["commands"]) == set(NEEDS)
    assert found["commands"]["pretrain"] is None
    assert isinstance(found["machine"]["nvidia_gpus"], int)


def test_every_command_is_listed() -> None:
    group: Any = typer.main.get_command(app)
    assert {name.split()[0] for name in NEEDS} == set(group.commands) - {"doctor"}


def test_without_the_training_packages() -> None:
    done = run_without(TRAINING, "doctor", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["packages"]["torch"] is None
    assert found["packages"]["onnxruntime"] is not None
    pretrain = found["commands"]["pretrain"]
    assert set(pretrain["missing"]) == set(NEEDS["pretrain"][1])
    assert pretrain["install"] == "pip install 'mae-deploy[train]'"
    assert [name for name, problem in found["commands"].items() if problem is None] == ["verify", "predict", "predict --out FILE.parquet", "benchmark", "info"]


def test_without_torch_for_people() -> None:
    done = run_without(("torch", "pyarrow"), "doctor")
    assert (done.returncode, done.stderr) == (0, "")
    words = " ".join(done.stdout.replace("│", " ").split())
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
    assert found["commands"]["info"] is None
