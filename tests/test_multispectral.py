"""The whole chain on five bands of 16 bits in three groups: TIFF and NumPy files to a bundle that runs without
PyTorch.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mae_deploy.cli import main
from mae_deploy.errors import ConfigError
from mae_deploy.images.find import find_images
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.runtime import Backbone
from mae_deploy.runtime.flops import flops_per_image
from mae_deploy.serving.deepstream import check_feeding
from tests.data.band_files import BANDS, PIXEL_MAX, bands_image, write_band_classes, write_npy, write_scenes

Command = Callable[..., dict[str, Any]]

# 3x2 patches of 5x5 pixels in three groups: 18 tokens.
RECIPE = """
model:
  {name: tiny, image_size: [15, 10], patch_size: 5, in_chans: 5, band_groups: [[0, 3], [4], [1, 2]],
   embed_dim: 12, depth: 2, num_heads: 3}
decoder: {decoder_depth: 1, decoder_embed_dim: 8, decoder_num_heads: 2}
optim: {batch_size: 5, lr: 1.0e-3, warmup_epochs: 0.5}
images: {pixel_max: 10000, mean: [0.4, 0.45, 0.5, 0.55, 0.6], std: [0.2, 0.25, 0.3, 0.35, 0.4]}
"""
TRAINING = ("--num-workers", 0, "--device", "cpu", "--seed", 3)
PLAIN = ("--drop-path", 0, "--label-smoothing", 0, "--mixup", 0, "--cutmix", 0, "--reprob", 0, "--auto-augment", "none")


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command that must succeed, in a folder with `scenes` and `labelled`; returns its JSON."""
    monkeypatch.chdir(tmp_path)
    write_scenes(Path("scenes"), 11)
    write_band_classes(Path("labelled"))
    Path("bands.yaml").write_text(RECIPE)

    def run(*arguments: object) -> dict[str, Any]:
        assert main([*map(str, arguments), "--json"]) == 0, capsys.readouterr().err
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    return run


def test_the_chain(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    pretrained = command(
        "pretrain",
        "scenes",
        "--out",
        "runs/mae",
        "--recipe",
        "bands.yaml",
        "--epochs",
        2,
        "--picture-bands",
        "3,2,1",
        *TRAINING,
    )
    assert (pretrained["steps"], pretrained["unreadable"]) == (4, 0)
    with Image.open("runs/mae/reconstruction-0002.png") as picture:
        assert (picture.mode, picture.width) == ("RGB", 3 * 104 - 4)
        assert len(np.unique(np.asarray(picture)[:100, :100])) > 20, "stretched, not black"
    same = ("--group-masking", "consistent", "--picture-bands", 4, "--num-images", 2, "--device", "cpu")
    assert command("reconstruct", "scenes", "--checkpoint", "runs/mae", "--out", "grid.png", *same)["images"] == 2
    with Image.open("grid.png") as picture:
        assert picture.mode == "L"

    tuned = command(
        "finetune",
        "labelled",
        "--init",
        "runs/mae",
        "--out",
        "runs/classifier",
        "--epochs",
        8,
        "--batch-size",
        6,
        "--lr",
        2e-2,
        *PLAIN,
        *TRAINING,
    )
    assert tuned["top1"] == 100, "dark and light are easily told apart"

    command(
        "export", "runs/mae", "--out", "bundles/visible", "--tokens", "visible", "--outputs", "cls,tokens,feature_map"
    )
    command("export", "runs/classifier", "--out", "bundles/classifier", "--samples", "labelled", "--num-samples", 8)
    shutil.rmtree("runs")
    manifest = json.loads(Path("bundles/visible/manifest.json").read_text())
    assert manifest["model"]["band_groups"] == [[0, 3], [4], [1, 2]]
    assert (manifest["num_patches"], manifest["profile"]["K"]) == (18, [1, 4, 18])
    assert manifest["preprocess"]["pixel_max"] == PIXEL_MAX
    for bundle in ("bundles/visible", "bundles/classifier"):
        assert command("verify", bundle)["passed"]

    outputs = ("--outputs", "cls,tokens,feature_map")
    command("predict", "bundles/visible", "scenes", "--num-keep", 7, "--out", "features.npz", *outputs)
    with np.load("features.npz") as features:
        assert {name: features[name].shape for name in ("cls", "tokens", "feature_map")} == {
            "cls": (11, 12),
            "tokens": (11, 7, 12),
            "feature_map": (11, 12, 3, 2),
        }
    check_backbone()
    assert main(["info", "bundles/visible"]) == 0
    assert "0,3;4;1,2" in capsys.readouterr().out.replace("\n", "").replace(" ", "")


def check_backbone() -> None:
    """Arrays from memory give what the files give; every form of them the same."""
    with Backbone.load("bundles/classifier") as backbone:
        paths = find_images(Path("labelled/val"))
        images = [np.load(path) for path in paths]
        logits = backbone(images).logits
        assert (logits.argmax(1) == [0, 0, 0, 1, 1, 1]).all()
        np.testing.assert_array_equal(backbone(np.stack(images)).logits, logits)
        np.testing.assert_array_equal(backbone([image.astype(np.float32) for image in images]).logits, logits)
        np.testing.assert_array_equal(backbone(images[0]).logits, backbone(images[:1]).logits)
        np.testing.assert_array_equal(backbone(images[0].astype(np.float32)).logits, backbone(images[:1]).logits)
        np.testing.assert_array_equal(backbone(backbone.preprocess(images)).logits, logits)
        for wrong in (images[0][:, :, :3], images[0][:, :, :1], np.full((20, 20, BANDS), np.nan)):
            with pytest.raises(ConfigError, match=r"image 0 cannot be decoded: (the image has|pixels are NaN)"):
                backbone([wrong])
        with pytest.raises(ConfigError, match=r"float32 images have the shape \(6, 17, 13, 5\)"):
            backbone(np.stack(images).astype(np.float32))
        full, few = flops_per_image(backbone.bundle.manifest, 18), flops_per_image(backbone.bundle.manifest, 4)
        assert full is not None
        assert few is not None
        assert full > few


def test_unreadable_scenes_are_named_and_left_out(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    np.save("broken.npy", bands_image(0)[:, :, :3])
    Path("broken.npy").rename("scenes/03.tif")
    write_npy(Path("arrays/0.npy"), np.full((9, 9, BANDS), np.nan))
    write_npy(Path("arrays/1.npy"), bands_image(1))
    assert (
        command("pretrain", "scenes", "--out", "runs/mae", "--recipe", "bands.yaml", "--epochs", 1, *TRAINING)[
            "unreadable"
        ]
        == 1
    )
    command("export", "runs/mae", "--out", "bundle")
    (unreadable,) = command("predict", "bundle", "arrays")["unreadable"]
    assert unreadable["path"] == "arrays/0.npy"
    assert unreadable["reason"].startswith("pixels are NaN or infinite")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--picture-bands", "3,2"), "--picture-bands 3,2 is not one or three of the channels 0 to 4"),
        (("--picture-bands", "3,2,5"), "--picture-bands 3,2,5 is not one or three of the channels 0 to 4"),
        (("--pixel-max", 0), "--pixel-max must be above 0, got 0"),
        (("--band-groups", "0,1"), "names band 2 0 times"),
        (("--color-jitter", 0.3), "colours of 5 channels with --pixel-max cannot be augmented"),
    ],
)
def test_what_cannot_be(
    command: Command, capsys: pytest.CaptureFixture[str], arguments: tuple[object, ...], message: str
) -> None:
    assert main(["pretrain", "scenes", "--out", "run", "--recipe", "bands.yaml", *map(str, arguments)]) == 2
    assert message in capsys.readouterr().err


def test_export_refuses_what_there_is_not_for_these_pixels(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    command("pretrain", "scenes", "--out", "runs/mae", "--recipe", "bands.yaml", "--epochs", 1, *TRAINING)
    for option, message in (
        (("--images", "uint8"), "this model's pixels have more than 8 bits (--pixel-max 10000)"),
        (("--tokens", "reconstruct"), "a model with --band-groups is exported without its decoder"),
    ):
        assert main(["export", "runs/mae", "--out", "bundle", *option]) == 2
        assert message in capsys.readouterr().err
    thermal = Preprocess(image_size=(15, 10), channels=1, mean=(0.5,), std=(0.25,), pixel_max=65535)
    with pytest.raises(ConfigError, match="its pixels have 8 bits, and the model's are divided by 65535"):
        check_feeding("full", "float32", thermal, None)
