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
