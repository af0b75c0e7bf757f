"""Releases are known by name or by hash; what a file that we exported says goes before its name."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mae_deploy.checkpoint import NON_COMMERCIAL, UNKNOWN_LICENCE
from mae_deploy.weights.read import releases
from mae_deploy.weights.read.convert import ImportOptions, import_weights
from tests.models.tiny_models import SQUARE, tiny_classifier, tiny_encoder, tiny_mae, write_original
from tests.weights.read.test_mae_lite import lite_mae
from tests.weights.read.test_openmmlab import named_theirs, write_theirs

OPTIONS = ImportOptions(num_heads=5, decoder_num_heads=3)


def md5(file: Path) -> str:
    return hashlib.md5(file.read_bytes(), usedforsecurity=False).hexdigest()


@pytest.mark.parametrize(
    ("name", "normalised"),
    [
        ("mae_pretrain_vit_base_full.pth", True),
        ("mae_pretrain_vit_huge_full.pth", True),
        ("mae_visualize_vit_base.pth", False),
        ("mae_visualize_vit_large.pth", False),
        ("mae_visualize_vit_large_ganloss.pth", False),
        ("checkpoint-799.pth", True),
    ],
)
def test_the_target_of_a_released_decoder(tmp_path: Path, name: str, normalised: bool) -> None:
    # These files hold nothing but `model`; a wrong guess shows in every picture that is drawn of them.
    torch.save({"model": tiny_mae(SQUARE).state_dict()}, tmp_path / name)
    metadata = import_weights(tmp_path / name, OPTIONS).metadata
    assert (metadata.kind, metadata.norm_pix_loss) == ("mae", normalised)
    assert metadata.licence == (NON_COMMERCIAL if "vit" in name else UNKNOWN_LICENCE)


def test_the_published_sums() -> None:
    # README.md and FINETUNE.md of facebookresearch/mae.
    assert releases._MAE_MD5 == {
        "8cad7c": ("encoder", 768),
        "b8b06e": ("encoder", 1024),
        "9bdbb0": ("encoder", 1280),
        "1b25e9": ("classifier", 768),
        "51f550": ("classifier", 1024),
        "2541f2": ("classifier", 1280),
    }


@pytest.mark.parametrize(
    ("kind", "width", "known"), [("encoder", 20, True), ("encoder", 768, False), ("classifier", 20, False)]
)
def test_a_renamed_release_is_known_by_its_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, width: int, known: bool
) -> None:
    torch.save({"model": tiny_encoder(SQUARE).state_dict()}, tmp_path / "renamed.pth")
    monkeypatch.setattr(
        releases, "_MAE_MD5", {md5(tmp_path / "renamed.pth")[:6]: (kind, width), "000000": ("encoder", 20)}
    )
    assert import_weights(tmp_path / "renamed.pth", OPTIONS).metadata.licence == (
        NON_COMMERCIAL if known else UNKNOWN_LICENCE
    )


def test_the_hash_is_not_computed_where_it_cannot_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashlib, "md5", None)
    torch.save({"model": tiny_encoder(SQUARE).state_dict()}, tmp_path / "mine.pth")
    assert import_weights(tmp_path / "mine.pth", OPTIONS).metadata.licence == UNKNOWN_LICENCE


@pytest.mark.parametrize(
    ("name", "licence"),
    [
        ("mae_vit-base-p16_8xb512-coslr-300e-fp16_in1k_20220829-c2cf66ba.pth", "Apache-2.0"),
        ("vit-huge-p16_ft-32xb8-coslr-50e_in1k-448_20220916-95b6a0ce.pth", "Apache-2.0"),
        ("mae_vit-base-p16_8xb512-coslr-300e-fp16_in1k_20220829-00000000.pth", UNKNOWN_LICENCE),
        ("vit-base-p16_mae_3rdparty_in1k.pth", NON_COMMERCIAL),
        ("mae_vit_base_converted.pth", NON_COMMERCIAL),
        ("vit-base-p16_3rdparty_in1k.pth", UNKNOWN_LICENCE),
        ("epoch_300.pth", UNKNOWN_LICENCE),
    ],
)
def test_openmmlab_by_name(tmp_path: Path, name: str, licence: str) -> None:
    file = write_theirs(tmp_path / name, named_theirs(tiny_encoder(SQUARE).state_dict()))
    assert import_weights(file, OPTIONS).metadata.licence == licence


def test_openmmlab_by_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_theirs(tmp_path / "renamed.pth", named_theirs(tiny_encoder(SQUARE).state_dict()))
    monkeypatch.setattr(releases, "_OPENMMLAB_SHA256", (hashlib.sha256(file.read_bytes()).hexdigest()[:8],))
    assert import_weights(file, OPTIONS).metadata.licence == "Apache-2.0"


@pytest.mark.parametrize(
    ("name", "licence"),
    [
        ("mae_tiny_400e.pth.tar", "Apache-2.0"),
        ("mae_tiny_400e_ft_300e.pth.tar", "Apache-2.0"),
        # Its teacher's licence is not stated.
        ("mae_tiny_distill_400e.pth.tar", f"Apache-2.0 AND {UNKNOWN_LICENCE}"),
        ("last_epoch_ckpt.pth.tar", UNKNOWN_LICENCE),
    ],
)
def test_mae_lite_by_name(tmp_path: Path, name: str, licence: str) -> None:
    torch.save(
        {"start_epoch": 1, "best_top1": 0.0, "model": {f"model.{key}": tensor for key, tensor in lite_mae().items()}},
        tmp_path / name,
    )
    assert import_weights(tmp_path / name, ImportOptions()).metadata.licence == licence


def test_what_a_file_of_ours_says_goes_before_its_name(tmp_path: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in tiny_classifier("avg", SQUARE).state_dict().items()}
    save_file(tensors, tmp_path / "my-vit-mae-base.safetensors", metadata={"format": "pt", "licence": "MIT"})
    assert import_weights(tmp_path / "my-vit-mae-base.safetensors", OPTIONS).metadata.licence == "MIT"
    write_original(tmp_path / "my-vit-mae-base.pth", tensors)
    assert import_weights(tmp_path / "my-vit-mae-base.pth", OPTIONS).metadata.licence == NON_COMMERCIAL
