"""The licence of imported weights is that of everything made of them: classifier, linear probe, student, bundle, and
weights for elsewhere.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mae_deploy.checkpoint import NON_COMMERCIAL, open_checkpoint
from mae_deploy.cli import main
from mae_deploy.models.config import DecoderConfig, EncoderConfig
from mae_deploy.models.mae import MaskedAutoencoder
from mae_deploy.weights.read.convert import ImportOptions, import_weights
from tests.data.image_folders import write_classes, write_noise
from tests.models.tiny_models import fill, write_original

NANO = EncoderConfig(name="vit_nano_patch4", image_size=(12, 12))
TRAINING = ("--num-workers", "0", "--device", "cpu")
PLAIN = (
    "--drop-path",
    "0",
    "--label-smoothing",
    "0",
    "--mixup",
    "0",
    "--cutmix",
    "0",
    "--reprob",
    "0",
    "--auto-augment",
    "none",
    *TRAINING,
)


@pytest.fixture
def released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint that was imported from a non-commercial release, and images beside it."""
    monkeypatch.chdir(tmp_path)
    write_noise(Path("photos"), 6)
    write_classes(Path("labelled"))
    mae = MaskedAutoencoder(NANO, DecoderConfig(decoder_depth=1, decoder_embed_dim=32))
    write_original(Path("mae_visualize_vit_base.pth"), dict(fill(mae).state_dict()))
    assert main(["import", "mae_visualize_vit_base.pth", "--out", "mae"]) == 0
    return Path("mae")


def licence(checkpoint: str) -> str:
    return open_checkpoint(Path(checkpoint)).metadata.licence


def test_what_is_made_of_a_release_inherits_its_licence(released: Path) -> None:
    assert licence(str(released)) == NON_COMMERCIAL
    small = ("--epochs", "1", "--batch-size", "4", "--lr", "1e-3", "--warmup-epochs", "0")
    assert main(["finetune", "labelled", "--init", "mae", "--out", "tuned", *small, *PLAIN]) == 0
    assert main(["linprobe", "labelled", "--init", "mae", "--out", "probe", "--solver", "ridge", *TRAINING]) == 0
    student = ("--student", "vit_nano_patch4", "--image-size", "12,12", *small, *TRAINING)
    assert main(["distill", "photos", "--teacher", "mae", "--out", "student", *student]) == 0
    assert {name: licence(name) for name in ("tuned", "probe", "student")} == dict.fromkeys(
        ("tuned", "probe", "student"), NON_COMMERCIAL
    )
    assert main(["export", "tuned", "--out", "bundle", "--samples", "photos", "--num-samples", "3"]) == 0
    assert json.loads(Path("bundle/manifest.json").read_text())["licence"] == NON_COMMERCIAL
    for to, out in (("timm", "timm"), ("huggingface", "vit_mae"), ("original", "renamed.pth")):
        assert main(["export-weights", "probe" if to == "huggingface" else "tuned", "--to", to, "--out", out]) == 0
        assert import_weights(Path(out), ImportOptions()).metadata.licence == NON_COMMERCIAL
