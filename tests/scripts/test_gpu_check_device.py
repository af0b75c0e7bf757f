"""Building and verifying in a Python that has no command line of ours."""

from __future__ import annotations

import json
import subprocess
from importlib import util
from pathlib import Path

import pytest

from mae_deploy.runtime.cuda.driver import gpus
from scripts.gpu_check import run_command
from scripts.gpu_check_device import main
from tests.runtime.tiny_bundle import write_bundle
from tests.test_cli import TRAINING, run_without


def test_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = write_bundle(tmp_path / "good"), write_bundle(tmp_path / "bad", flaw="off_by_one")
    assert main(["verify", str(good), "--engine", "onnxruntime", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["passed"] is True
    assert main(["verify", str(bad), "--engine", "onnxruntime"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: {bad} misses parity: golden: ")
    assert main(["verify", str(tmp_path / "none")]) == 2
    assert "hint: a bundle is the folder" in capsys.readouterr().err


@pytest.mark.skipif(bool(gpus()), reason="there is a GPU")
def test_numpy_is_enough_to_be_told_what_is_missing(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    program = "from scripts.gpu_check_device import main; sys.exit(main(sys.argv[1:]))"
    for command in ("build-engine", "verify"):
        done = run_without(
            (*TRAINING, "typer", "rich", "PIL", "onnxruntime", "openvino"), command, str(bundle), program=program
        )
        assert (done.returncode, done.stdout) == (3, ""), done.stderr
        assert done.stderr.startswith("error: ")


def test_it_stands_in_for_the_command_line_where_that_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = []

    def run(words: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        modules.append(words[2])
        return subprocess.CompletedProcess(words, 0, "{}", "")

    monkeypatch.setattr(subprocess, "run", run)
    run_command(["mae-deploy", "verify", "bundle"])
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    run_command(["mae-deploy", "verify", "bundle"])
    assert modules == ["mae_deploy", "scripts.gpu_check_device"]
