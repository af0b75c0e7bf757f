"""`sign` and `verify --signature`: nothing in a signed bundle can be changed, added or taken away unseen."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from mae_deploy.cli import main
from mae_deploy.commands.sign import PASSWORD
from mae_deploy.hub import CARD, SIGNATURE
from mae_deploy.runtime.manifest import file_entry
from tests.fake_hub import serving
from tests.runtime.tiny_bundle import write_bundle
from tests.test_cli import run_without


def write_keys(folder: Path, name: str, password: bytes | None = None) -> None:
    """`name.pem` and `name.pub`, as openssl writes them."""
    key = ec.generate_private_key(ec.SECP256R1())
    kind = serialization.PrivateFormat.TraditionalOpenSSL
    hidden = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    (folder / f"{name}.pem").write_bytes(key.private_bytes(serialization.Encoding.PEM, kind, hidden))
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (folder / f"{name}.pub").write_bytes(public)


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the signed bundle `bundle`, its keys `key.pem` and `key.pub`, and `other.pub`."""
    root = tmp_path_factory.mktemp("signed")
    for name in ("key", "other"):
        write_keys(root, name)
    write_bundle(root / "bundle")
    assert main(["sign", str(root / "bundle"), "--key", str(root / "key.pem")]) == 0
    return root


Said = Callable[..., str]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    """The one line that a command ends with."""

    def of(code: int, *arguments: str | Path) -> str:
        assert main([*map(str, arguments)]) == code
        lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("hint: ")]
        assert len(lines) == 1
        return lines[0]

    return of


def test_a_signed_bundle_is_verified_under_any_name(signed: Path, tmp_path: Path) -> None:
    shutil.copytree(signed / "bundle", tmp_path / "another name")
    assert main(["verify", str(tmp_path / "another name"), "--signature", str(signed / "key.pub")]) == 0
    linked = tmp_path / "as a hub's cache has it"
    linked.mkdir()
    for file in (signed / "bundle").iterdir():
        (linked / file.name).symlink_to(file)
    assert main(["verify", str(linked), "--signature", str(signed / "key.pub")]) == 0


def test_through_a_hub(signed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = shutil.copytree(signed / "bundle", tmp_path / "bundle")
    (bundle / CARD).write_text("what it is")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert main(["sign", str(bundle), "--key", str(signed / "key.pem")]) == 0
    with serving(monkeypatch) as hub:
        assert main(["push", str(bundle), "hf://org/name"]) == 0
        assert hub.files("org/name")[CARD] == b"what it is"
        assert main(["verify", "hf://org/name", "--signature", str(signed / "key.pub")]) == 0
        hub.commit("org/name", {CARD: b"another"})
        assert main(["verify", "hf://org/name", "--signature", str(signed / "key.pub")]) == 1


def flip(bundle: Path) -> None:
    """A bit of the weights, under the right hash."""
    content = bytearray((bundle / "encoder.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / "encoder.onnx").write_bytes(content)
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"]["encoder.onnx"] = file_entry(bundle / "encoder.onnx")
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def other_link(bundle: Path) -> None:
    (bundle.parent / "elsewhere").mkdir()
    (bundle / "engines").symlink_to(bundle.parent / "elsewhere")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (flip, "Hash mismatch for 'encoder.onnx'"),
        (lambda bundle: (bundle / "extra.plan").write_bytes(b"plan"), "Extra files found .*extra.plan"),
        (lambda bundle: (bundle / ".gitattributes").write_bytes(b""), "Extra files found .*gitattributes"),
        (lambda bundle: (bundle / "golden.npz").unlink(), "Missing files .*golden.npz"),
        (lambda bundle: (bundle / SIGNATURE).write_text("{}"), "does not hold"),
        (lambda bundle: (bundle / SIGNATURE).write_bytes(os.urandom(64)), "does not hold"),
        (lambda bundle: (bundle / SIGNATURE).unlink(), "is not signed: there is no model.sig"),
        (other_link, "engines is a link to a folder, which no signature covers"),
    ],
    ids=["weights", "a foreign file", "a hidden file", "a file less", "empty", "garbage", "unsigned", "a link"],
)
def test_what_was_changed_is_refused(
    change: Callable[[Path], object], words: str, signed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = shutil.copytree(signed / "bundle", tmp_path / "bundle")
    change(bundle)
    assert main(["verify", str(bundle), "--signature", str(signed / "key.pub")]) == 1
    assert re.search(words, capsys.readouterr().err.splitlines()[0])


def test_another_key_is_refused(signed: Path, said: Said) -> None:
    line = said(1, "verify", signed / "bundle", "--signature", signed / "other.pub")
    assert line.startswith(f"error: the signature of {signed / 'bundle'} does not hold for {signed / 'other.pub'}: Key")


def test_keys_that_are_none(signed: Path, tmp_path: Path, said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = shutil.copytree(signed / "bundle", tmp_path / "bundle")
    write_keys(tmp_path, "hidden", b"word")
    edwards = ed25519.Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (tmp_path / "edwards.pem").write_bytes(edwards)
    for key in ("missing.pem", "edwards.pem", "hidden.pem", "hidden.pub"):
        assert "is no private key that signs" in said(2, "sign", bundle, "--key", tmp_path / key)
    for key in ("missing.pub", "edwards.pem", "hidden.pem"):
        assert "is no public key" in said(2, "verify", bundle, "--signature", tmp_path / key)
    monkeypatch.setenv(PASSWORD, "word")
    assert main(["sign", str(bundle), "--key", str(tmp_path / "hidden.pem")]) == 0
    assert main(["verify", str(bundle), "--signature", str(tmp_path / "hidden.pub")]) == 0


def test_a_broken_bundle_is_not_signed(signed: Path, tmp_path: Path, said: Said) -> None:
    bundle = shutil.copytree(signed / "bundle", tmp_path / "bundle")
    (bundle / "golden.npz").write_bytes(b"something else")
    before = (bundle / SIGNATURE).read_bytes()
    assert "golden.npz" in said(1, "sign", bundle, "--key", signed / "key.pem")
    assert (bundle / SIGNATURE).read_bytes() == before


def test_without_the_package(signed: Path) -> None:
    found = run_without(("model_signing",), "sign", str(signed / "bundle"), "--key", str(signed / "key.pem"))
    assert found.returncode == 3
    assert "pip install 'mae-deploy[sign]'" in found.stderr
