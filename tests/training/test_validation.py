"""Accuracy by hand, on every readable validation image once."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mae_deploy.data.sources.files import ImageList, labelled_files
from mae_deploy.data.transforms import eval_transform
from mae_deploy.errors import CheckFailed
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.training.kept_patches import KeptPatches
from mae_deploy.training.loop import make_accelerator
from mae_deploy.training.validation import Evaluator
from tests.data.image_folders import spoil, write_noise

SPEC = Preprocess(image_size=(17, 13), crop_pct=1.0, mean=(0.0,) * 3, std=(1.0,) * 3)


class ByBrightness(nn.Module):
    """Seven classes, the logit of class k being ln(8 - k) for dark images and of class k + 5 (mod 7) for light ones."""

    def forward(self, images: Tensor) -> Tensor:
        """`(B, C, H, W) -> (B, 7)`."""
        assert not self.training
        assert images.shape[1:] == (3, 17, 13)
        ranked = torch.arange(8.0, 1.0, -1).log()
        light = images.mean(dim=(1, 2, 3)) > 0.5
        return torch.where(light.unsqueeze(1), ranked.roll(5), ranked)


@pytest.fixture
def accelerator(tmp_path: Path) -> Accelerator:
    return make_accelerator("cpu", "fp32", tmp_path)


@pytest.fixture
def images(tmp_path: Path) -> ImageList:
    """Classes 0, 1 and 6: two dark images and a light one, three dark, two light."""
    for name, dark, light in (("a", 2, 1), ("b", 3, 0), ("g", 0, 2)):
        write_noise(tmp_path / "val" / name, dark, high=100)
        write_noise(tmp_path / "val" / name, light, first=dark, low=200)
    return labelled_files(tmp_path / "val", tuple("abcdefg"))


def evaluator(images: ImageList) -> Evaluator:
    return Evaluator(images, eval_transform(SPEC), SPEC, batch_size=3, num_workers=0)


def test_accuracy_and_loss_by_hand(accelerator: Accelerator, images: ImageList) -> None:
    """From the first: classes 0 1 2 3 4 5 6 for a dark image, 2 3 4 5 6 0 1 rolled to 5 6 0 1 2 3 4 for a light one.
    First right: the two dark a.
    """
    model = ByBrightness().train()
    found = evaluator(images)(accelerator, model)
    assert model.training
    total = math.log(8 + 7 + 6 + 5 + 4 + 3 + 2)
    # Two of rank 0, then light a at rank 2, three dark b at rank 1, two light g at rank 1.
    logits = [math.log(8)] * 2 + [math.log(6)] + [math.log(7)] * 3 + [math.log(7)] * 2
    assert found["top1"] == 25.0
    assert found["top5"] == 100.0
    assert found["val_loss"] == pytest.approx(
        sum(total - logit for logit in logits) / 8, rel=1e-6
    )  # float32 beside float64


def test_logits_that_are_no_numbers_are_no_accuracy(
    accelerator: Accelerator, images: ImageList, capsys: pytest.CaptureFixture[str]
) -> None:
    """One class of one batch is enough: where the highest logit stands among NaN says nothing."""

    class OneBad(ByBrightness):
        def forward(self, images: Tensor) -> Tensor:
            logits = super().forward(images).clone()
            logits[0, 3] = torch.inf
            return logits

    found = evaluator(images)(accelerator, OneBad())
    assert all(math.isnan(found[name]) for name in ("top1", "top5", "val_loss"))
    assert "logits of 3 of 8 images are NaN or infinite" in capsys.readouterr().err  # the first of each batch


def test_labels_beyond_the_first_five_do_not_count(accelerator: Accelerator, images: ImageList) -> None:
    moved = ImageList(images.root, images.paths, (5, 4, 0, 1, 1, 6, 4, 3), images.class_names)
    # Ranks: dark 5, dark 4, light 2, dark 1, dark 1, dark 6, light 6, light 5.
    found = evaluator(moved)(accelerator, ByBrightness())
    assert (found["top1"], found["top5"]) == (0.0, 50.0)


def test_unreadable_images_are_left_out_and_named_once(
    accelerator: Accelerator, images: ImageList, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(images.paths[0])
    spoil(images.paths[7])
    evaluate = evaluator(images)
    assert evaluate(accelerator, ByBrightness())["top1"] == pytest.approx(100 / 6)
    evaluate(accelerator, ByBrightness())
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("left out of the validation ")]
    assert len(said) == 2
    assert str(images.paths[0]) in said[0]


class ByPatches(ByBrightness):
    """As above with the whole image; with some patches, every image is of the class that is their number, if two images
    do not see the same.
    """

    seen: dict[int, list[list[int]]]

    def forward(self, images: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """`(B, C, H, W), (B, K) -> (B, 7)`."""
        if ids_keep is None:
            return super().forward(images)
        self.seen.setdefault(ids_keep.shape[1], []).extend(ids_keep.tolist())
        return torch.eye(7)[ids_keep.shape[1]].expand(len(images), 7)


def test_the_most_and_the_fewest_patches(accelerator: Accelerator, images: ImageList) -> None:
    """Three images are of class 0, three of class 1, two of class 6: with one patch of six, class 1 is right three
    times, with all those by brightness.
    """
    model = ByPatches()
    model.seen = {}

    def found(keep_ratio: tuple[float, float], *, batch_size: int = 3) -> dict[str, float]:
        kept = KeptPatches(6, keep_ratio)
        return Evaluator(images, eval_transform(SPEC), SPEC, batch_size=batch_size, num_workers=0, kept=kept)(
            accelerator, model
        )

    elastic = found((0.1, 1.0))
    assert (elastic["top1"], elastic["top1_of_1"]) == (25.0, 37.5)
    assert elastic["val_loss"] == evaluator(images)(accelerator, ByBrightness())["val_loss"]
    fixed = found((0.2, 0.2))
    assert fixed["top1"] == 37.5
    assert set(fixed) == {"top1", "top5", "val_loss"}
    assert len(model.seen[1]) == 16
    model.seen = {}
    found((0.5, 0.5))
    first = model.seen.pop(3)
    found((0.5, 0.5), batch_size=5)
    assert model.seen[3] == first  # always the same patches of an image
    assert len({tuple(sorted(row)) for row in first}) > 1


def test_nothing_to_evaluate(accelerator: Accelerator, images: ImageList) -> None:
    for path in images.paths:
        spoil(path)
    with pytest.raises(CheckFailed, match="no readable validation image below"):
        evaluator(images)(accelerator, ByBrightness())
