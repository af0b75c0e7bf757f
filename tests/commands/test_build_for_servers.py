"""`build-engine` for servers: what is refused before a GPU is looked for, and what is written once there is an
engine.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from mae_deploy.cli import main
from mae_deploy.commands import build_engine
from mae_deploy.commands.config import BuildEngineConfig
from mae_deploy.serving.deepstream import INFER_FILE
from mae_deploy.serving.write import write_for_servers
from tests.runtime.tensorrt.planned_bundle import PLAN, plan_of, planned
from tests.runtime.tiny_bundle import write_bundle


def test_what_deepstream_cannot_feed_is_said_before_the_build(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build-engine", str(write_bundle(tmp_path / "visible")), "--deepstream", str(tmp_path / "ds")]) == 2
    assert "--tokens visible has other inputs" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "there"), [("--triton", "place/visible"), ("--deepstream", "place")])
def test_what_is_there_is_not_overwritten(
    tmp_path: Path, option: str, there: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / there).mkdir(parents=True)
    (tmp_path / there / "something").touch()
    assert main(["build-engine", str(write_bundle(tmp_path / "visible")), option, str(tmp_path / "place")]) == 2
    assert f"{option} {tmp_path / there} already exists" in capsys.readouterr().err


def test_the_engine_is_written_for_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = planned(tmp_path / "full", token_mode="full", preprocess={"std": [0.3] * 3})
    built = SimpleNamespace(entry=plan_of(bundle), rejected=None, baseline=None)
    monkeypatch.setattr(build_engine, "load_tensorrt", lambda index: None)
    monkeypatch.setattr(
        build_engine, "build_engine", lambda *_, **__: built
    )  # what it does needs a GPU, and is tested on one
    result = build_engine.run_build_engine(
        BuildEngineConfig(bundle=bundle.path, triton=tmp_path / "models", deepstream=tmp_path / "ds")
    )
    assert result.data["served"] == {"triton": str(tmp_path / "models" / "full"), "deepstream": str(tmp_path / "ds")}
    assert (tmp_path / "models" / "full" / "1" / "model.plan").read_bytes() == PLAN
    assert (tmp_path / "ds" / INFER_FILE).is_file()


@pytest.mark.parametrize("missing", ["--triton", "--deepstream"])
def test_a_call_that_was_ended_between_two_servers_goes_on_there(
    tmp_path: Path, missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = planned(tmp_path / "full", token_mode="full", preprocess={"std": [0.3] * 3})
    places = {"triton": tmp_path / "models", "deepstream": tmp_path / "ds"}
    there = {name: None if missing == f"--{name}" else place for name, place in places.items()}
    write_for_servers(bundle, plan_of(bundle), triton=there["triton"], deepstream=there["deepstream"])
    monkeypatch.setattr(build_engine, "load_tensorrt", lambda index: pytest.fail("it is built again"))
    arguments = ["build-engine", str(bundle.path), "--triton", str(places["triton"])]
    arguments += ["--deepstream", str(places["deepstream"])]
    assert main([*arguments, "--strip"]) == 2  # another engine than that
    assert "already exists" in capsys.readouterr().err
    assert main(arguments) == 0
    assert f"{missing} is written now" in capsys.readouterr().err
    assert (tmp_path / "models" / "full" / "1" / "model.plan").read_bytes() == PLAN
    assert (tmp_path / "ds" / INFER_FILE).is_file()
    assert main(arguments) == 2
    assert "already exists" in capsys.readouterr().err
