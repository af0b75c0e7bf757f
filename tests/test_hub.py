"""A bundle goes to a model hub and comes back from it: the same bytes, once, checked by the same hashes, with a licence
that nobody loses.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import yaml

from mae_deploy.cli import main
from mae_deploy.errors import ConfigError
from mae_deploy.hub import Address, is_address
from mae_deploy.reporting.card import MARK
from mae_deploy.runtime import Backbone, Bundle
from tests.data.image_folders import write_noise
from tests.fake_hub import FakeHub, serving
from tests.runtime.tiny_bundle import write_bundle


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    with serving(monkeypatch) as found:
        yield found


def bundle_with(path: Path, **changes: Any) -> Path:
    write_bundle(path)
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    (path / "manifest.json").write_text(json.dumps({**manifest, **changes}), encoding="utf-8")
    return path


def front_matter(card: bytes) -> dict[str, Any]:
    opened, text, _ = card.decode().split("---\n", 2)
    assert opened == ""
    found: dict[str, Any] = yaml.safe_load(text)
    return found


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("hf://a/b", Address("a/b")),
        (Path("hf://a/b-c.d"), Address("a/b-c.d")),
        ("hf://a/b/c/d/", Address("a/b", "c/d")),
        ("hf://a/b@v1/c", Address("a/b", "c", "v1")),
        ("hf://a/b/c@v1", Address("a/b", "c", "v1")),
        ("hf://a/b@refs/pr/3/c", Address("a/b", "c", "refs/pr/3")),
        ("hf://a/b@refs/pr/3", Address("a/b", "", "refs/pr/3")),
    ],
)
def test_addresses(typed: str | Path, expected: Address) -> None:
    assert is_address(typed)
    assert Address.read(typed) == expected == Address.read(str(expected))


@pytest.mark.parametrize("typed", ["hf://a", "hf://", "hf://a/b/../c", "hf://a/b@v1/c@v2", "hf:///b@c", "hf://a/b@"])
def test_what_is_no_address(typed: str) -> None:
    with pytest.raises(ConfigError, match=r"hf://.* is no address"):
        Address.read(typed)


@pytest.mark.parametrize("address", ["hf://me/vit", "hf://me/vit/int8/cpu"])
def test_there_and_back(hub: FakeHub, address: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_bundle(Path("bundle"))
    assert main(["push", "bundle", address, "--json"]) == 0
    pushed = json.loads(capsys.readouterr().out)
    assert list(hub.repositories["me/vit"])[1:] == [pushed["commit"]]
    prefix = address.removeprefix("hf://me/vit").strip("/") + "/" if address.count("/") > 3 else ""
    files = hub.files("me/vit")
    written = {f"{prefix}{path.name}": path.read_bytes() for path in Path("bundle").iterdir()}
    assert {
        name: content for name, content in files.items() if name not in (f"{prefix}README.md", ".gitattributes")
    } == written
    card = files[f"{prefix}README.md"]
    assert front_matter(card)["license"] == "apache-2.0"
    assert f"mae-deploy predict {address} IMAGES" in card.decode()

    write_noise(Path("photos"), 3)
    for command in (["verify"], ["info"], ["predict"], ["benchmark"]):
        more = {"predict": ["photos"], "benchmark": ["--repeats", "1", "--warmup", "0"]}.get(command[0], [])
        assert main([*command, address, *more, "--json"]) == 0, capsys.readouterr().err
        json.loads(capsys.readouterr().out)
    assert Backbone.load(address).bundle.manifest == Bundle.load("bundle").manifest
    gets = [line for line in hub.asked if line.startswith("GET")]
    assert len(gets) == len(set(gets)) == len(written)  # each file once, for all five


def test_a_revision_and_the_cache(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_bundle(Path("first"))
    bundle_with(Path("second"), class_names=None)
    assert main(["push", "first", "hf://me/vit"]) == 0
    assert main(["push", "second", "hf://me/vit"]) == 0
    _, first, _ = hub.repositories["me/vit"]
    assert Bundle.load(f"hf://me/vit@{first}").class_names is not None
    assert Bundle.load("hf://me/vit").class_names is None
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between a minute's attempts
    assert Bundle.load(f"hf://me/vit@{first}").class_names is not None
    assert Bundle.load("hf://me/vit").class_names is None
    capsys.readouterr()
    assert main(["info", "hf://me/other"]) == 1
    assert "the hub cannot be reached, and manifest.json is not in the cache" in capsys.readouterr().err


def test_what_was_changed_on_the_way_is_refused(hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    write_bundle(Path("bundle"))
    assert main(["push", "bundle", "hf://me/vit"]) == 0
    name = Bundle.load("bundle").manifest["graph"]["file"]
    hub.commit("me/vit", {name: hub.files("me/vit")[name] + b" "})
    capsys.readouterr()
    assert main(["verify", "hf://me/vit"]) == 1
    assert f"{name} is not the file that was exported" in capsys.readouterr().err
    manifest = json.loads(hub.files("me/vit")["manifest.json"])
    manifest["files"]["../outside"] = {"sha256": "0", "size": 1}
    hub.commit("me/vit", {"manifest.json": json.dumps(manifest).encode()})
    assert main(["verify", "hf://me/vit"]) == 1
    assert "lists '../outside', which is outside of the bundle" in capsys.readouterr().err
    damaged = Path("bundle") / name
    damaged.write_bytes(damaged.read_bytes() + b" ")
    assert main(["push", "bundle", "hf://me/new"]) == 1
    assert "is not the file that was exported" in capsys.readouterr().err
    assert "me/new" not in hub.repositories


def test_one_clear_line(hub: FakeHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    write_bundle(Path("bundle"))
    assert main(["push", "bundle", "hf://me/secret/sub", "--private"]) == 0
    assert hub.private == {"me/secret"}
    assert main(["info", "hf://me/secret/sub"]) == 0
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "no-such-file")
    expected = {
        "hf://me/secret/other": "no such repository, or it may not be read without a token",
        "hf://me/nothing": "no such repository, or it may not be read without a token",
        "hf://me/b@v9": "there is no revision 'v9'",
        "hf://me/b": "there is no manifest.json",
    }
    hub.commit("me/b", {"README.md": b""})
    for address, words in expected.items():
        capsys.readouterr()
        assert main(["predict", address, "photos"]) == 2, address
        said = capsys.readouterr().err.splitlines()
        assert [line.partition(":")[0] for line in said] == ["error", "hint"]
        assert said[0].startswith(f"error: {address}: ")
        assert words in said[0]
    assert main(["build-engine", "hf://me/b"]) == 2
    assert "must be a folder of your own" in capsys.readouterr().err


def test_a_licence_stays_and_is_said(hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    bundle_with(Path("nc"), licence="CC-BY-NC-4.0")
    assert main(["push", "nc", "hf://me/nc", "--license", "MIT"]) == 2
    assert "derive from others under CC-BY-NC-4.0" in capsys.readouterr().err
    assert main(["push", "nc", "hf://me/nc"]) == 0
    assert "non-commercial release" in capsys.readouterr().err
    assert front_matter(hub.files("me/nc")["README.md"])["license"] == "cc-by-nc-4.0"
    assert Bundle.load("hf://me/nc").licence == "CC-BY-NC-4.0"
    bundle_with(Path("both"), licence="CC-BY-NC-4.0 AND MIT")
    assert main(["push", "both", "hf://me/both"]) == 0
    data = front_matter(hub.files("me/both")["README.md"])
    assert (data["license"], data["license_name"]) == ("other", "CC-BY-NC-4.0 AND MIT")
    bundle_with(Path("own"), licence="own")
    capsys.readouterr()
    assert main(["push", "own", "hf://me/own"]) == 0
    assert "--license says it" in capsys.readouterr().err
    assert main(["push", "own", "hf://me/own", "--license", "Apache-2.0"]) == 0
    assert front_matter(hub.files("me/own")["README.md"])["license"] == "apache-2.0"


def test_somebody_elses_card_stays(hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    write_bundle(Path("bundle"))
    hub.commit("me/vit", {"README.md": b"# mine"})
    assert main(["push", "bundle", "hf://me/vit"]) == 0
    assert hub.files("me/vit")["README.md"] == b"# mine"
    assert "stays as it is" in capsys.readouterr().err
    assert main(["push", "bundle", "hf://me/vit", "--no-keep-card"]) == 0
    assert MARK in hub.files("me/vit")["README.md"].decode()
