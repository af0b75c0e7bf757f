"""Runs with other targets: they learn them, say so in the checkpoint, resume, and are drawn where they can be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from mae_deploy.checkpoint import NON_COMMERCIAL, OWN_LICENCE, open_checkpoint, save_checkpoint
from mae_deploy.cli import main
from mae_deploy.config import from_dict
from mae_deploy.data.order import RunSlice
from mae_deploy.data.training_set import open_training
from mae_deploy.data.transforms import NormaliseImages, train_transform
from mae_deploy.errors import ConfigError
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.models.config import DecoderConfig, EncoderConfig, ObjectiveConfig
from mae_deploy.models.mae import MaskedAutoencoder
from mae_deploy.models.masking import Masking, masking_of
from mae_deploy.models.vit import Classifier, Encoder, patchify
from mae_deploy.pretrain import run as pretrain_run
from mae_deploy.pretrain.config import ReconstructConfig
from mae_deploy.pretrain.reconstruct import run_reconstruct
from mae_deploy.pretrain.run import run_pretrain
from mae_deploy.pretrain.targets import TeacherFeatures
from mae_deploy.weights.load import encoder_of, load_model, read_weights, start_from
from tests.models.tiny_models import metadata_of, tiny_encoder
from tests.training.tiny_runs import DECODER, ENCODER, losses_of, optim, pretraining

TEACHER = EncoderConfig(name="teacher", image_size=(8, 8), patch_size=4, embed_dim=20, depth=2, num_heads=5)
"""Another patch, grid and width than the student's: it sees 12x8 pixels, 3x2 patches."""


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    model = tiny_encoder(TEACHER)
    spec = {**metadata_of(model).preprocess, "mean": [0.1, 0.2, 0.3]}
    save_checkpoint(
        tmp_path / "teacher",
        model.state_dict(),
        replace(metadata_of(model), preprocess=spec, licence=NON_COMMERCIAL, provenance={"stage": "else"}),
    )
    return tmp_path / "teacher"


# --- a teacher's features --------------------------------------------------------------------------------------------


def test_features_of_every_patch_at_the_students_grid(teacher: Path) -> None:
    target = TeacherFeatures(read_weights(teacher), ENCODER)
    assert (target.dim, target.licence, target.record["stage"]) == (20, NON_COMMERCIAL, "else")
    images = torch.randn(2, 3, 15, 10, generator=torch.Generator().manual_seed(1))
    features = target(images)
    assert features.shape == (2, 6, 20)
    assert not features.requires_grad
    # The first patch of the teacher's own picture of it, in a plain encoder of that size.
    plain = Encoder(replace(TEACHER, image_size=(12, 8)))
    plain.load_state_dict({**read_weights(teacher).tensors, "pos_embed": target._teacher.pos_embed})
    tokens = plain.embed(F.interpolate(images, size=(12, 8), mode="bicubic", antialias=True, align_corners=False))
    for block in plain.blocks:
        tokens = block(tokens)
    torch.testing.assert_close(
        features, F.layer_norm(tokens[:, 1:], (20,)), rtol=0, atol=1e-5
    )  # attention in another order of sums


def test_a_run_towards_features(
    images: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    objective = ObjectiveConfig(target="features", loss="smooth_l1")
    summary = run_pretrain(
        pretraining(
            images,
            tmp_path / "run",
            teacher=teacher,
            objective=objective,
            optim=optim(epochs=6, lr=2e-2),
            mask_ratio=0.5,
        )
    )
    assert summary["last_loss"] < 0.9 * summary["first_loss"]
    metadata = open_checkpoint(tmp_path / "run").metadata
    assert metadata.licence == NON_COMMERCIAL
    assert metadata.provenance["teacher"]["stage"] == "else"
    assert len(metadata.provenance["teacher"]["sha256"]) == 64
    assert metadata.preprocess["mean"] == [0.1, 0.2, 0.3], "the student is shown what the teacher knows"
    model, _ = load_model(tmp_path / "run")
    assert isinstance(model, MaskedAutoencoder)
    assert (model.objective.target_dim, model.decoder_pred.out_features) == (20, 20)
    # Its encoder is an ordinary one, and what is made of it stays under the teacher's licence.
    assert encoder_of(read_weights(tmp_path / "run")).config == ENCODER
    # There is nothing to draw, which is no reason to fail.
    assert list((tmp_path / "run").glob("*.png")) == []
    arguments = ["reconstruct", str(images), "--checkpoint", str(tmp_path / "run"), "--out", str(tmp_path / "out.png")]
    assert main(arguments) == 2
    assert "predicts a teacher's features, which are not a picture" in capsys.readouterr().err


def test_a_teacher_of_other_channels(images: Path, teacher: Path, tmp_path: Path) -> None:
    grey = replace(ENCODER, in_chans=1)
    with pytest.raises(ConfigError, match="--teacher reads 3 channels in one group, the model 1"):
        run_pretrain(
            pretraining(
                images, tmp_path / "run", teacher=teacher, objective=ObjectiveConfig(target="features"), model=grey
            )
        )
    assert not (tmp_path / "run").exists()


# --- principal components --------------------------------------------------------------------------------------------

PCA: dict[str, Any] = {"objective": ObjectiveConfig(target="pca", target_dim=9), "norm_pix_loss": False}


def test_components_of_the_training_images(images: Path, tmp_path: Path) -> None:
    """Against NumPy's on the same crops."""
    config = pretraining(images, tmp_path / "run", optim=optim(epochs=1, batch_size=11), **PCA)
    run_pretrain(config)
    model, loaded = load_model(tmp_path / "run")
    assert isinstance(model, MaskedAutoencoder)
    assert model.pca is not None
    assert model.decoder_pred.out_features == 9
    assert loaded.metadata.licence == OWN_LICENCE

    spec = from_dict(Preprocess, loaded.metadata.preprocess)
    dataset = open_training(str(images), train_transform(spec, config.augment), config.images, seed=config.seed)
    (batch,) = dataset.stream(RunSlice(11, 1, 0, 1), seed=config.seed, num_workers=0, pin_memory=False)
    patches = patchify(NormaliseImages(spec)(batch.images), 5).flatten(0, 1)
    torch.testing.assert_close(model.pca.mean, patches.mean(dim=0), rtol=0, atol=1e-5)
    centred = patches - patches.mean(dim=0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    # The same subspace: projecting on it changes nothing.
    found = F.normalize(model.pca.components, dim=1)
    torch.testing.assert_close((found @ directions[:9].T).abs(), torch.eye(9), rtol=0, atol=1e-3)


def test_a_killed_run_goes_on_with_its_components(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_pretrain(pretraining(images, tmp_path / "unbroken", **PCA))
    broken = pretraining(images, tmp_path / "run", **PCA)
    batches = 0

    def killed(*arguments: Any, **options: Any) -> Masking:
        nonlocal batches
        batches += 1
        if batches == 4:  # in the second epoch; the first has left a checkpoint
            raise KeyboardInterrupt
        return masking_of(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(pretrain_run, "masking_of", killed)
        with pytest.raises(KeyboardInterrupt):
            run_pretrain(broken)
    monkeypatch.setattr(pretrain_run, "fit_pca", None)  # not again: the checkpoint has them
    run_pretrain(replace(broken, resume=True))
    assert losses_of(tmp_path / "run") == losses_of(tmp_path / "unbroken")


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_components_are_drawn(images: Path, tmp_path: Path, norm_pix_loss: bool) -> None:
    run_pretrain(
        pretraining(images, tmp_path / "run", optim=optim(epochs=1), **{**PCA, "norm_pix_loss": norm_pix_loss})
    )
    assert (tmp_path / "run" / "reconstruction-0001.png").is_file()
    result = run_reconstruct(
        ReconstructConfig(
            images=(images,),
            checkpoint=tmp_path / "run",
            out=tmp_path / "out.png",
            num_images=2,
            mask_ratio=0.5,
            device="cpu",
        )
    )
    assert (result["images"], (tmp_path / "out.png").is_file()) == (2, True)


# --- SimMIM ----------------------------------------------------------------------------------------------------------


def test_mask_tokens_in_the_encoder_and_a_linear_head(images: Path, tmp_path: Path) -> None:
    """Squares of 2x2 patches on 4x4 of them."""
    config = pretraining(
        images,
        tmp_path / "run",
        model=replace(ENCODER, image_size=(20, 20)),
        decoder=replace(DECODER, decoder_depth=0),
        objective=ObjectiveConfig(encoder_mask_tokens=True, loss="l1"),
        mask_ratio=0.6,
        mask_patch_size=10,
        norm_pix_loss=False,
        optim=optim(epochs=1),
    )
    run_pretrain(config)
    model, _ = load_model(tmp_path / "run")
    assert isinstance(model, MaskedAutoencoder)
    assert model.objective == config.objective
    assert (tmp_path / "run" / "reconstruction-0001.png").is_file()
    # Its encoder is an ordinary one, to fine-tune and to export.
    classifier = start_from(Classifier(config.model, num_classes=2, pool="cls"), read_weights(tmp_path / "run"))
    pixels = torch.randn(2, 3, 20, 20, generator=torch.Generator().manual_seed(4))
    expected = encoder_of(read_weights(tmp_path / "run"))(pixels)
    torch.testing.assert_close(classifier.eval().forward_pooled(pixels), expected[:, 0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["block", "grid"])
def test_other_masks(images: Path, tmp_path: Path, kind: str) -> None:
    summary = run_pretrain(
        pretraining(
            images,
            tmp_path / "run",
            model=replace(ENCODER, image_size=(20, 20)),
            mask_sampling=kind,
            optim=optim(epochs=1),
        )
    )
    assert summary["steps"] == 2
    masks: dict[str, Any] = {"mask_sampling": kind, "mask_patch_size": None}
    result = run_reconstruct(
        ReconstructConfig(
            images=(images,), checkpoint=tmp_path / "run", out=tmp_path / "out.png", num_images=1, device="cpu", **masks
        )
    )
    assert result["images"] == 1


def test_every_width_and_depth_of_the_paper_builds() -> None:
    for depth in (1, 2, 4, 8, 12):
        MaskedAutoencoder(ENCODER, DecoderConfig(decoder_depth=depth, decoder_embed_dim=32))
    for width in (128, 256, 512, 768, 1024):
        model = MaskedAutoencoder(ENCODER, DecoderConfig(decoder_depth=1, decoder_embed_dim=width))
        assert model.decoder_pred.in_features == width
