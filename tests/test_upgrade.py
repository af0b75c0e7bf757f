"""What a later version has written is refused, with the version to install."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mae_deploy.cli import main
from mae_deploy.errors import ConfigError
from mae_deploy.packages import is_later, upgrade
from mae_deploy.pretrain.run import run_pretrain
from tests.data.image_folders import write_noise
from tests.runtime.tiny_bundle import write_bundle
from tests.training.tiny_runs import pretraining

INSTALL = "pip install --upgrade 'mae-deploy>=7.1.0'"


def changed(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    def of(*arguments: str | Path) -> list[str]:
        assert main([*map(str, arguments)]) == 2
        return capsys.readouterr().err.splitlines()

    return of


@pytest.mark.parametrize("command", ["info", "verify", "predict", "benchmark", "build-engine", "push"])
def test_a_bundle(command: str, tmp_path: Path, said: Callable[..., list[str]]) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    changed(bundle / "manifest.json", schema_version=9, mae_deploy_version="7.1.0", more={"of": "this"})
    write_noise(tmp_path / "photos", 1)
    more = {"predict": [str(tmp_path / "photos")], "push": ["hf://org/name"]}.get(command, [])
    error, hint = said(command, bundle, *more)[-2:]
    assert "schema version 9; mae-deploy " in error
    assert hint == f"hint: {INSTALL}"


def test_a_checkpoint(pretrained: Path, tmp_path: Path, said: Callable[..., list[str]]) -> None:
    last = (pretrained / "checkpoints" / "last").resolve()
    changed(last / "metadata.json", schema_version=9, mae_deploy_version="7.1.0")
    for arguments in (["info", last], ["export", last, "--out", tmp_path / "bundle"]):
        error, hint = said(*arguments)
        assert "metadata.json: schema version 9; mae-deploy " in error
        assert hint == f"hint: {INSTALL}"


def test_a_run(pretrained: Path, images: Path, said: Callable[..., list[str]]) -> None:
    changed(pretrained / "environment.json", mae_deploy="7.1.0")
    (pretrained / "config.yaml").write_text((pretrained / "config.yaml").read_text() + "a_later_setting: 1\n")
    error, hint = said("pretrain", "--resume", pretrained)
    assert "mae-deploy 7.1.0 has written it, this is" in error
    assert hint == f"hint: {INSTALL}"
    with pytest.raises(ConfigError, match=r"mae-deploy 7\.1\.0 has written it"):
        run_pretrain(pretraining(images, pretrained, resume=True))


def test_without_a_version_the_newest_is_named() -> None:
    assert upgrade() == upgrade(3) == upgrade("\x1b[31m1.0") == "pip install --upgrade mae-deploy"
    assert is_later("0.10.0", "0.9.1")
    assert not is_later("0.9.1", "0.9.1")
