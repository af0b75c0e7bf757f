"""The arithmetic is that of an independent implementation, transformers' `ViTMAEForPreTraining`, with the same weights and noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import ViTForImageClassification, ViTMAEConfig, ViTMAEForPreTraining, ViTMAEModel
from transformers.models.vit.configuration_vit import ViTConfig

from mae_deploy.models.convert import ImportOptions, import_weights
from mae_deploy.models.load import Loaded, model_of
from mae_deploy.models.mae import MaskedAutoencoder
from mae_deploy.models.masking import Masking, random_masking
from mae_deploy.models.vit import Classifier, Encoder
from tests.models.tiny_models import fill, random_tensor

B, N = 3, 49
# 7x7 patches of 2x2 pixels, 5 heads of 4, a decoder of 3 heads of 8; 49 and 20 visible tokens take the explicit attention, see EXPLICIT_ATTENTION_TOKENS.
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
    ours = model_of(Loaded(imported.metadata, imported.tensors, {}))
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
        # Backward sums over every token of the batch: two digits more than the forward pass are lost. A key's bias has no gradient but rounding.
        assert (gradient - theirs[name]).norm() < 1e-5 * theirs[name].norm() + 1e-7 * total, name
    norms = torch.stack([gradient.norm() for gradient in ours.values() if gradient is not None]).norm()
    assert norms.item() == pytest.approx(total.item(), rel=1e-5)


def test_names_in_memory_are_read_like_names_on_disk(tmp_path: Path) -> None:
    model = hugging_face_mae()
    model.save_pretrained(tmp_path / "model")
    on_disk = import_weights(tmp_path / "model", ImportOptions())
    torch.save(model.state_dict(), tmp_path / "memory.pth")
    in_memory = import_weights(tmp_path / "memory.pth", ImportOptions(num_heads=5, decoder_num_heads=3, norm_pix_loss=True))
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
        ours = model_of(Loaded(imported.metadata, imported.tensors, {}))(images, random_masking(noise, 0.6))
        assert_close(ours.pixels, theirs(images, noise=noise).logits)


def test_an_encoder_alone(tmp_path: Path) -> None:
    theirs = fill(ViTMAEModel(ViTMAEConfig(**SIZES, mask_ratio=0.0)))
    theirs.save_pretrained(tmp_path / "model")
    imported = import_weights(tmp_path / "model", ImportOptions())
    assert imported.metadata.kind == "encoder"
    ours = model_of(Loaded(imported.metadata, imported.tensors, {}))
    assert type(ours) is Encoder
    images = random_tensor(B, 3, 14, 14)
    with torch.no_grad():
        # Noise in rising order keeps every patch in row-major order.
        assert_close(ours(images), theirs(images, noise=torch.arange(N).expand(B, N) / N).last_hidden_state)


def test_a_vit_classifier(tmp_path: Path) -> None:
    theirs = fill(ViTForImageClassification(ViTConfig(**{**SIZES, "num_labels": 7})))
    theirs.save_pretrained(tmp_path / "model")
    imported = import_weights(tmp_path / "model", ImportOptions())
    ours = model_of(Loaded(imported.metadata, imported.tensors, {}))
    assert isinstance(ours, Classifier)
    assert (ours.pool, imported.metadata.num_classes) == ("cls", 7)
    assert imported.metadata.class_names == tuple(f"LABEL_{index}" for index in range(7))
    images = random_tensor(B, 3, 14, 14)
    with torch.no_grad():
        assert_close(ours(images), theirs(images).logits)
