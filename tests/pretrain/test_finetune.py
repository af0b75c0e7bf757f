"""Fine-tuning learns what anybody can tell apart, starts from what it was given, and refuses what does not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from mae_deploy.checkpoint import NON_COMMERCIAL, OWN_LICENCE, open_checkpoint, save_checkpoint
from mae_deploy.cli import main
from mae_deploy.config import to_dict
from mae_deploy.data.sources.open import labelled_images
from mae_deploy.errors import ConfigError
from mae_deploy.models.vit import Classifier
from mae_deploy.pretrain.config import MixConfig
from mae_deploy.pretrain.finetune import ClassificationLoss, run_finetune
from mae_deploy.seeding import seed_everything
from mae_deploy.training.kept_patches import KeptPatches
from mae_deploy.training.state.run_folder import read_metrics
from mae_deploy.training.step import StepBatch
from mae_deploy.weights.load import load_model
from tests.data.image_folders import write_noise
from tests.training.tiny_runs import ENCODER, NO_MIX, finetuning, optim

FROZEN = optim(epochs=1, lr=0.0)
"""A run that leaves the weights as they start: AdamW's decay is scaled by the learning rate too."""


def weights(run_folder: Path) -> dict[str, Tensor]:
    return load_file(run_folder / "checkpoints" / "last" / "model.safetensors")


# --- learning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["avg", "cls"])
def test_dark_and_light_are_told_apart(classes: Path, pretrained: Path, tmp_path: Path, pool: str) -> None:
    config = finetuning(classes, tmp_path / "run", pretrained, pool=pool, optim=optim(epochs=8, lr=2e-2, batch_size=6))
    summary = run_finetune(config)
    assert summary["top1"] == summary["best_top1"] == 100.0
    assert summary["last_loss"] < 0.5 * summary["first_loss"]
    assert summary["first_loss"] == pytest.approx(0.693, abs=0.01)  # ln 2, from a head of weights of 2e-5

    checkpoint = open_checkpoint(tmp_path / "run")
    metadata = checkpoint.metadata
    assert (metadata.kind, metadata.pool, metadata.num_classes, metadata.class_names) == (
        "classifier",
        pool,
        2,
        ("dark", "light"),
    )
    assert metadata.encoder == to_dict(ENCODER)
    tensors = checkpoint.tensors()
    assert tensors["head.weight"].shape == (2, 12)
    assert ("fc_norm.weight" in tensors, "norm.weight" in tensors) == (pool == "avg", pool == "cls")
    # The position embeddings are trained here.
    assert not torch.equal(tensors["pos_embed"], weights(pretrained)["pos_embed"])
    model, _ = load_model(tmp_path / "run")
    assert isinstance(model, Classifier)


def test_best_is_the_first_of_the_highest_and_last_the_last(classes: Path, pretrained: Path, tmp_path: Path) -> None:
    run_finetune(finetuning(classes, tmp_path / "run", pretrained, optim=optim(epochs=6, lr=2e-2, batch_size=6)))
    evaluations = read_metrics(tmp_path / "run", "eval.jsonl")
    assert [(line["step"], line["epoch"]) for line in evaluations] == [(2 * epoch, epoch) for epoch in range(1, 7)]
    assert all(set(line) == {"step", "epoch", "top1", "top5", "val_loss"} for line in evaluations)
    highest = max(evaluations, key=lambda line: line["top1"])  # the first of them
    best, last = (open_checkpoint(tmp_path / "run" / "checkpoints" / name).metadata for name in ("best", "last"))
    assert (best.step, best.metrics) == (highest["step"], {"top1": highest["top1"]})
    assert (last.step, last.metrics) == (12, {"top1": evaluations[-1]["top1"]})
    assert open_checkpoint(tmp_path / "run").metadata.step == best.step


def test_metrics_have_the_documented_keys(classes: Path, pretrained: Path, tmp_path: Path) -> None:
    run_finetune(finetuning(classes, tmp_path / "run", pretrained))
    keys = ("step", "epoch", "loss", "grad_norm", "lr", "skipped", "images_per_second", "data_wait")
    assert {tuple(line) for line in read_metrics(tmp_path / "run")} == {keys}


# --- where it starts -------------------------------------------------------------------------------------------------


def test_it_starts_from_the_pretrained_encoder_with_a_fresh_norm_and_head(
    classes: Path, pretrained: Path, tmp_path: Path
) -> None:
    run_finetune(finetuning(classes, tmp_path / "run", pretrained, optim=FROZEN))
    found, expected = weights(tmp_path / "run"), weights(pretrained)
    shared = {name for name in expected if name.startswith(("cls_token", "pos_embed", "patch_embed", "blocks."))}
    assert set(found) == shared | {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    assert [name for name in shared if not torch.equal(found[name], expected[name])] == []
    assert torch.equal(found["fc_norm.weight"], torch.ones(12))
    assert torch.equal(found["head.bias"], torch.zeros(2))


def test_pool_cls_keeps_the_pretrained_norm(classes: Path, pretrained: Path, tmp_path: Path) -> None:
    # An untrained norm would be all ones, so it is told apart by training it.
    assert not torch.equal(weights(pretrained)["norm.weight"], torch.ones(12))
    run_finetune(finetuning(classes, tmp_path / "run", pretrained, optim=FROZEN, pool="cls"))
    assert torch.equal(weights(tmp_path / "run")["norm.weight"], weights(pretrained)["norm.weight"])


def test_from_scratch_is_the_same_network_with_other_weights(classes: Path, pretrained: Path, tmp_path: Path) -> None:
    run_finetune(finetuning(classes, tmp_path / "init", pretrained, optim=FROZEN))
    run_finetune(finetuning(classes, tmp_path / "scratch", pretrained, optim=FROZEN, from_scratch=True))
    found, other = weights(tmp_path / "scratch"), weights(tmp_path / "init")
    assert {name: tensor.shape for name, tensor in found.items()} == {
        name: tensor.shape for name, tensor in other.items()
    }
    assert not torch.equal(found["blocks.0.attn.qkv.weight"], other["blocks.0.attn.qkv.weight"])
    # The position table is a formula, and the head is drawn from the same seed.
    assert torch.equal(found["pos_embed"], other["pos_embed"])
    assert torch.equal(found["head.weight"], other["head.weight"])


def test_from_scratch_without_init(classes: Path, tmp_path: Path) -> None:
    run_finetune(
        finetuning(
            classes,
            tmp_path / "run",
            None,
            from_scratch=True,
            model="vit_nano_patch4",
            image_size=(8, 12),
            in_chans=1,
            optim=FROZEN,
        )
    )
    metadata = open_checkpoint(tmp_path / "run").metadata
    assert (metadata.encoder["name"], metadata.encoder["image_size"], metadata.encoder["in_chans"]) == (
        "vit_nano_patch4",
        [8, 12],
        1,
    )
    assert (metadata.licence, metadata.provenance["parent"]) == (OWN_LICENCE, None)


def test_another_image_size_interpolates_the_position_embeddings(
    classes: Path, pretrained: Path, tmp_path: Path
) -> None:
    run_finetune(finetuning(classes, tmp_path / "run", pretrained, optim=FROZEN, image_size=(10, 20)))
    table = weights(pretrained)["pos_embed"]
    patches = table[0, 1:].reshape(3, 2, 12)
    columns = [
        F.interpolate(patches[None, None, :, :, channel], size=(2, 4), mode="bicubic", align_corners=False)[0, 0]
        for channel in range(12)
    ]
    expected = torch.cat([table[0, :1], torch.stack(columns, dim=-1).reshape(8, 12)])
    assert torch.equal(weights(tmp_path / "run")["pos_embed"][0], expected)
    metadata = open_checkpoint(tmp_path / "run").metadata
    assert metadata.encoder["image_size"] == metadata.preprocess["image_size"] == [10, 20]


def test_preprocessing_comes_from_the_checkpoint(classes: Path, pretrained: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(pretrained)
    changed = replace(
        checkpoint.metadata, preprocess={**checkpoint.metadata.preprocess, "mean": [0.1, 0.2, 0.3], "crop_pct": 1.0}
    )
    save_checkpoint(tmp_path / "init", checkpoint.tensors(), changed)
    run_finetune(finetuning(classes, tmp_path / "run", tmp_path / "init", optim=FROZEN))
    found = open_checkpoint(tmp_path / "run").metadata.preprocess
    assert (found["mean"], found["crop_pct"]) == ([0.1, 0.2, 0.3], 1.0)


def test_licence_and_record_of_the_parent(classes: Path, pretrained: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(pretrained)
    save_checkpoint(tmp_path / "init", checkpoint.tensors(), replace(checkpoint.metadata, licence=NON_COMMERCIAL))
    run_finetune(finetuning(classes, tmp_path / "run", tmp_path / "init", optim=FROZEN))
    metadata = open_checkpoint(tmp_path / "run").metadata
    assert metadata.licence == NON_COMMERCIAL
    assert metadata.provenance["parent"]["stage"] == "pretrain"
    assert len(metadata.provenance["parent"]["sha256"]) == 64
    assert metadata.provenance["data"] == {
        split: labelled_images(classes, split).fingerprint() for split in ("train", "val")
    }
    # From scratch, nothing of those weights is left.
    run_finetune(finetuning(classes, tmp_path / "scratch", tmp_path / "init", optim=FROZEN, from_scratch=True))
    assert open_checkpoint(tmp_path / "scratch").metadata.licence == OWN_LICENCE


# --- the loss --------------------------------------------------------------------------------------------------------


class Constant(nn.Module):
    """Logits (ln 3, 0) for every image, and a note of how many there were."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        """`(B, C, H, W) -> (B, 2)`."""
        self.seen.append(len(images))
        return torch.tensor([[3.0, 1.0]]).log().expand(len(images), 2)


def test_cross_entropy_by_hand() -> None:
    """Softmax 3/4 and 1/4: -ln 3/4 = 0.287682 and -ln 1/4 = 1.386294; smoothing by 0.2 mixes them 9 to 1."""
    images, labels = torch.zeros(2, 3, 4, 5), torch.tensor([0, 1])
    # 1e-6 of float32.
    assert float(ClassificationLoss(NO_MIX, 2)(Constant(), StepBatch(images, labels))["loss"]) == pytest.approx(
        (0.287682 + 1.386294) / 2, rel=1e-6
    )
    smoothed = ClassificationLoss(replace(NO_MIX, label_smoothing=0.2), 2)
    assert float(smoothed(Constant(), StepBatch(images[:1], labels[:1]))["loss"]) == pytest.approx(
        0.9 * 0.287682 + 0.1 * 1.386294, rel=1e-6
    )


@pytest.mark.parametrize(("count", "seen"), [(1, 1), (2, 2), (5, 6), (6, 6)])
def test_mixup_takes_odd_batches(count: int, seen: int) -> None:
    seed_everything(0)
    model = Constant()
    loss = ClassificationLoss(MixConfig(), 2)(model, StepBatch(torch.rand(count, 3, 16, 16), torch.arange(count) % 2))[
        "loss"
    ]
    assert model.seen == [seen]
    # Any mixture of the two labels lies between their losses.
    assert 0.287 < float(loss) < 1.387


def test_mixup_mixes_images_and_labels() -> None:
    """Both images become the same mixture of 0 and 1, and the loss the mixture of theirs."""
    seen: list[Tensor] = []

    class Looking(Constant):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(images)
            return super().forward(images)

    seed_everything(0)
    images = torch.stack([torch.zeros(3, 4, 5), torch.ones(3, 4, 5)])
    loss = ClassificationLoss(replace(NO_MIX, mixup=0.8), 2)(Looking(), StepBatch(images, torch.tensor([0, 1])))["loss"]
    first, second = (float(image.unique().squeeze()) for image in seen[0])
    assert 0 < first < 1
    assert first + second == pytest.approx(1)
    assert float(loss) == pytest.approx(
        (0.287682 + 1.386294) / 2, rel=1e-5
    )  # the second image's mixture undoes the first's


def test_erasing() -> None:
    seen: list[Tensor] = []

    class Looking(Constant):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(images.clone())
            return super().forward(images)

    seed_everything(0)
    ClassificationLoss(replace(NO_MIX, reprob=0.99), 2)(
        Looking(), StepBatch(torch.zeros(7, 3, 16, 16), torch.zeros(7, dtype=torch.int64))
    )
    share = (seen[0] != 0).float().mean()
    assert 0.02 < float(share) < 0.34  # timm erases between 2 % and a third of an image


@pytest.mark.parametrize("mix", [NO_MIX, MixConfig(reprob=0.0)])
def test_a_step_sees_as_many_patches_as_it_draws(mix: MixConfig) -> None:
    seen: list[Tensor | None] = []

    class Looking(Constant):
        def forward(self, images: Tensor, ids_keep: Tensor | None = None) -> Tensor:
            seen.append(ids_keep)
            return super().forward(images)

    kept = KeptPatches(5, (0.2, 1.0))
    loss, counts = ClassificationLoss(mix, 2, kept), []
    for step in range(12):
        loss(Looking(), StepBatch(torch.zeros(3, 3, 16, 16), torch.zeros(3, dtype=torch.int64), step=step))
        counts.append(kept.count(0, step))
    assert [5 if ids is None else ids.shape[1] for ids in seen] == counts
    assert set(counts) == {1, 2, 3, 4, 5}
    odd = 3 if mix == NO_MIX else 4  # the odd image is mixed with the first, and seen by the first's patches
    assert all(ids is None or len(ids) == odd for ids in seen)


def test_a_run_on_any_number_of_patches(classes: Path, pretrained: Path, tmp_path: Path) -> None:
    """Six patches: of all and of one, in the same steps; the lowest share is validated too."""
    summary = run_finetune(finetuning(classes, tmp_path / "run", pretrained, keep_ratio=(0.1, 1.0)))
    assert summary["steps"] == 4
    assert {"top1", "top1_of_1"} <= set(summary)
    fixed = run_finetune(finetuning(classes, tmp_path / "fixed", pretrained, keep_ratio=(0.5, 0.5)))
    assert fixed["last_loss"] != summary["last_loss"]
    assert not [name for name in fixed if name.startswith("top1_of")]


def test_shares_of_the_patches_in_order(classes: Path, tmp_path: Path) -> None:
    for low, high in ((0.5, 0.2), (0.0, 1.0), (0.5, 1.2)):
        with pytest.raises(ConfigError, match=f"--keep-ratio {low:g},{high:g} is not LOW,HIGH"):
            finetuning(
                classes, tmp_path / "run", None, from_scratch=True, model="vit_nano_patch4", keep_ratio=(low, high)
            )


def test_a_whole_recipe_on_an_odd_batch(classes: Path, pretrained: Path, tmp_path: Path) -> None:
    summary = run_finetune(
        finetuning(classes, tmp_path / "run", pretrained, mix=MixConfig(), optim=optim(batch_size=5))
    )
    assert summary["steps"] == 4
    assert 0 < summary["last_loss"] < 2


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"patch_size": 4}, "--init has patch_size 5, not 4"),
        ({"in_chans": 1}, "--init has in_chans 3, not 1"),
        ({"model": "vit_nano_patch4"}, "--init has name tiny, not vit_nano_patch4"),
        ({"image_size": (12, 10)}, "not a multiple of the patch size, 5"),
        ({"mix": replace(NO_MIX, auto_augment="foo")}, "--auto-augment foo"),
    ],
)
def test_what_init_does_not_allow(
    classes: Path, pretrained: Path, tmp_path: Path, asked: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run_finetune(finetuning(classes, tmp_path / "run", pretrained, **asked))
    # Nothing is left that would have to be removed before the next try.
    assert not (tmp_path / "run").exists()


def test_data_without_classes(
    pretrained: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["finetune", str(images), "--init", str(pretrained), "--out", str(tmp_path / "run")]) == 2
    error, hint = capsys.readouterr().err.splitlines()
    assert error.startswith(f"error: no train in {images}, where there is: 00.png, 01.png")
    assert hint.startswith("hint: labelled data is DATA/train/<class>/… and DATA/val/<class>/…")


def test_a_validation_class_that_training_lacks(classes: Path, pretrained: Path, tmp_path: Path) -> None:
    write_noise(classes / "val" / "grey", 1)
    with pytest.raises(ConfigError, match="grey is not one of the 2 classes"):
        run_finetune(finetuning(classes, tmp_path / "run", pretrained))


def test_neither_init_nor_scratch(classes: Path, tmp_path: Path) -> None:
    for more in ({}, {"from_scratch": True}, {"model": "vit_nano_patch4"}):
        with pytest.raises(ConfigError, match="--init is missing"):
            finetuning(classes, tmp_path / "run", None, **more)
