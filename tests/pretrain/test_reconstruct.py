"""The picture grid: its size, what is original in it to the pixel, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mae_deploy.checkpoint import save_checkpoint
from mae_deploy.cli import main
from mae_deploy.errors import CheckFailed, ConfigError
from mae_deploy.images.preprocess import default_preprocess
from mae_deploy.images.read import Array, read_image
from mae_deploy.models.masking import random_masking
from mae_deploy.pretrain.config import ReconstructConfig
from mae_deploy.pretrain.reconstruct import draw_reconstructions, run_reconstruct
from tests.data.image_folders import spoil, write_noise
from tests.models.tiny_models import metadata_of, tiny_classifier, tiny_mae

# The tiny autoencoder of tests/models: images of 6x10, 3x5 patches of 2x2 pixels.
H, W, P, GAP = 6, 10, 2, 4
FACTOR = 16
"""6 pixels are enlarged to at least 96."""


@pytest.fixture(autouse=True)
def checkpoint(tmp_path: Path) -> None:
    model = tiny_mae()
    save_checkpoint(tmp_path / "checkpoint", model.state_dict(), metadata_of(model))


def settings(tmp_path: Path, images: Path, **more: Any) -> ReconstructConfig:
    return ReconstructConfig(
        images=(images,), checkpoint=tmp_path / "checkpoint", out=tmp_path / "out.png", device="cpu", **more
    )


def cells(path: Path) -> Array:
    """The picture's cells at their own size: `(rows, 3, H, W, C)`."""
    with Image.open(path) as picture:
        pixels = np.asarray(picture)
    height, width = H * FACTOR, W * FACTOR
    rows = (pixels.shape[0] + GAP) // (height + GAP)
    assert pixels.shape[:2] == (rows * (height + GAP) - GAP, 3 * (width + GAP) - GAP)
    grid = [[pixels[r * (height + GAP) :, c * (width + GAP) :][:height, :width] for c in range(3)] for r in range(rows)]
    found = np.stack([np.stack(row) for row in grid])
    small = found[:, :, ::FACTOR, ::FACTOR]
    np.testing.assert_array_equal(
        small.repeat(FACTOR, axis=2).repeat(FACTOR, axis=3), found
    )  # enlarged by whole pixels
    assert (pixels[height : height + GAP] == 255).all()
    return small


def test_weights_that_give_no_numbers(tmp_path: Path) -> None:
    model = tiny_mae()
    with torch.no_grad():
        model.decoder_pred.bias[0] = 3e38  # a difference of infinities
    save_checkpoint(tmp_path / "damaged", model.state_dict(), metadata_of(model))
    write_noise(tmp_path / "images", 2)
    config = replace(settings(tmp_path, tmp_path / "images"), checkpoint=tmp_path / "damaged")
    with pytest.raises(CheckFailed, match="predicts no numbers, its loss is nan"):
        run_reconstruct(config)
    assert not config.out.exists()


def hidden_pixels(count: int, *, ratio: float = 0.75, seed: int = 0) -> Array:
    """`(count, H, W)` of True where the patch is masked."""
    noise = torch.rand(count, 15, generator=torch.Generator().manual_seed(seed))
    mask = random_masking(noise, ratio).mask.bool().numpy().reshape(count, H // P, W // P)
    return mask.repeat(P, axis=1).repeat(P, axis=2)


def test_original_masked_and_reconstructed(images: Path, tmp_path: Path) -> None:
    result = run_reconstruct(settings(tmp_path, images, num_images=3))
    assert {key: result[key] for key in ("out", "images", "skipped")} == {
        "out": str(tmp_path / "out.png"),
        "images": 3,
        "skipped": [],
    }
    original, masked, reconstructed = cells(tmp_path / "out.png").swapaxes(0, 1)
    spec = default_preprocess((H, W))
    expected = np.stack([spec.crop(read_image(images / f"{number:02d}.png")) for number in range(3)])
    np.testing.assert_array_equal(original, expected)
    hidden = hidden_pixels(3)
    assert 0.7 < hidden.mean() < 0.9
    np.testing.assert_array_equal(masked[~hidden], expected[~hidden])
    np.testing.assert_array_equal(reconstructed[~hidden], expected[~hidden])
    # Grey is the mean of ImageNet: 0.485, 0.456 and 0.406 of 255.
    assert {tuple(pixel) for pixel in masked[hidden].tolist()} == {(124, 116, 104)}
    assert (reconstructed[hidden] != expected[hidden]).mean() > 0.9


def test_the_prediction_itself_where_asked(images: Path, tmp_path: Path) -> None:
    run_reconstruct(settings(tmp_path, images, num_images=2, paste_visible=False))
    original, masked, reconstructed = cells(tmp_path / "out.png").swapaxes(0, 1)
    hidden = hidden_pixels(2)
    np.testing.assert_array_equal(masked[~hidden], original[~hidden])
    assert (reconstructed[~hidden] != original[~hidden]).mean() > 0.9


def test_a_perfect_decoder_gives_the_original_back(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its prediction, in units of each patch's own deviation, is taken back to pixels."""
    spec = default_preprocess((H, W))
    pictures = [read_image(images / "00.png"), read_image(images / "01.png")]
    for norm_pix_loss in (True, False):
        model = tiny_mae(norm_pix_loss=norm_pix_loss)
        target = model.target(torch.from_numpy(spec(pictures)))
        monkeypatch.setattr(model, "forward_decoder", lambda *_, target=target: target)
        loss = draw_reconstructions(model, pictures, spec, tmp_path / "out.png", mask_ratio=0.5, seed=0)
        original, _, reconstructed = cells(tmp_path / "out.png").swapaxes(0, 1)
        np.testing.assert_array_equal(reconstructed, original)
        assert loss == 0


def test_loss_and_masks_follow_the_seed(images: Path, tmp_path: Path) -> None:
    losses = []
    for seed in (0, 0, 1):
        losses.append(run_reconstruct(settings(tmp_path, images, num_images=2, seed=seed))["loss"])
        (tmp_path / "out.png").unlink()
    assert losses[0] == losses[1] != losses[2]


def test_a_picture_is_not_overwritten(images: Path, tmp_path: Path) -> None:
    (tmp_path / "out.png").write_text("kept")
    with pytest.raises(ConfigError, match=r"--out .*out\.png already exists"):
        run_reconstruct(settings(tmp_path, images))
    assert (tmp_path / "out.png").read_text() == "kept"


def test_one_image_and_another_ratio(images: Path, tmp_path: Path) -> None:
    run_reconstruct(settings(tmp_path, images / "05.png", mask_ratio=0.2))
    original, masked, _ = cells(tmp_path / "out.png").swapaxes(0, 1)
    hidden = hidden_pixels(1, ratio=0.2)
    assert hidden.sum() == 3 * P * P  # int(15 · 0.8) of 15 patches are kept
    assert ((masked != original).any(axis=3) == hidden).all()


def test_unreadable_images_are_skipped(images: Path, tmp_path: Path) -> None:
    spoil(images / "00.png")
    result = run_reconstruct(settings(tmp_path, images, num_images=2))
    assert result["images"] == 2
    assert [line.partition(":")[0] for line in result["skipped"]] == [str(images / "00.png")]
    spec = default_preprocess((H, W))
    np.testing.assert_array_equal(cells(tmp_path / "out.png")[0, 0], spec.crop(read_image(images / "01.png")))


def test_a_model_in_training_stays_in_training(images: Path, tmp_path: Path) -> None:
    model = tiny_mae().train()
    draw_reconstructions(
        model, [read_image(images / "00.png")], default_preprocess((H, W)), tmp_path / "out.png", mask_ratio=0.5, seed=0
    )
    assert model.training


def test_without_a_decoder_exit_code_2(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_classifier("avg")
    save_checkpoint(tmp_path / "classifier", model.state_dict(), metadata_of(model))
    arguments = [
        "reconstruct",
        str(images),
        "--checkpoint",
        str(tmp_path / "classifier"),
        "--out",
        str(tmp_path / "out.png"),
    ]
    assert main(arguments) == 2
    assert "is a classifier without a decoder" in capsys.readouterr().err
    assert not (tmp_path / "out.png").exists()


def test_what_cannot_be_drawn(images: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--mask-ratio 0\.99 of 15 patches"):
        run_reconstruct(settings(tmp_path, images, mask_ratio=0.99))
    with pytest.raises(ConfigError, match=r"must end in \.png"):
        replace(settings(tmp_path, images), out=tmp_path / "out.jpg")
    with pytest.raises(ConfigError, match="--num-images"):
        replace(settings(tmp_path, images), num_images=0)
    for path in images.iterdir():
        spoil(path)
    with pytest.raises(ConfigError, match="no readable image in"):
        run_reconstruct(settings(tmp_path, images))
