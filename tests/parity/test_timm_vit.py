"""Encoder and classifier compute what timm's `VisionTransformer` computes with the same weights, and the weights go
both ways.

Models that differ from a plain ViT arrive by timm's name: folded where that is exact, otherwise refused.
"""

from __future__ import annotations

import json
import socket
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from mae_deploy.checkpoint import Metadata
from mae_deploy.cli import main
from mae_deploy.config import from_dict
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.models.vit import Classifier, Encoder
from mae_deploy.weights.load import LoadedWeights, load_model, model_of
from mae_deploy.weights.read.convert import ImportOptions, import_weights
from tests.data.image_folders import write_noise
from tests.models.tiny_models import fill, random_tensor

# 3x5 patches take the explicit attention, 5x14 the fused one (EXPLICIT_ATTENTION_TOKENS).
IMAGE_SIZES = [(48, 80), (80, 224)]
CLASSES = 7


def timm_vit(image_size: tuple[int, int], **settings: Any) -> Any:
    return fill(
        timm.create_model(
            "vit_tiny_patch16_224", pretrained=False, img_size=image_size, depth=2, num_classes=CLASSES, **settings
        )
    )


def imported_from(model: nn.Module, folder: Path, image_size: tuple[int, int]) -> Encoder:
    save_file(model.state_dict(), folder / "model.safetensors")
    imported = import_weights(folder / "model.safetensors", ImportOptions(image_size=image_size))
    return model_of(LoadedWeights(imported.metadata, imported.tensors, {}))


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    """Within 1e-5 of the largest number: float32 sums of up to 768 products through two blocks, in another order."""
    assert ours.shape == theirs.shape
    assert ((ours - theirs).abs().max() / theirs.abs().max()).item() < 1e-5


@pytest.mark.parametrize("image_size", IMAGE_SIZES)
@pytest.mark.parametrize("channels", [1, 3])
def test_encoder(tmp_path: Path, image_size: tuple[int, int], channels: int) -> None:
    theirs = timm_vit(image_size, global_pool="token", in_chans=channels)
    theirs.reset_classifier(0)
    ours = imported_from(theirs, tmp_path, image_size)
    assert type(ours) is Encoder
    images = random_tensor(3, channels, *image_size)
    with torch.no_grad():
        assert_close(ours(images), theirs.forward_features(images))


@pytest.mark.parametrize("image_size", IMAGE_SIZES)
@pytest.mark.parametrize(("pooling", "pool"), [("avg", "avg"), ("token", "cls")])
def test_classifier(tmp_path: Path, image_size: tuple[int, int], pooling: str, pool: str) -> None:
    theirs = timm_vit(image_size, global_pool=pooling, fc_norm=pooling == "avg")
    ours = imported_from(theirs, tmp_path, image_size)
    assert isinstance(ours, Classifier)
    assert ours.pool == pool
    images = random_tensor(3, 3, *image_size)
    with torch.no_grad():
        assert_close(ours.forward_pooled(images), theirs.forward_head(theirs.forward_features(images), pre_logits=True))
        assert_close(ours(images), theirs(images))


def test_our_weights_load_in_timm(tmp_path: Path) -> None:
    theirs = timm_vit((48, 80), global_pool="avg", fc_norm=True)
    ours = imported_from(theirs, tmp_path, (48, 80))
    fill(ours, seed=3)
    theirs.load_state_dict(ours.state_dict())
    images = random_tensor(3, 3, 48, 80)
    with torch.no_grad():
        assert_close(theirs(images), ours(images))


# --- by name ---------------------------------------------------------------------------------------------------------

# timm's own test model has 10x10 patches of 16x16 pixels, 6 blocks, 2 heads of 32 and an MLP three times as wide.
SIDE = 160


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is downloaded."""

    def refuse(*_: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def timm_model(name: str = "test_vit", **settings: Any) -> Any:
    return fill(timm.create_model(name, pretrained=False, **{"num_classes": CLASSES, **settings}))


def import_model(source: Path, out: Path, *options: str) -> tuple[Encoder, Metadata]:
    """What `mae-deploy import` leaves behind, as the rest of the project loads it."""
    assert main(["import", str(source), "--out", str(out), *options]) == 0
    model, loaded = load_model(out)
    return model, loaded.metadata


def write_timm_folder(folder: Path, model: nn.Module, architecture: str = "test_vit", **arguments: Any) -> Path:
    """A model folder as timm's hub repositories are: the weights, and in config.json the architecture, its arguments
    and the preprocessing.
    """
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    stated = {
        "tag": "ours",
        "input_size": [3, SIDE, SIDE],
        "crop_pct": 0.8,
        "interpolation": "bilinear",
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
    }
    config = {
        "architecture": architecture,
        "num_classes": CLASSES,
        "model_args": arguments,
        "pretrained_cfg": {**stated, "license": "mit"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def assert_same_outputs(ours: Encoder, theirs: Any, images: Tensor) -> None:
    with torch.no_grad():
        expected = theirs(images) if isinstance(ours, Classifier) else theirs.forward_features(images)
        assert_close(ours(images), expected)


@pytest.mark.parametrize("form", ["safetensors", "bin", "model", "state_dict", "training", "average"])
def test_a_file_by_name(tmp_path: Path, form: str) -> None:
    theirs, other = timm_model(), {name: torch.zeros_like(tensor) for name, tensor in timm_model().state_dict().items()}
    tensors = theirs.state_dict()
    arguments = Namespace(model="test_vit", input_size=None, mean=None)
    contents: dict[str, Any] = {
        "bin": tensors,
        "model": {"model": {f"module.{name}": tensor for name, tensor in tensors.items()}},
        "state_dict": {"state_dict": tensors},
        "training": {"epoch": 3, "arch": "test_vit", "state_dict": tensors, "args": arguments, "version": 2},
        # timm evaluates the running average where there is one.
        "average": {"state_dict": other, "state_dict_ema": tensors, "args": arguments},
    }
    source = tmp_path / f"weights.{form if form in ('safetensors', 'bin') else 'pth.tar'}"
    save_file(tensors, source) if form == "safetensors" else torch.save(contents[form], source)
    ours, metadata = import_model(source, tmp_path / "out", "--model", "test_vit")
    assert isinstance(ours, Classifier)
    assert (ours.pool, ours.head.out_features, metadata.class_names, metadata.licence) == (
        "cls",
        CLASSES,
        None,
        "unspecified",
    )
    assert (ours.config.name, ours.config.image_size, ours.config.heads, ours.config.mlp_ratio) == (
        "vit_64x6_patch16",
        (SIDE, SIDE),
        2,
        3.0,
    )
    assert (metadata.provenance["architecture"], metadata.provenance["layout"]) == ("test_vit", "timm")
    assert_same_outputs(ours, theirs, random_tensor(2, 3, SIDE, SIDE))


def test_a_plain_vit_by_name(tmp_path: Path) -> None:
    theirs = timm_model("vit_tiny_patch16_224.augreg_in21k", num_classes=0)
    save_file(theirs.state_dict(), tmp_path / "weights.safetensors")
    ours, metadata = import_model(
        tmp_path / "weights.safetensors", tmp_path / "out", "--model", "vit_tiny_patch16_224.augreg_in21k"
    )
    assert type(ours) is Encoder
    assert (ours.config.name, ours.config.heads, metadata.licence) == ("vit_tiny_patch16", 3, "Apache-2.0")
    assert_same_outputs(ours, theirs, random_tensor(1, 3, 224, 224))


# Everything that timm's named ViTs differ in and that is exactly what ours computes with other tensors.
FOLDED: dict[str, tuple[dict[str, Any], str]] = {
    "plain": ({}, ""),
    "LayerScale": ({"init_values": 0.1}, "4 LayerScales"),
    "positions without the class token": (
        {"init_values": 0.1, "no_embed_class": True},
        "without an entry for the class token",
    ),
    "no qkv bias": ({"qkv_bias": False}, "2 absent biases"),
    "no other bias": ({"proj_bias": False}, "6 absent biases"),
    "average pooling": ({"global_pool": "avg"}, ""),
    "class token before the norm": ({"fc_norm": True}, "fc_norm"),
    "encoder": ({"num_classes": 0, "init_values": 0.1}, "4 LayerScales"),
    "encoder that averages after the norm": ({"num_classes": 0, "global_pool": "avg", "fc_norm": False}, ""),
    "one channel": ({"in_chans": 1}, ""),
    "five heads, patches of 8": (
        {
            "embed_dim": 20,
            "num_heads": 5,
            "mlp_ratio": 3.3,
            "patch_size": 8,
            "img_size": [24, 40],
            "dynamic_img_size": False,
        },
        "",
    ),
    "dynamic size, padded": ({"dynamic_img_pad": True}, ""),
    "norms of queries and keys": ({"qk_norm": True}, ""),
    "a norm in the attention": ({"scale_attn_norm": True}, ""),
    "a norm in the MLP": ({"scale_mlp_norm": True}, ""),
    "GELU by tanh": ({"act_layer": "gelu_tanh"}, ""),
    "QuickGELU": ({"act_layer": "quick_gelu"}, ""),
    "no norm after the blocks": ({"final_norm": False}, ""),
    "average pooling after the norm": ({"global_pool": "avg", "fc_norm": False}, ""),
    "no positions": ({"pos_embed": "none", "img_size": [24, 40], "patch_size": 8}, ""),
    "no class token": ({"class_token": False, "global_pool": "avg"}, ""),
    "registers with positions": ({"reg_tokens": 3}, "position embeddings of 3 registers"),
}


@pytest.mark.parametrize("variant", FOLDED)
def test_what_folds_is_exact(tmp_path: Path, variant: str, capsys: pytest.CaptureFixture[str]) -> None:
    settings, said = {**FOLDED[variant][0], "depth": 2}, FOLDED[variant][1]
    theirs = timm_model(**settings)
    source = write_timm_folder(tmp_path / "model", theirs, **settings)
    ours, _ = import_model(source, tmp_path / "out", "--json")
    report = json.loads(capsys.readouterr().out)
    assert any(said in line for line in report["folded"]) if said else report["folded"] == []
    assert report["dropped"] == report["reshaped"] == []
    channels, size = settings.get("in_chans", 3), settings.get("img_size", (SIDE, SIDE))
    assert_same_outputs(ours, theirs, random_tensor(2, channels, *size))


def test_a_folder_that_timm_wrote(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"init_values": 0.1, "global_pool": "avg", "img_size": (48, 80), "depth": 2}
    theirs = timm_model(**settings)
    timm.models.save_for_hf(theirs, str(tmp_path / "model"), model_args=settings, safe_serialization=True)
    ours, metadata = import_model(tmp_path / "model", tmp_path / "out")
    assert ours.config.image_size == (48, 80)
    assert metadata.preprocess["mean"] == [0.5, 0.5, 0.5]
    assert_same_outputs(ours, theirs, random_tensor(2, 3, 48, 80))


def test_the_original_files_of_deit_3_and_dinov2(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"init_values": 0.1, "depth": 2}
    theirs = timm_model(**settings)
    source = write_timm_folder(tmp_path / "model", theirs, **settings)
    tensors = {
        name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): tensor
        for name, tensor in theirs.state_dict().items()
    }
    (source / "model.safetensors").unlink()
    torch.save({"model": {**tensors, "mask_token": torch.zeros(1, 64)}}, source / "pytorch_model.bin")
    imported = import_weights(source, ImportOptions())
    assert (imported.report["renamed"], imported.report["dropped"]) == (4, ["mask_token"])
    assert_same_outputs(
        model_of(LoadedWeights(imported.metadata, imported.tensors, {})), theirs, random_tensor(2, 3, SIDE, SIDE)
    )


def test_fine_tuning_with_average_pooling_shows_in_the_file(tmp_path: Path) -> None:
    # The name says that the class token is read; fc_norm says that this file was trained otherwise.
    theirs = timm_model(global_pool="avg")
    save_file(theirs.state_dict(), tmp_path / "weights.safetensors")
    ours, _ = import_model(tmp_path / "weights.safetensors", tmp_path / "out", "--model", "test_vit")
    assert isinstance(ours, Classifier)
    assert ours.pool == "avg"
    assert_same_outputs(ours, theirs, random_tensor(2, 3, SIDE, SIDE))


TINY: dict[str, Any] = {"embed_dim": 64, "depth": 1, "num_heads": 2}


@pytest.mark.parametrize(
    "architecture", ["vit_small_patch14_dinov2", "deit3_small_patch16_224", "flexivit_small", "vit_small_patch16_384"]
)
@pytest.mark.parametrize("given", [True, False], ids=["--image-size", "as the file is"])
def test_another_image_size_is_resampled_as_timm_does(tmp_path: Path, architecture: str, given: bool) -> None:
    trained = timm_model(architecture, **TINY)
    patch, old = trained.patch_embed.patch_size[0], trained.patch_embed.img_size
    size = (5 * patch, 7 * patch) if given else (6 * patch, 6 * patch)
    theirs = timm_model(architecture, img_size=size, **TINY)
    bilinear: dict[str, Any] = (
        {"interpolation": "bilinear", "antialias": False} if architecture.startswith("flexi") else {}
    )
    theirs.load_state_dict(checkpoint_filter_fn(trained.state_dict(), theirs, **bilinear))
    source = write_timm_folder(tmp_path / "model", trained if given else theirs, architecture, **TINY)
    options = ("--image-size", f"{size[0]},{size[1]}") if given else ()
    ours, metadata = import_model(source, tmp_path / "out", *options)
    assert ours.config.image_size == size != old
    assert metadata.preprocess["image_size"] == list(size)
    assert_same_outputs(ours, theirs, random_tensor(2, 3, *size))


@pytest.mark.parametrize("name", ["test_vit", "deit_tiny_patch16_224", None])
def test_the_preprocessing_is_timms(tmp_path: Path, name: str | None) -> None:
    source = write_timm_folder(tmp_path / "model", timm_model(name or "test_vit", num_classes=0))
    with torch.device("meta"):
        registered: Any = timm.create_model(name or "test_vit")
    theirs = registered.pretrained_cfg if name else json.loads((source / "config.json").read_text())["pretrained_cfg"]
    transform: Any = create_transform(**resolve_data_config(pretrained_cfg=theirs))
    ours = from_dict(Preprocess, import_weights(source, ImportOptions(model=name)).metadata.preprocess)
    for height, width in [(301, 203), (97, 380), (224, 224)]:
        pixels = np.random.default_rng(5).integers(0, 256, (height, width, 3), dtype=np.uint8)
        # The same pixels; mean and standard deviation are applied in another order of float32 operations.
        assert np.abs(ours([pixels])[0] - transform(Image.fromarray(pixels)).numpy()).max() < 1e-5


def test_the_preprocessing_of_other_channels_is_a_guess(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings: dict[str, Any] = {"in_chans": 1, "depth": 1}
    source = write_timm_folder(tmp_path / "model", timm_model(**settings), **settings)
    config = json.loads((source / "config.json").read_text())
    config["pretrained_cfg"]["crop_mode"] = "squash"
    (source / "config.json").write_text(json.dumps(config))
    _, metadata = import_model(source, tmp_path / "out", "--json")
    printed = capsys.readouterr()
    assert json.loads(printed.out)["preprocess_from"] == "config.json; mean and std of 1 channels are guessed"
    assert "preprocessing: config.json; mean and std of 1 channels are guessed. Predictions" in printed.err
    found = from_dict(Preprocess, metadata.preprocess)
    assert (found.mean, found.std, found.crop_pct, found.crop_mode) == ((0.5,), (0.25,), 0.8, "squash")


@pytest.mark.parametrize(
    ("arguments", "licence"),
    [
        (["--model", "vit_base_patch16_224.mae"], "CC-BY-NC-4.0"),
        (["--model", "vit_base_patch16_224.dino"], "Apache-2.0"),
        (["--model", "vit_base_patch16_224"], "unspecified"),
        (["--model", "vit_base_patch16_224.dino", "--license", "own"], "own"),
    ],
)
def test_the_licence_of_a_tag(
    tmp_path: Path, arguments: list[str], licence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.device("meta"):
        tensors = timm.create_model("vit_base_patch16_224", num_classes=0, depth=1).state_dict()
    save_file(
        {name: torch.zeros(tensor.shape, dtype=torch.float16) for name, tensor in tensors.items()},
        tmp_path / "weights.safetensors",
    )
    entry = timm.models.model_entrypoint("vit_base_patch16_224")
    monkeypatch.setattr(timm.models, "model_entrypoint", lambda _: lambda **settings: entry(depth=1, **settings))
    _, metadata = import_model(tmp_path / "weights.safetensors", tmp_path / "out", *arguments)
    assert metadata.licence == licence


REFUSED = {
    "deit_tiny_distilled_patch16_224": "a distillation token (dist_token)",
    "vit_base_patch16_rpn_224": "blocks of kind ResPostBlock",
    "vit_pwee_patch16_reg1_gap_256": "blocks of kind ParallelScalingBlock",
    "beit_base_patch16_224": "relative positions in its attention (Beit)",
    "vit_tiny_r_s16_p8_224": "a HybridEmbed in place of a patch embedding",
    "test_vit4": "norm of kind RmsNorm",
    "resnet18": "the class ResNet",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_computes_something_else_is_refused(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    # Judged by its name alone: the tensors are those of a ViT that would be read.
    save_file(timm_model(depth=1, embed_dim=8, num_heads=2).state_dict(), tmp_path / "weights.safetensors")
    assert main(["import", str(tmp_path / "weights.safetensors"), "--out", str(tmp_path / "out"), "--model", name]) == 2
    error = capsys.readouterr().err.splitlines()[0]
    assert error.startswith(f"error: {name} has ")
    assert REFUSED[name] in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "feature"),
    [
        ({"attn_layer": "diff"}, "attention of kind DiffAttention"),
        ({"norm_layer": "rmsnorm"}, "norm of kind RmsNorm"),
        ({"embed_norm_layer": "layernorm"}, "a norm of the patch embeddings"),
        ({"patch_size": [16, 8]}, "patches of 16x8 pixels"),
        ({"act_layer": "silu"}, "activation of kind SiLU"),
        ({"global_pool": "max"}, "'max' pooling"),
        ({"global_pool": "avgmax"}, "'avgmax' pooling"),
        ({"global_pool": "avg", "pool_include_prefix": True}, "pooling that includes the class token"),
        ({"global_pool": "max", "fc_norm": True, "num_classes": 0}, "'max' pooling"),
    ],
)
def test_an_argument_that_changes_the_computation_is_refused(
    tmp_path: Path, settings: dict[str, Any], feature: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {**settings, "depth": 1}
    source = write_timm_folder(tmp_path / "model", timm_model(**settings), **settings)
    assert main(["import", str(source), "--out", str(tmp_path / "out")]) == 2
    assert f" has {feature}" in capsys.readouterr().err.splitlines()[0]


@pytest.mark.parametrize(
    ("arguments", "code", "error", "hint"),
    [
        (
            ["--model", "vit_smal_patch16_224"],
            2,
            "has no model 'vit_smal_patch16_224'",
            "did you mean 'vit_small_patch16_224'?",
        ),
        (["--model", "hf_hub:timm/vit_tiny_patch16_224.augreg_in21k"], 2, "has no model 'hf_hub:timm/", ""),
        (["--model", "vit_base_patch16_224.nonsense"], 2, "no tag 'nonsense' for vit_base_patch16_224", "augreg_in21k"),
        (["--model", "test_vit", "--num-heads", "4"], 2, "test_vit has 2 heads, not 4", "leave --num-heads out"),
        (
            ["--model", "vit_tiny_patch16_224"],
            1,
            "does not fit vit_tiny_patch16_224: 108 missing: blocks.3.norm1.weight",
            "",
        ),
        ([], 1, "unexpected: blocks.0.ls1.gamma", "--model NAME"),
    ],
)
def test_a_name_that_does_not_fit(
    tmp_path: Path, arguments: list[str], code: int, error: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, Any] = {"depth": 3} if "test_vit" not in arguments else {}
    settings |= {"init_values": 0.1} if not arguments else {}
    save_file(timm_model(**settings).state_dict(), tmp_path / "weights.safetensors")
    assert main(["import", str(tmp_path / "weights.safetensors"), "--out", str(tmp_path / "out"), *arguments]) == code
    printed = capsys.readouterr().err
    assert error in next(line for line in printed.splitlines() if line.startswith("error: "))
    assert hint in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architecture": "no_such_vit"}, "cannot build no_such_vit"),
        ({"model_args": {"pretrained": True}}, "cannot build test_vit"),
        ({"model_args": {"checkpoint_path": "evil.pth"}}, "cannot build test_vit"),
        ({"model_args": [3]}, "config.json beside"),
        ({"pretrained_cfg": {"interpolation": "random"}}, "interpolation 'random'"),
    ],
)
def test_a_config_that_cannot_be_used(
    tmp_path: Path, change: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_timm_folder(tmp_path / "model", timm_model())
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **change}))
    assert main(["import", str(source), "--out", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err.splitlines()[0]


@pytest.mark.parametrize("settings", [{"global_pool": "avg"}, {"num_classes": 0}], ids=["classifier", "encoder"])
@pytest.mark.parametrize("tokens", ["full", "visible"])
def test_an_imported_model_is_exported(tmp_path: Path, settings: dict[str, Any], tokens: str) -> None:
    settings = {**settings, "init_values": 0.1, "depth": 2, "img_size": (48, 80), "qkv_bias": False}
    source = write_timm_folder(tmp_path / "model", timm_model(**settings), **settings)
    import_model(source, tmp_path / "out")
    write_noise(tmp_path / "photos", 4)
    # Export refuses by itself what does not compute what PyTorch computes.
    arguments = ["--tokens", tokens, "--samples", str(tmp_path / "photos"), "--num-samples", "4"]
    assert main(["export", str(tmp_path / "out"), "--out", str(tmp_path / "bundle"), *arguments]) == 0
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert manifest["provenance"]["checkpoint"]["architecture"] == "test_vit"
    assert manifest["licence"] == "MIT"
    assert manifest["preprocess"]["mean"] == [0.1, 0.2, 0.3]
