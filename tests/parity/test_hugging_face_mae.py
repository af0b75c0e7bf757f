"""The arithmetic is that of an independent implementation, transformers' `ViTMAEForPreTraining`, with the same weights
and noise.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import ViTForImageClassification, ViTMAEConfig, ViTMAEForPreTraining, ViTMAEModel, ViTModel
from transformers.models.vit import ViTImageProcessorPil
from transformers.models.vit.configuration_vit import ViTConfig

from mae_deploy.cli import main
from mae_deploy.config import from_dict
from mae_deploy.errors import CheckFailed, ConfigError
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.models.mae import MaskedAutoencoder
from mae_deploy.models.masking import Masking, random_masking
from mae_deploy.models.vit import Classifier, Encoder
from mae_deploy.weights.load import LoadedWeights, load_model, model_of
from mae_deploy.weights.read.convert import Imported, ImportOptions, import_weights
from mae_deploy.weights.read.image_processor import read_image_processor
from mae_deploy.weights.read.preprocessing import PreprocessOptions
from tests.data.image_folders import write_noise
from tests.models.tiny_models import fill, random_tensor

B, N = 3, 49
# 7x7 patches of 2x2 pixels, 5 heads of 4, a decoder of 3 heads of 8; 49 and 20 visible tokens take the explicit
# attention, see EXPLICIT_ATTENTION_TOKENS.
SIZES: dict[str, Any] = {
    "image_size": 14,
    "patch_size": 2,
    "num_channels": 3,
    "hidden_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "intermediate_size": 80,
    "layer_norm_eps": 1e-6,  # the original's; transformers' default is 1e-12
}
DECODER_SIZES: dict[str, Any] = {
    "decoder_hidden_size": 24,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 3,
    "decoder_intermediate_size": 96,
    "mask_ratio": 0.6,
}


class Pair(NamedTuple):
    """One model twice, and what both are given."""

    theirs: ViTMAEForPreTraining
    ours: MaskedAutoencoder
    images: Tensor
    noise: Tensor

    @property
    def masking(self) -> Masking:
        return random_masking(self.noise, 0.6)


def hugging_face_mae(*, norm_pix_loss: bool = True, **sizes: Any) -> ViTMAEForPreTraining:
    # Every tensor is random: transformers 5 leaves the decoder's position table at zero.
    return fill(ViTMAEForPreTraining(ViTMAEConfig(**{**SIZES, **DECODER_SIZES, **sizes}, norm_pix_loss=norm_pix_loss)))


@pytest.fixture(params=[True, False], ids=["norm-pix", "pixels"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Pair:
    theirs = hugging_face_mae(norm_pix_loss=request.param)
    theirs.save_pretrained(tmp_path / "model")
    imported = import_weights(tmp_path / "model", ImportOptions())
    ours = model_of(LoadedWeights(imported.metadata, imported.tensors, {}))
    assert isinstance(ours, MaskedAutoencoder)
    assert ours.norm_pix_loss is request.param
    return Pair(theirs, ours, random_tensor(B, 3, 14, 14), torch.rand(B, N, generator=torch.Generator().manual_seed(7)))


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    """Within 1e-5 of the largest number: float32 sums of up to 96 products through five blocks, in another order."""
    assert ours.shape == theirs.shape
    assert ((ours - theirs).abs().max() / theirs.abs().max()).item() < 1e-5


def test_masking_is_the_same(pair: Pair) -> None:
    theirs = pair.theirs(pair.images, noise=pair.noise)
    assert torch.equal(pair.masking.mask, theirs.mask)
    assert torch.equal(pair.masking.ids_restore, theirs.ids_restore)
    assert pair.masking.ids_keep.shape == (B, 19)


def test_latent_is_the_same(pair: Pair) -> None:
    with torch.no_grad():
        theirs = pair.theirs.vit(pair.images, noise=pair.noise).last_hidden_state
        assert_close(pair.ours.forward_encoder(pair.images, pair.masking.ids_keep), theirs)


def test_prediction_and_loss_are_the_same(pair: Pair) -> None:
    with torch.no_grad():
        theirs = pair.theirs(pair.images, noise=pair.noise)
        ours = pair.ours(pair.images, pair.masking)
    assert_close(ours.pixels, theirs.logits)
    # A mean of 1,080 squares in float32.
    assert ours.loss.item() == pytest.approx(theirs.loss.item(), rel=1e-6)


def test_gradients_are_the_same(pair: Pair, tmp_path: Path) -> None:
    pair.theirs(pair.images, noise=pair.noise).loss.backward()
    pair.ours(pair.images, pair.masking).loss.backward()
    with torch.no_grad():
        for parameter in pair.theirs.parameters():
            # The gradients travel through the importer, which knows how names and joined tensors correspond.
            parameter.copy_(parameter.grad if parameter.grad is not None else torch.zeros_like(parameter))
    pair.theirs.save_pretrained(tmp_path / "gradients")
    theirs = import_weights(tmp_path / "gradients", ImportOptions()).tensors
    ours = {name: parameter.grad for name, parameter in pair.ours.named_parameters() if parameter.requires_grad}
    assert set(theirs) - set(ours) == {"pos_embed", "decoder_pos_embed"}
    total = torch.stack([theirs[name].norm() for name in ours]).norm()
    for name, gradient in ours.items():
        assert gradient is not None, name
        # Backward sums over every token of the batch: two digits more than the forward pass are lost. A key's bias has
        # no gradient but rounding.
        assert (gradient - theirs[name]).norm() < 1e-5 * theirs[name].norm() + 1e-7 * total, name
    norms = torch.stack([gradient.norm() for gradient in ours.values() if gradient is not None]).norm()
    assert norms.item() == pytest.approx(total.item(), rel=1e-5)


def test_names_in_memory_are_read_like_names_on_disk(tmp_path: Path) -> None:
    model = hugging_face_mae()
    model.save_pretrained(tmp_path / "model")
    on_disk = import_weights(tmp_path / "model", ImportOptions())
    torch.save(model.state_dict(), tmp_path / "memory.pth")
    in_memory = import_weights(
        tmp_path / "memory.pth", ImportOptions(num_heads=5, decoder_num_heads=3, norm_pix_loss=True)
    )
    # Two generations of names, which is what this is about.
    assert "vit.layers.0.attention.q_proj.weight" in model.state_dict()
    assert on_disk.tensors.keys() == in_memory.tensors.keys()
    assert all(torch.equal(tensor, in_memory.tensors[name]) for name, tensor in on_disk.tensors.items())
    assert on_disk.metadata.encoder == in_memory.metadata.encoder
    assert on_disk.metadata.decoder == in_memory.metadata.decoder
    assert on_disk.report["renamed"] == len(model.state_dict())


@pytest.mark.parametrize("channels", [1, 4])
def test_other_numbers_of_channels(tmp_path: Path, channels: int) -> None:
    theirs = hugging_face_mae(num_channels=channels)
    theirs.save_pretrained(tmp_path / "model")
    imported = import_weights(tmp_path / "model", ImportOptions())
    images, noise = random_tensor(B, channels, 14, 14), random_tensor(B, N, seed=2)
    with torch.no_grad():
        ours = model_of(LoadedWeights(imported.metadata, imported.tensors, {}))(images, random_masking(noise, 0.6))
        assert_close(ours.pixels, theirs(images, noise=noise).logits)


def imported_model(imported: Imported) -> Encoder:
    return model_of(LoadedWeights(imported.metadata, imported.tensors, {}))


@pytest.mark.parametrize("image_size", [14, (6, 10), (8, 2)])
def test_an_encoder_alone(tmp_path: Path, image_size: int | tuple[int, int]) -> None:
    # 8x2 pixels are 4x1 patches, as many as a square's: config.json tells them apart. The decoder's numbers do not
    # matter here.
    theirs = fill(
        ViTMAEModel(ViTMAEConfig(**{**SIZES, "image_size": image_size}, mask_ratio=0.0, decoder_hidden_size=24))
    )
    theirs.save_pretrained(tmp_path / "model")
    imported = import_weights(tmp_path / "model", ImportOptions())
    assert imported.metadata.kind == "encoder"
    ours = imported_model(imported)
    assert type(ours) is Encoder
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    assert ours.config.image_size == size
    images = random_tensor(B, 3, *size)
    with torch.no_grad():
        # Noise in rising order keeps every patch in row-major order.
        patches = ours.config.num_patches
        assert_close(
            ours(images), theirs(images, noise=torch.arange(patches).expand(B, patches) / patches).last_hidden_state
        )


def test_a_vit_classifier(tmp_path: Path) -> None:
    theirs = fill(ViTForImageClassification(ViTConfig(**{**SIZES, "num_labels": 7})))
    theirs.save_pretrained(tmp_path / "model")
    imported = import_weights(tmp_path / "model", ImportOptions())
    ours = imported_model(imported)
    assert isinstance(ours, Classifier)
    assert (ours.pool, imported.metadata.num_classes) == ("cls", 7)
    assert imported.metadata.class_names == tuple(f"LABEL_{index}" for index in range(7))
    images = random_tensor(B, 3, 14, 14)
    with torch.no_grad():
        assert_close(ours(images), theirs(images).logits)


def test_a_vit_with_a_pooler_on_top(tmp_path: Path) -> None:
    theirs = fill(ViTModel(ViTConfig(**SIZES)))
    theirs.save_pretrained(tmp_path / "model")
    imported = import_weights(tmp_path / "model", ImportOptions())
    assert imported.report["dropped"] == ["pooler.dense.bias", "pooler.dense.weight"]
    images = random_tensor(B, 3, 14, 14)
    with torch.no_grad():
        assert_close(imported_model(imported)(images), theirs(images).last_hidden_state)


def test_no_bias_of_query_key_and_value(tmp_path: Path) -> None:
    theirs = hugging_face_mae(qkv_bias=False)
    theirs.save_pretrained(tmp_path / "model")
    imported = import_weights(tmp_path / "model", ImportOptions())
    assert imported.report["folded"] == ["5 absent biases of query, key and value: zeros"]
    ours, images, noise = imported_model(imported), random_tensor(B, 3, 14, 14), random_tensor(B, N, seed=2)
    assert isinstance(ours, MaskedAutoencoder)
    with torch.no_grad():
        assert_close(ours(images, random_masking(noise, 0.6)).pixels, theirs(images, noise=noise).logits)


# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A model folder of several shards and their index."""
    hugging_face_mae().save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("model-*-of-*.safetensors"))) > 2
    return tmp_path / "shards"


@pytest.mark.parametrize("form", ["model.safetensors.index.json", "pytorch_model.bin.index.json", "pytorch_model.bin"])
def test_other_forms_of_a_folder(tmp_path: Path, shards: Path, form: str) -> None:
    hugging_face_mae().save_pretrained(tmp_path / "model")
    whole = import_weights(tmp_path / "model", ImportOptions())
    if form == "pytorch_model.bin":
        (tmp_path / "model" / "model.safetensors").unlink()
        torch.save(hugging_face_mae().state_dict(), tmp_path / "model" / form)
    elif form.startswith("pytorch"):
        for name in [path.name for path in shards.glob("*.safetensors*")]:
            (shards / name).unlink()
        first, second = (dict(list(hugging_face_mae().state_dict().items())[start::2]) for start in (0, 1))
        torch.save(first, shards / "a.bin")
        torch.save(second, shards / "b.bin")
        places = {**dict.fromkeys(first, "a.bin"), **dict.fromkeys(second, "b.bin")}
        (shards / form).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    found = import_weights(tmp_path / "model" if form == "pytorch_model.bin" else shards, ImportOptions())
    assert found.metadata.provenance["source"] == form
    assert found.metadata.provenance["source_sha256"] != whole.metadata.provenance["source_sha256"]
    assert found.tensors.keys() == whole.tensors.keys()
    assert all(torch.equal(tensor, found.tensors[name]) for name, tensor in whole.tensors.items())


def test_the_hash_of_shards_is_that_of_their_content(shards: Path) -> None:
    before = import_weights(shards, ImportOptions()).metadata.provenance["source_sha256"]
    shard = sorted(shards.glob("model-*-of-*.safetensors"))[1]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert import_weights(shards, ImportOptions()).metadata.provenance["source_sha256"] != before


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            {"weight_map": {"a": "../elsewhere.safetensors"}},
            r"the shard \.\./elsewhere\.safetensors, which is not beside it",
        ),
        ({"weight_map": {"a": "absent.safetensors"}}, r"the shard absent\.safetensors, which is not beside it"),
        ({"weight_map": {}}, "names no shards"),
        ({"weight_map": ["a"]}, "names no shards"),
        ([], "names no shards"),
    ],
)
def test_an_index_that_leads_nowhere(shards: Path, content: Any, said: str) -> None:
    (shards.parent / "elsewhere.safetensors").write_bytes(next(shards.glob("*.safetensors")).read_bytes())
    (shards / "model.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(CheckFailed, match=said):
        import_weights(shards, ImportOptions())


def test_a_missing_shard_is_named(shards: Path) -> None:
    lost = sorted(shards.glob("model-*-of-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(CheckFailed, match=lost.name):
        import_weights(shards, ImportOptions())


@pytest.mark.parametrize(
    ("settings", "feature"),
    [
        ({"hidden_act": "gelu_new"}, "hidden_act gelu_new"),
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps 1e-05, more than 1e-6"),
        ({"decoder_intermediate_size": 72}, "decoder_intermediate_size 72, not four times decoder_hidden_size 24"),
        ({"model_type": "swin"}, "model_type swin"),
    ],
)
def test_a_config_that_changes_the_computation_is_refused(
    tmp_path: Path, settings: dict[str, Any], feature: str, capsys: pytest.CaptureFixture[str]
) -> None:
    hugging_face_mae(**{name: value for name, value in settings.items() if name != "model_type"}).save_pretrained(
        tmp_path / "model"
    )
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, **settings}))
    assert main(["import", str(tmp_path / "model"), "--out", str(tmp_path / "out")]) == 2
    assert f"config.json has {feature}, which" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_patches_that_are_not_square_are_refused(tmp_path: Path) -> None:
    fill(ViTMAEModel(ViTMAEConfig(**{**SIZES, "patch_size": (2, 7)}))).save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"the patches are 2x7 pixels|of another model: patch_size \(2, 7\)"):
        import_weights(tmp_path / "model", ImportOptions())


def test_a_timm_name_for_a_folder_of_hugging_face(tmp_path: Path) -> None:
    hugging_face_mae().save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match="--model names a timm model"):
        import_weights(tmp_path / "model", ImportOptions(model="vit_base_patch16_224"))


# --- preprocessing ---------------------------------------------------------------------------------------------------


def imported_preprocess(folder: Path, **settings: Any) -> tuple[Preprocess, list[str]]:
    hugging_face_mae(image_size=48, patch_size=16).save_pretrained(folder)
    ViTImageProcessorPil(**settings).save_pretrained(folder)
    imported = import_weights(folder, ImportOptions())
    return from_dict(Preprocess, imported.metadata.preprocess), imported.report["notes"]


@pytest.mark.parametrize(
    ("settings", "forms"),
    [
        # Squashed.
        (
            {"size": {"height": 48, "width": 48}, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]},
            [(61, 61), (48, 48), (17, 17), (59, 118), (118, 59), (5, 300)],
        ),
        ({"size": {"height": 48, "width": 48}, "resample": 1}, [(61, 118)]),
        ({"size": {"height": 48, "width": 48}, "resample": 4}, [(61, 118)]),
        ({"size": {"height": 48, "width": 48}, "resample": 5}, [(61, 118)]),
        # Squashed to more, and the middle of it (DeiT's).
        (
            {
                "size": {"height": 56, "width": 56},
                "do_center_crop": True,
                "crop_size": {"height": 48, "width": 48},
                "resample": 3,
            },
            [(61, 61), (59, 118), (118, 59)],
        ),
        ({"size": {"height": 48, "width": 48}, "do_normalize": False, "resample": 0}, [(61, 61)]),
        ({"size": {"height": 48, "width": 48}, "do_rescale": False, "do_normalize": False, "resample": 3}, [(61, 61)]),
        (
            {
                "size": {"height": 48, "width": 48},
                "rescale_factor": 1 / 127.5,
                "image_mean": 1.0,
                "image_std": [1.0, 1.0, 1.0],
            },
            [(61, 61)],
        ),
        ({"do_resize": False}, [(48, 48)]),
        # The shorter side, and the middle of it: the same for every image. (Halves of a pixel are rounded otherwise.)
        (
            {
                "size": {"shortest_edge": 56},
                "do_center_crop": True,
                "crop_size": {"height": 48, "width": 48},
                "resample": 3,
            },
            [(61, 61), (59, 118), (118, 59)],
        ),
    ],
)
def test_the_preprocessing_is_transformers(
    tmp_path: Path, settings: dict[str, Any], forms: list[tuple[int, int]]
) -> None:
    theirs = ViTImageProcessorPil(**settings)
    ours, notes = imported_preprocess(tmp_path / "model", **settings)
    assert ours.image_size == (48, 48)
    assert notes == []
    for form in forms:
        pixels = np.random.default_rng(5).integers(0, 256, (*form, 3), dtype=np.uint8)
        expected = np.asarray(theirs(pixels, return_tensors="np")["pixel_values"][0])
        # The same pixels, up to rounding in float32; these may be as large as 255.
        assert np.abs(ours([pixels])[0] - expected).max() < 1e-5 * max(1.0, float(np.abs(expected).max()))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"resample": 6}, "resizes with filter 6, which"),
        ({"do_center_crop": True, "crop_size": 48, "size": {"shortest_edge": 40}}, "crops 48x48 pixels out of 40x40"),
        ({"do_center_crop": True, "do_resize": False}, "crops without resizing"),
        ({"size": {"longest_edge": 48}}, "resizes to {'longest_edge': 48}"),
        ({"size": {"shortest_edge": 48, "longest_edge": 60}}, "limits the longer side"),
        ({"do_center_crop": True, "crop_size": [48, 40], "size": 56}, "another share of each side"),
        ({"do_pad": True}, "has do_pad, which ours does not"),
        ({"do_flip_channel_order": True}, "has do_flip_channel_order"),
        ({"rescale_offset": True}, "has rescale_offset"),
        ({"image_processor_type": "LevitImageProcessor"}, "is of a LevitImageProcessor; those of ViT, "),
    ],
)
def test_preprocessing_that_ours_cannot_do(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    hugging_face_mae().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=said) as error:
        import_weights(tmp_path / "model", ImportOptions())
    assert error.value.hint is not None
    assert "--crop-mode, --crop-pct, --interpolation, --mean and --std" in error.value.hint
    whole = PreprocessOptions(crop_mode="squash", crop_pct=1.0, interpolation="box", mean=(0.5,) * 3, std=(0.25,) * 3)
    told = import_weights(tmp_path / "model", ImportOptions(preprocess=whole))
    assert told.metadata.preprocess["crop_mode"] == "squash"
    assert told.report["preprocess_from"] == "the options of import"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"size": 224}, ("squash", 1.0, "bilinear")),
        (
            {"feature_extractor_type": "DeiTFeatureExtractor", "size": 256, "crop_size": 224},
            ("squash", 0.875, "bicubic"),
        ),
        ({"image_processor_type": "DeiTImageProcessorFast"}, ("squash", 0.875, "bicubic")),
        ({"image_processor_type": "BitImageProcessor", "size": 256}, ("center", 0.875, "bicubic")),
        ({"feature_extractor_type": "CLIPFeatureExtractor", "size": 224}, ("center", 1.0, "bicubic")),
        (
            {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 224}},
            ("center", 0.875, "bicubic"),
        ),
        ({"feature_extractor_type": "ConvNextFeatureExtractor", "size": 384}, ("squash", 1.0, "bicubic")),
        ({"size": {"shortest_edge": 224}}, ("center", 1.0, "bilinear")),
    ],
)
def test_what_the_file_leaves_to_its_processor(settings: dict[str, Any], expected: tuple[str, float, str]) -> None:
    found = read_image_processor(settings, (224, 224), 3)
    assert (found.crop_mode, found.crop_pct, found.interpolation) == expected


def test_older_preprocessing_and_another_image_size(tmp_path: Path) -> None:
    hugging_face_mae().save_pretrained(tmp_path / "model")
    older = {
        "feature_extractor_type": "ViTFeatureExtractor",
        "size": 14,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.25, 0.25, 0.25],
        "resample": 3,
    }
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(older))
    found = from_dict(
        Preprocess, import_weights(tmp_path / "model", ImportOptions(image_size=(6, 10))).metadata.preprocess
    )
    assert found == Preprocess(
        image_size=(6, 10), crop_mode="squash", crop_pct=1.0, interpolation="bicubic", mean=(0.5,) * 3, std=(0.25,) * 3
    )


# --- the whole way ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", ["full", "visible"])
@pytest.mark.parametrize("kind", ["vit_mae", "vit"])
def test_an_imported_folder_is_exported(tmp_path: Path, kind: str, tokens: str) -> None:
    theirs = (
        hugging_face_mae()
        if kind == "vit_mae"
        else fill(ViTForImageClassification(ViTConfig(**{**SIZES, "num_labels": 7})))
    )
    theirs.save_pretrained(tmp_path / "model")
    ViTImageProcessorPil(size={"height": 14, "width": 14}).save_pretrained(tmp_path / "model")
    assert main(["import", str(tmp_path / "model"), "--out", str(tmp_path / "out")]) == 0
    assert isinstance(load_model(tmp_path / "out")[0], MaskedAutoencoder if kind == "vit_mae" else Classifier)
    write_noise(tmp_path / "photos", 4)
    # Export refuses by itself what does not compute what PyTorch computes.
    arguments = ["--tokens", tokens, "--samples", str(tmp_path / "photos"), "--num-samples", "4"]
    assert main(["export", str(tmp_path / "out"), "--out", str(tmp_path / "bundle"), *arguments]) == 0
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert manifest["provenance"]["checkpoint"]["layout"] == "Hugging Face"
    assert manifest["preprocess"]["mean"] == [0.5, 0.5, 0.5]
    assert manifest["preprocess"]["crop_mode"] == "squash"
    assert manifest["provenance"]["preprocess_from"] == "preprocessor_config.json"
