"""A frozen network is what its taps need and no more, at the size at which its grid fits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mae_deploy.models.mae import MaskedAutoencoder
from mae_deploy.models.masking import Masking
from mae_deploy.models.position import interpolate_position_embedding
from mae_deploy.models.taps import Tap, tapped
from mae_deploy.models.vit import Encoder
from mae_deploy.weights.frozen import frozen, image_size_for, normalised, resize_images
from mae_deploy.weights.load import LoadedWeights, at_image_size
from tests.models.tiny_models import (
    ENCODER,
    metadata_of,
    random_images,
    random_tensor,
    tiny_classifier,
    tiny_encoder,
    tiny_mae,
)

DEEP = replace(ENCODER, depth=3)


def loaded(model: Encoder) -> LoadedWeights:
    return LoadedWeights(metadata_of(model), model.state_dict(), {})


def keep(count: int = 4) -> Masking:
    ids = torch.stack([torch.randperm(15, generator=torch.Generator().manual_seed(row)) for row in range(3)])
    return Masking(ids[:, :count], ids.argsort(dim=1), (ids.argsort(dim=1) >= count).float())


# --- images ----------------------------------------------------------------------------------------------------------


def test_images_that_fit_are_not_resized() -> None:
    images = random_images()
    assert resize_images(images, (6, 10)) is images


def test_images_are_resized_without_aliases() -> None:
    images = random_tensor(2, 3, 12, 20, seed=5)
    expected = F.interpolate(images, size=(6, 10), mode="bicubic", antialias=True, align_corners=False)
    assert torch.equal(resize_images(images, (6, 10)), expected)


def test_tokens_are_normalised_in_float32() -> None:
    found = normalised(torch.tensor([[1.0, 3.0]], dtype=torch.bfloat16))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor([[-1.0, 1.0]]), rtol=0, atol=1e-5)  # eps 1e-5 below a variance of 1


# --- what is left ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 2, 3])
def test_tokens_of_the_block_on_the_visible_patches(block: int) -> None:
    """The whole encoder with a hook on that block is the reference."""
    model, images, masking = tiny_mae(DEEP), random_images(), keep()
    hooked: list[Tensor] = []
    model.blocks[block - 1].register_forward_hook(lambda *arguments: hooked.append(arguments[2]))
    model.forward_encoder(images, masking.ids_keep)
    tap = Tap("tokens", block)
    part = frozen(loaded(model), {tap})
    assert torch.equal(tapped(part, images, {tap}, masking)[tap], hooked[0])
    assert len(part.blocks) == block
    assert not any(name.startswith(("decoder", "norm", "mask_token")) for name in part.state_dict())


def test_a_block_that_gives_its_qkv_alone_has_no_mlp() -> None:
    part = frozen(loaded(tiny_encoder(DEEP)), {Tap("tokens", 1), Tap("qkv", 2)})
    assert len(part.blocks) == 2
    assert {name.split(".")[2] for name in part.state_dict() if name.startswith("blocks.1.")} == {"norm1", "attn"}
    assert not any(name.startswith("blocks.1.attn.proj") for name in part.state_dict())


def test_a_decoder_ends_where_it_is_tapped() -> None:
    model = MaskedAutoencoder(DEEP, replace(tiny_mae().decoder_config, decoder_depth=3))
    part = frozen(loaded(model), {Tap("decoder", 2)})
    assert isinstance(part, MaskedAutoencoder)
    assert [isinstance(block, nn.Identity) for block in part.decoder_blocks] == [False, False, True]
    assert isinstance(part.decoder_pred, nn.Identity)


def test_a_classifier_keeps_its_head_for_logits_alone() -> None:
    classifier = tiny_classifier("avg", DEEP)
    assert any(name.startswith("head") for name in frozen(loaded(classifier), {Tap("logits")}).state_dict())
    assert {name.split(".")[0] for name in frozen(loaded(classifier), {Tap("pooled")}).state_dict()} >= {"fc_norm"}
    assert not any(
        name.startswith(("head", "fc_norm")) for name in frozen(loaded(classifier), {Tap("tokens", 3)}).state_dict()
    )


def test_it_learns_nothing() -> None:
    part = frozen(loaded(tiny_mae(DEEP)), {Tap("tokens", 2)})
    assert not any(parameter.requires_grad for parameter in part.parameters())
    assert not part.training


def test_weights_of_half_precision_are_computed_with_in_float32() -> None:
    model = tiny_encoder()
    half = LoadedWeights(metadata_of(model), {name: tensor.half() for name, tensor in model.state_dict().items()}, {})
    assert {parameter.dtype for parameter in frozen(half, {Tap("tokens", 1)}).parameters()} == {torch.float32}


# --- another grid ----------------------------------------------------------------------------------------------------


def test_another_grid_interpolates_the_positions_of_both_parts() -> None:
    source = loaded(tiny_mae(DEEP))
    assert image_size_for(source, (2, 7)) == (4, 14)
    moved = at_image_size(source, (4, 14))
    for name in ("pos_embed", "decoder_pos_embed"):
        assert torch.equal(moved.tensors[name], interpolate_position_embedding(source.tensors[name], (3, 5), (2, 7)))
    assert moved.metadata.preprocess["image_size"] == [4, 14]
    part = frozen(moved, {Tap("tokens", 1)})
    assert tapped(part, torch.zeros(1, 3, 4, 14), {Tap("tokens", 1)})[Tap("tokens", 1)].shape == (1, 15, 20)
    assert at_image_size(source, (6, 10)) is source
    assert at_image_size(source, None) is source
