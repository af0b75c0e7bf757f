"""Features are what the model computes, in the order of the images, whatever the batches, on every way to get them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mae_deploy.config import from_dict
from mae_deploy.data.sources.base import ImageSource
from mae_deploy.data.sources.open import labelled_images
from mae_deploy.errors import CheckFailed, ConfigError, MissingDependency
from mae_deploy.evaluation.config import FeaturesConfig
from mae_deploy.evaluation.features import EncoderFeatures, FeatureSet, extract, open_source, random_like
from mae_deploy.export.config import ExportConfig
from mae_deploy.export.run import run_export
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.images.read import read_image
from mae_deploy.models.config import EncoderConfig
from mae_deploy.models.position import interpolate_position_embedding
from mae_deploy.weights.load import at_image_size, read_weights
from tests.data.image_folders import spoil, write_classes
from tests.export.tiny_exports import write_checkpoint
from tests.models.tiny_models import ENCODER, tiny_classifier, tiny_encoder, tiny_mae


@pytest.fixture
def val(tmp_path: Path) -> ImageSource:
    return labelled_images(write_classes(tmp_path / "classes"), "val")


def features_of(path: Path, images: ImageSource, **settings: object) -> FeatureSet:
    config = from_dict(FeaturesConfig, {"num_workers": 0, "batch_size": 4, **settings})
    source = open_source(path, config, "cpu")
    try:
        return extract(source, images, config)
    finally:
        source.close()


@pytest.mark.parametrize("pool", ["cls", "avg"])
def test_they_are_the_models(tmp_path: Path, val: ImageSource, pool: str) -> None:
    model = tiny_encoder()
    checkpoint = write_checkpoint(tmp_path / "checkpoint", model)
    spec = from_dict(Preprocess, read_weights(checkpoint).metadata.preprocess)
    pixels = torch.from_numpy(spec([read_image(Path(val.key(index))) for index in range(len(val))]))
    with torch.no_grad():
        tokens = model(pixels)
    expected = tokens[:, 0] if pool == "cls" else tokens[:, 1:].mean(dim=1)
    found = features_of(checkpoint, val, pool=pool)
    # Float32, in batches of another size.
    assert found.features.numpy() == pytest.approx(expected.numpy(), abs=1e-5)
    assert found.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_an_autoencoder_gives_its_encoders(tmp_path: Path, val: ImageSource) -> None:
    mae = tiny_mae()
    encoder = tiny_encoder()
    encoder.load_state_dict({name: mae.state_dict()[name] for name in encoder.state_dict()})
    one, two = (write_checkpoint(tmp_path / name, model) for name, model in (("mae", mae), ("encoder", encoder)))
    assert torch.equal(features_of(one, val).features, features_of(two, val).features)
    source = EncoderFeatures(read_weights(one), FeaturesConfig(), "cpu")
    assert source.parameters == sum(parameter.numel() for parameter in encoder.parameters())


@pytest.mark.parametrize("pool", ["cls", "avg"])
def test_a_classifier_gives_what_its_head_reads(tmp_path: Path, val: ImageSource, pool: str) -> None:
    assert pool in ("cls", "avg")
    model = tiny_classifier(pool)  # type: ignore[arg-type]
    checkpoint = write_checkpoint(tmp_path / "checkpoint", model)
    spec = from_dict(Preprocess, read_weights(checkpoint).metadata.preprocess)
    with torch.no_grad():
        expected = model.forward_pooled(
            torch.from_numpy(spec([read_image(Path(val.key(index))) for index in range(len(val))]))
        )
    assert features_of(checkpoint, val).features.numpy() == pytest.approx(expected.numpy(), abs=1e-5)


def test_a_mean_pooled_classifier_has_no_cls(tmp_path: Path, val: ImageSource) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tiny_classifier("avg"))
    with pytest.raises(ConfigError, match="offers avg"):
        features_of(checkpoint, val, pool="cls")


@pytest.mark.parametrize("pool", ["cls", "avg"])
def test_a_bundle_gives_its_checkpoints(tmp_path: Path, val: ImageSource, pool: str) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tiny_encoder(), licence="own")
    run_export(ExportConfig(checkpoint=checkpoint, out=tmp_path / "bundle", samples=tmp_path / "classes" / "val"))
    found, expected = (features_of(path, val, pool=pool).features for path in (tmp_path / "bundle", checkpoint))
    assert found.numpy() == pytest.approx(expected.numpy(), abs=1e-5)  # FP32 on another engine
    assert open_source(tmp_path / "bundle", FeaturesConfig(), "cpu").parameters == sum(
        parameter.numel() for parameter in tiny_encoder().parameters()
    )


def test_unreadable_images_are_named_and_left_out(
    tmp_path: Path, val: ImageSource, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tiny_encoder())
    whole = features_of(checkpoint, val)
    spoil(Path(val.key(1)))
    found = features_of(checkpoint, val)
    assert torch.equal(found.features, whole.features[[0, 2, 3, 4, 5]])
    assert found.labels.tolist() == [0, 0, 1, 1, 1]
    assert [line.startswith(val.key(1)) for line in found.unreadable] == [True]
    assert "left out" in capsys.readouterr().err
    with pytest.raises(CheckFailed, match="1 unreadable"):
        features_of(checkpoint, val, max_corrupt=0)


def test_features_that_are_no_numbers_are_refused(tmp_path: Path, val: ImageSource) -> None:
    model = tiny_encoder()
    model.cls_token.data[0, 0, 3] = float("nan")
    with pytest.raises(CheckFailed, match="NaN"):
        features_of(write_checkpoint(tmp_path / "checkpoint", model), val)


def test_another_size_interpolates_the_positions(tmp_path: Path, val: ImageSource) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tiny_encoder())
    moved = at_image_size(read_weights(checkpoint), (12, 14))
    assert moved.encoder_config.grid_size == (6, 7)
    assert moved.metadata.preprocess["image_size"] == [12, 14]
    assert torch.equal(
        moved.tensors["pos_embed"], interpolate_position_embedding(tiny_encoder().pos_embed.detach(), (3, 5), (6, 7))
    )
    assert not torch.equal(
        features_of(checkpoint, val, image_size=[12, 14]).features, features_of(checkpoint, val).features
    )


def test_random_weights_of_the_same_network_differ_by_seed(tmp_path: Path, val: ImageSource) -> None:
    loaded = read_weights(write_checkpoint(tmp_path / "checkpoint", tiny_mae(), licence="CC-BY-NC-4.0"))
    config = FeaturesConfig(num_workers=0)
    found = [
        extract(EncoderFeatures(random_like(loaded, seed), config, "cpu"), val, config).features for seed in (0, 0, 1)
    ]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    made = random_like(loaded, 0)
    assert (made.metadata.kind, made.metadata.licence) == ("encoder", "own")
    assert made.encoder_config == from_dict(EncoderConfig, loaded.metadata.encoder)
    assert made.encoder_config.width == ENCODER.width


def test_bf16_is_near_and_not_the_same(tmp_path: Path, val: ImageSource) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tiny_encoder())
    half, full = (features_of(checkpoint, val, precision=precision).features for precision in ("bf16", "fp32"))
    assert half.dtype == torch.float32
    assert not torch.equal(half, full)
    assert torch.nn.functional.cosine_similarity(half, full).min() > 0.999


def test_fp16_needs_a_gpu(tmp_path: Path, val: ImageSource) -> None:
    with pytest.raises(MissingDependency, match="fp16"):
        features_of(write_checkpoint(tmp_path / "checkpoint", tiny_encoder()), val, precision="fp16")
