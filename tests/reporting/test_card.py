"""The card of a bundle: what it says, and that its lines run where the bundle lies."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from mae_deploy.cli import main
from mae_deploy.reporting.card import MARK, bundle_card
from mae_deploy.runtime import Bundle
from tests.data.image_folders import write_noise
from tests.export.tiny_exports import CLASS_NAMES, write_checkpoint
from tests.models.tiny_models import tiny_classifier
from tests.runtime.tiny_bundle import write_bundle


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and where bundles of it go."""
    root = tmp_path_factory.mktemp("cards")
    write_noise(root / "photos", 8)
    Image.open(next(iter((root / "photos").iterdir()))).convert("RGB").save(root / "photo.jpg")
    write_checkpoint(root / "checkpoint", tiny_classifier("cls"), licence="CC-BY-NC-4.0", class_names=CLASS_NAMES)
    return root


@pytest.mark.parametrize("tokens", ["full", "visible:5", "cached"])
def test_the_card_of_an_export_runs(folder: Path, monkeypatch: pytest.MonkeyPatch, tokens: str) -> None:
    monkeypatch.chdir(folder)
    out = tokens.replace(":", "-")
    arguments = ("--tokens", tokens, "--samples", "photos", "--threads", "1")
    assert main(["export", "checkpoint", "--out", out, *arguments]) == 0
    card = (folder / out / "README.md").read_text(encoding="utf-8")
    program, commands = (
        re.findall(rf"^```{language}\n(.*?)^```", card, re.DOTALL | re.MULTILINE) for language in ("python", "sh")
    )
    found: dict[str, object] = {}
    exec(program[0], found)
    assert "outputs" in found
    assert f"mae-deploy verify {out}" in commands[0]
    for said in (
        "CC-BY-NC-4.0, inherited",
        "| input | ",
        "| output | logits | float32 | (B, ",
        "## Certificate",
        "| logits: cosine, worst image | at least 0.99999 |",
        "## Provenance",
        '"path": "checkpoint"',
    ):
        assert said in card
    assert "README.md" not in Bundle.load(out).manifest["files"]
    (folder / out / "README.md").write_text("mine")
    assert main(["verify", out, "--threads", "1"]) == 0


def test_older_bundles_have_no_certificate_and_hubs_want_front_matter(tmp_path: Path) -> None:
    bundle = Bundle.load(write_bundle(tmp_path / "b"))
    assert "certificate" not in bundle.manifest
    local, hub = (bundle_card(bundle, address, bundle.licence) for address in ("b", "hf://me/b"))
    assert "## Certificate" not in local
    assert local.startswith("# ")
    assert MARK not in local
    assert hub.startswith("---\n")
    assert "\nlicense: apache-2.0\n" in hub
    assert MARK in hub
