"""A bundle that is replaced in its folder serves once it is verified, and never before; no request is lost then."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from mae_deploy.commands.serve.served import open_verified
from mae_deploy.errors import CheckFailed
from tests.commands.serve.serving import Client, serving, settings, wait_for
from tests.commands.serve.test_app import PICTURE
from tests.runtime.tiny_bundle import write_bundle


def revision(client: Client) -> str:
    found = client.get("/health/ready").json["models"]["bundle"]
    assert isinstance(found, str)
    return found


def put(new: Path, folder: Path) -> None:
    """In the place of what is there, as one rename each."""
    folder.rename(folder.with_name("before"))
    new.rename(folder)
    shutil.rmtree(folder.with_name("before"))


def test_a_bundle_is_replaced_while_it_serves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_bundle(tmp_path / "bundle")
    write_bundle(tmp_path / "better", outputs=("logits", "pooled"))
    statuses: list[int] = []
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            statuses.append(client.post("bundle/embed?outputs=pooled", PICTURE).status)

    with serving(settings(folder, reload="20ms")) as client:
        first = revision(client)
        asking = threading.Thread(target=ask)
        asking.start()
        put(tmp_path / "better", folder)
        wait_for(lambda: revision(client) != first)
        assert client.get("/v1/models/bundle").json["outputs"] == ["logits", "pooled"]
        second = revision(client)

        wrong: dict[str, dict[str, Any]] = {"flawed": {"flaw": "off_by_one"}, "others": {"weights_seed": 1}}
        for name, kind in wrong.items():
            put(write_bundle(tmp_path / name, **kind), folder)
            wait_for(lambda: "misses parity" in (client.get("/v1/models/bundle").json["refused"] or ""))
            assert revision(client) == second
            (folder / "manifest.json").write_text("{")
            wait_for(lambda: "misses parity" not in client.get("/v1/models/bundle").json["refused"])
        put(write_bundle(tmp_path / "damaged"), folder)
        (folder / "encoder.onnx").write_bytes(b"x")
        wait_for(lambda: "is not the file that was exported" in client.get("/v1/models/bundle").json["refused"])

        assert revision(client) == second
        put(write_bundle(tmp_path / "good"), folder)
        wait_for(lambda: client.get("/v1/models/bundle").json["refused"] is None)
        wait_for(lambda: revision(client) != second)
        done.set()
        asking.join()
        text = client.get("/metrics").body.decode()
    assert set(statuses) == {200}
    assert len(statuses) > 5
    assert 'mae_deploy_reloads_total{model="bundle",result="verified"} 2.0' in text
    assert text.count("mae_deploy_bundle_info{") == 1
    said = capsys.readouterr().err
    assert "reloaded: bundle is revision" in said
    assert "refused: bundle serves on as it was" in said


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "bundle")
    with serving(settings(folder, reload="20ms")) as client:
        first = revision(client)
        folder.rename(tmp_path / "away")
        wait_for(lambda: "no bundle at" in (client.get("/v1/models/bundle").json["refused"] or ""))
        assert client.post("bundle/predict", PICTURE).status == 200
        (tmp_path / "away").rename(folder)
        wait_for(lambda: client.get("/v1/models/bundle").json["refused"] is None)
        assert revision(client) == first


def test_a_flawed_bundle_is_not_served_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(CheckFailed, match="misses parity"):
        open_verified(settings(write_bundle(tmp_path / "bundle", flaw="order")), "bundle")
