"""The command line as a user and a script meet it: exit codes, one-line errors, pure JSON, and what is said where a
package is missing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from mae_deploy import __version__, cli
from mae_deploy.cli import main
from mae_deploy.errors import CheckFailed, ConfigError, MaeDeployError, MissingDependency, import_optional
from tests.runtime.tiny_bundle import write_bundle

WITHOUT = """
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    '''Finds modules as Python does, those of the absent packages aside.'''

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {absent!r} else super().find_spec(name, path, target)

sys.meta_path = [Without if finder is PathFinder else finder for finder in sys.meta_path]
{program}
"""
"""A program in a Python that lacks some packages."""

COMMAND = "from mae_deploy.cli import main; sys.exit(main(sys.argv[1:]))"

EMBEDDED = """
import numpy as np
from mae_deploy.runtime import Backbone, Bundle

bundle = Bundle.load(sys.argv[1])
with Backbone(bundle, Backbone.load(bundle.path).engine) as backbone:
    images = bundle.golden()["images"]
    assert backbone(images).cls.shape[0] == len(images)
    cropped = np.zeros((2, *bundle.preprocess.image_size, bundle.preprocess.channels), np.uint8)
    assert backbone.run_cropped(cropped).cls.shape[0] == 2
"""
"""Nothing here needs more than NumPy and ONNX Runtime."""

TRAINING = (
    "torch",
    "torchvision",
    "timm",
    "safetensors",
    "yaml",
    "accelerate",
    "tensorboard",
    "onnx",
    "transformers",
    "sklearn",
    "webdataset",
    "simplejpeg",
)


def run_without(
    absent: tuple[str, ...], *arguments: str, cwd: Path | None = None, program: str = COMMAND
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    command = [sys.executable, "-c", WITHOUT.format(absent=set(absent), program=program), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)


def run_module(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mae_deploy", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def failing(error: BaseException) -> Callable[[str], Any]:
    def import_module(module: str) -> Any:
        raise error

    return import_module


# --- exit codes ------------------------------------------------------------------------------------------------------


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


def test_help_is_0_and_nothing_is_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    helped = capsys.readouterr().out
    assert all(
        command in helped
        for command in (
            "pretrain",
            "finetune",
            "distill",
            "import",
            "export",
            "verify",
            "predict",
            "reconstruct",
            "info",
            "doctor",
            "quickstart",
        )
    )
    assert main([]) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["pretrai"], "pretrain"),
        (["pretrain", "--batch-sizes", "3"], "--batch-size"),
        (["pretrain", "images", "--seed", "x"], "--seed"),
        (["pretrain", "images", "--device", "tpu"], "cuda"),
        (["doctor", "more"], "unexpected argument"),
    ],
)
def test_wrong_usage_is_2(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.out == ""
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        (["pretrain", "images"], "error: --out is missing", "hint: Run folder to write."),
        (["pretrain", "--out", "run"], "error: DATA is missing", None),
        (
            ["verify"],
            "error: BUNDLE is missing",
            "hint: Bundle folder, or hf://ORG/NAME on a model hub; with --graph a checkpoint.",
        ),
        (["distill", "images", "--out", "run", "--student", "vit_tiny_patch4"], "error: --teacher is missing", None),
        (
            ["pretrain", "images", "--out", "run", "--set", "optim.ephocs=3"],
            "error: unknown setting 'optim.ephocs'",
            "hint: did you mean 'epochs'?",
        ),
        (
            ["pretrain", "images", "--out", "run", "--set", "epochs=3"],
            "error: unknown setting 'epochs'",
            "hint: did you mean 'optim.epochs'?",
        ),
        (
            ["finetune", "images", "--out", "run", "--set", "mixup=0"],
            "error: unknown setting 'mixup'",
            "hint: did you mean 'mix.mixup'?",
        ),
        (
            ["pretrain", "images", "--out", "run", "--recipe", "finetune-vit-base"],
            "error: --recipe finetune-vit-base is one of finetune, not of pretrain",
            None,
        ),
        (
            ["finetune", "images", "--out", "run", "--recipe", "distill-dmae-vit-tiny"],
            "error: --recipe distill-dmae-vit-tiny is one of distill, not of finetune",
            None,
        ),
        (
            ["pretrain", "images", "--out", "run", "--image-size", "30"],
            "error: --image-size 30,30 is not a multiple of the patch size, 16",
            "hint: the nearest is 32,32",
        ),
        (["info", "nowhere"], "error: nowhere is not a run, checkpoint, weights file or bundle", None),
        (
            ["import", "nowhere.pth", "--out", "checkpoint"],
            "error: no weights at nowhere.pth",
            None,
        ),
    ],
)
def test_a_mistake_is_2_with_one_line_and_a_hint(
    arguments: list[str],
    error: str,
    hint: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert lines[0] == error
    assert all(line.startswith("hint: ") for line in lines[1:])
    assert len(lines) <= 2
    assert hint is None or lines[1] == hint
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == [], "something was written"


@pytest.mark.parametrize(
    ("error", "code", "printed"),
    [
        (CheckFailed("parity\n  missed", hint="look here"), 1, "error: parity missed\nhint: look here\n"),
        (MaeDeployError("it broke"), 1, "error: it broke\n"),
        (ConfigError("wrong value"), 2, "error: wrong value\n"),
        (MissingDependency("no GPU"), 3, "error: no GPU\n"),
        (
            ZeroDivisionError("division\nby zero"),
            1,
            "error: ZeroDivisionError: division by zero\nhint: MAE_DEPLOY_DEBUG=1 shows the traceback\n",
        ),
        (KeyboardInterrupt(), 130, ""),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_each_kind_of_failure_has_its_code(
    error: BaseException, code: int, printed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MAE_DEPLOY_DEBUG", raising=False)
    monkeypatch.setattr(cli, "_needs_torch", failing(error))
    assert main(["pretrain", "images", "--out", "run"]) == code
    assert capsys.readouterr().err == printed


@pytest.mark.parametrize(
    ("error", "code"), [(ConfigError("wrong value"), 2), (ZeroDivisionError("division by zero"), 1)]
)
def test_debug_shows_the_traceback_and_keeps_the_code(
    error: Exception, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MAE_DEPLOY_DEBUG", "1")
    monkeypatch.setattr(cli, "_needs_torch", failing(error))
    assert main(["pretrain", "images", "--out", "run"]) == code
    printed = capsys.readouterr().err
    assert printed.startswith("Traceback (most recent call last)")
    assert f"{type(error).__name__}: {error}\n" in printed
    assert "error: " in printed


def test_the_process_ends_with_the_code() -> None:
    done = run_module("info", "nowhere", MAE_DEPLOY_DEBUG="0")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: nowhere is not a run, checkpoint, weights file or bundle\n"
    debug = run_module("info", "nowhere", MAE_DEPLOY_DEBUG="1")
    assert debug.returncode == 2
    assert "Traceback" in debug.stderr


# --- output ----------------------------------------------------------------------------------------------------------


def test_json_of_a_passed_and_of_a_failed_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = write_bundle(tmp_path / "good"), write_bundle(tmp_path / "bad", weights_seed=1)
    assert main(["verify", str(good), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["passed"] is True
    assert main(["verify", str(bad), "--json"]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["passed"] is False
    assert captured.err.startswith(f"error: {bad} misses parity: ")


def test_dump_config_is_a_recipe_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [
        "pretrain",
        "images",
        "--out",
        "run",
        "--model",
        "vit_tiny_patch4",
        "--image-size",
        "32,48",
        "--set",
        "optim.betas=[0.9, 0.99]",
    ]
    assert main([*arguments, "--dump-config", "-"]) == 0
    first = capsys.readouterr().out
    values = yaml.safe_load(first)
    assert (values["data"], values["out"], values["model"]["image_size"], values["optim"]["betas"]) == (
        "images",
        "run",
        [32, 48],
        [0.9, 0.99],
    )
    # What was dumped gives the same settings again.
    Path("recipe.yaml").write_text(first)
    assert main(["pretrain", "--recipe", "recipe.yaml", "--dump-config", "-"]) == 0
    assert capsys.readouterr().out == first
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


# --- missing packages ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "package", "extra"),
    [
        (["pretrain", "images", "--out", "run"], "torch", "train"),
        (["finetune", "images", "--out", "run", "--init", "x"], "torch", "train"),
        (["export", "run", "--out", "bundle"], "torch", "train"),
        (["import", "weights.pth", "--out", "checkpoint"], "torch", "train"),
        (["pretrain", "images", "--out", "run", "--dump-config", "-"], "yaml", "train"),
        (["pretrain", "images", "--out", "run", "--set", "seed=3"], "yaml", "train"),
    ],
)
def test_a_missing_package_is_3_and_names_the_extra(
    arguments: list[str], package: str, extra: str, tmp_path: Path
) -> None:
    done = run_without(TRAINING, *arguments, cwd=tmp_path)
    assert done.returncode == 3
    assert done.stdout == ""
    assert (
        done.stderr
        == f"error: this needs the package '{package}', which cannot be imported (No module named '{package}')\nhint:"
        f" pip install 'mae-deploy[{extra}]'\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_the_runtime_needs_numpy_and_an_engine(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    done = run_without((*TRAINING, "PIL", "rich", "typer", "openvino", "tensorrt"), str(bundle), program=EMBEDDED)
    assert done.returncode == 0, done.stderr


def test_a_device_without_torch_verifies_describes_and_predicts(tmp_path: Path) -> None:
    bundle, image = write_bundle(tmp_path / "bundle"), tmp_path / "image.png"
    Image.new("RGB", (17, 13), "orange").save(image)
    for arguments in (
        ["verify", str(bundle), "--json"],
        ["info", str(bundle), "--json"],
        ["predict", str(bundle), str(image), "--json"],
    ):
        done = run_without(TRAINING, *arguments)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)


def test_the_probe_hides_a_package_and_no_other() -> None:
    class Without(PathFinder):
        pass

    assert Without.find_spec("torch") is not None, "torch is installed here, so its absence above is the probe's work"
    done = run_without(("torch",), "doctor", "--no-rates", "--json")
    packages = json.loads(done.stdout)["packages"]
    assert packages["torch"] is None
    assert packages["timm"] is not None


def test_import_optional() -> None:
    assert import_optional("json", extra="train") is json
    with pytest.raises(MissingDependency, match="needs the package 'no_such_package'") as caught:
        import_optional("no_such_package.part", extra="parquet")
    assert caught.value.hint == "pip install 'mae-deploy[parquet]'"
    # A missing module of ours is a mistake of ours, and no reason to install anything.
    with pytest.raises(ModuleNotFoundError, match=r"mae_deploy\.no_such_module"):
        import_optional("mae_deploy.no_such_module", extra="train")
