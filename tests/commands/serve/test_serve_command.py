"""`mae-deploy serve` as it is typed: what it says, and how it stops."""

from __future__ import annotations

import http.client
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mae_deploy.cli import main
from mae_deploy.commands.serve.config import ServeConfig
from mae_deploy.config import from_dict
from mae_deploy.errors import ConfigError
from tests.commands.serve.serving import wait_for
from tests.commands.serve.test_app import PICTURE
from tests.runtime.tiny_bundle import write_bundle
from tests.test_cli import run_without


def test_sigterm_lets_requests_end(tmp_path: Path) -> None:
    write_bundle(tmp_path / "bundle")
    command = [
        sys.executable,
        "-m",
        "mae_deploy",
        "serve",
        str(tmp_path / "bundle"),
        "--port",
        "0",
        "--max-delay",
        "2s",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            _stop_while_it_computes(process)
        finally:
            process.kill()


def _stop_while_it_computes(process: subprocess.Popen[str]) -> None:
    assert process.stderr is not None
    said = [process.stderr.readline() for _ in range(2)]
    match = re.fullmatch(r"serving: http://127\.0\.0\.1:(\d+)\n", said[1])
    assert said[0] == "verified: bundle, fp32 on onnxruntime\n"
    assert match is not None
    connection, other = (http.client.HTTPConnection("127.0.0.1", int(match[1]), timeout=60) for _ in range(2))
    connection.request("POST", "/v1/models/bundle/predict", PICTURE)  # it waits two seconds for others

    def is_waiting() -> bool:
        other.request("GET", "/metrics")
        return b'mae_deploy_queued_images{model="bundle"} 1.0' in other.getresponse().read()

    wait_for(is_waiting)
    process.send_signal(signal.SIGTERM)
    assert connection.getresponse().status == 200
    connection.close()
    other.close()
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (0, "stopped; served bundle\n", "")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bundles": ["a/x", "b/x"]}, "2 bundles are called x"),
        ({"bundles": ["a b=x"]}, "'a b' cannot be part of an address"),
        ({"batches": {"max_delay": "5"}}, None),
        ({"batches": {"max_delay": "soon"}}, "--max-delay soon is no time"),
        ({"requests": {"timeout": "-1s"}}, "--timeout -1s is no time"),
        ({"reload": "1 day"}, "--reload 1 day is no time"),
        ({"requests": {"max_held": 5}}, "--max-held 5 is less than --max-bytes 20000000"),
        ({"requests": {"images": "/nowhere"}}, "--images /nowhere is no folder"),
        ({"requests": {"api_keys": "/nowhere"}}, "--api-keys /nowhere cannot be read: No such file"),
        ({"requests": {"api_keys": os.devnull}}, f"--api-keys {os.devnull} cannot be read: it is no file"),
        ({"port": 70000}, "port"),
    ],
)
def test_settings(values: dict[str, object], message: str | None) -> None:
    values = {"bundles": ["x"], **values}
    if message is None:
        from_dict(ServeConfig, values)
        return
    with pytest.raises(ConfigError) as caught:
        from_dict(ServeConfig, values)
    assert message in str(caught.value)


def test_names() -> None:
    given = ("a/b", "c=d/e", "hf://org/name", "hf://org/name@v1/sub/folder", "f=hf://org/other", "g/h-i")
    assert from_dict(ServeConfig, {"bundles": list(given)}).named == {
        "b": "a/b",
        "c": "d/e",
        "name": "hf://org/name",
        "folder": "hf://org/name@v1/sub/folder",
        "f": "hf://org/other",
        "h-i": "g/h-i",
    }


def test_a_port_that_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_bundle(tmp_path / "bundle")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["serve", str(tmp_path / "bundle"), "--port", str(port)]) == 2
    error, hint = capsys.readouterr().err.splitlines()
    assert error == f"error: cannot listen on 127.0.0.1 port {port}: Address already in use"
    assert hint == "hint: another --host or --port"


def test_a_flawed_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_bundle(tmp_path / "bundle", flaw="off_by_one")
    assert main(["serve", str(tmp_path / "bundle"), "--port", "0"]) == 1
    assert "misses parity" in capsys.readouterr().err


def test_without_the_extra(tmp_path: Path) -> None:
    found = run_without(("fastapi",), "serve", str(tmp_path))
    assert found.returncode == 3
    assert "pip install 'mae-deploy[serve]'" in found.stderr
