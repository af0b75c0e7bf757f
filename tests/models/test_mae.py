"""The autoencoder: what its tensors are called, what it predicts, and a loss that can be checked by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mae_deploy.errors import ConfigError
from mae_deploy.models.config import DecoderConfig, EncoderConfig, ObjectiveConfig
from mae_deploy.models.mae import MaskedAutoencoder
from mae_deploy.models.masking import Masking, random_masking
from mae_deploy.models.position import sincos_position_embedding
from mae_deploy.models.vit import Encoder, patchify, unpatchify
from mae_deploy.weights.load import build_model
from tests.models.tiny_models import DECODER, ENCODER, fill, metadata_of, random_images, random_tensor, tiny_mae

N = ENCODER.num_patches

# One block of width 20 on 2x2 pixels of 3 channels, one of width 12 behind it: the names that every checkpoint of this
# family has.
NAMES = {
    "cls_token": (1, 1, 20),
    "pos_embed": (1, 16, 20),
    "patch_embed.proj.weight": (20, 3, 2, 2),
    "patch_embed.proj.bias": (20,),
    "blocks.0.norm1.weight": (20,),
    "blocks.0.norm1.bias": (20,),
    "blocks.0.attn.qkv.weight": (60, 20),
    "blocks.0.attn.qkv.bias": (60,),
    "blocks.0.attn.proj.weight": (20, 20),
    "blocks.0.attn.proj.bias": (20,),
    "blocks.0.norm2.weight": (20,),
    "blocks.0.norm2.bias": (20,),
    "blocks.0.mlp.fc1.weight": (80, 20),
    "blocks.0.mlp.fc1.bias": (80,),
    "blocks.0.mlp.fc2.weight": (20, 80),
    "blocks.0.mlp.fc2.bias": (20,),
    "norm.weight": (20,),
    "norm.bias": (20,),
    "decoder_embed.weight": (12, 20),
    "decoder_embed.bias": (12,),
    "mask_token": (1, 1, 12),
    "decoder_pos_embed": (1, 16, 12),
    "decoder_blocks.0.norm1.weight": (12,),
    "decoder_blocks.0.norm1.bias": (12,),
    "decoder_blocks.0.attn.qkv.weight": (36, 12),
    "decoder_blocks.0.attn.qkv.bias": (36,),
    "decoder_blocks.0.attn.proj.weight": (12, 12),
    "decoder_blocks.0.attn.proj.bias": (12,),
    "decoder_blocks.0.norm2.weight": (12,),
    "decoder_blocks.0.norm2.bias": (12,),
    "decoder_blocks.0.mlp.fc1.weight": (48, 12),
    "decoder_blocks.0.mlp.fc1.bias": (48,),
    "decoder_blocks.0.mlp.fc2.weight": (12, 48),
    "decoder_blocks.0.mlp.fc2.bias": (12,),
    "decoder_norm.weight": (12,),
    "decoder_norm.bias": (12,),
    "decoder_pred.weight": (12, 12),
    "decoder_pred.bias": (12,),
}


def masking_of(batch: int = 3, mask_ratio: float = 0.6, seed: int = 4) -> Masking:
    return random_masking(torch.rand(batch, N, generator=torch.Generator().manual_seed(seed)), mask_ratio)


def grey_mae(*, norm_pix_loss: bool) -> MaskedAutoencoder:
    """2x2 pixels a patch, one channel, three patches in a row: small enough for a hand."""
    config = EncoderConfig(name="grey", image_size=(2, 6), patch_size=2, in_chans=1, embed_dim=4, depth=1, num_heads=1)
    return MaskedAutoencoder(
        config, DecoderConfig(decoder_depth=1, decoder_embed_dim=4, decoder_num_heads=1), norm_pix_loss=norm_pix_loss
    )


def grey_image(*patches: tuple[float, float, float, float]) -> Tensor:
    return unpatchify(torch.tensor([patches], dtype=torch.float32), 2, (1, len(patches)))


# --- names and starting weights --------------------------------------------------------------------------------------


def test_state_dict_names_are_the_originals() -> None:
    model = MaskedAutoencoder(
        EncoderConfig(name="one", image_size=(6, 10), patch_size=2, embed_dim=20, depth=1, num_heads=5), DECODER
    )
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == NAMES


def test_fixed_tables_are_not_trained() -> None:
    model = MaskedAutoencoder(ENCODER, DECODER)
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == [
        "pos_embed",
        "decoder_pos_embed",
    ]
    assert torch.equal(model.decoder_pos_embed, sincos_position_embedding(12, (3, 5)))


def test_decoder_starts_as_in_the_paper() -> None:
    torch.manual_seed(0)
    model = MaskedAutoencoder(ENCODER, DecoderConfig(decoder_depth=1, decoder_embed_dim=1200, decoder_num_heads=3))
    # 1,200 numbers estimate their spread to about 2 %, five times that is allowed.
    assert model.mask_token.std().item() == pytest.approx(0.02, rel=0.1)
    linear = [
        module for name, module in model.named_modules() if name.startswith("decoder") and isinstance(module, nn.Linear)
    ]
    assert len(linear) == 1 + 4 + 1
    for layer in linear:
        bound = math.sqrt(6 / (layer.in_features + layer.out_features))
        assert 0.99 * bound < layer.weight.abs().max().item() <= bound
        assert not layer.bias.any()
    norms = [
        module
        for name, module in model.named_modules()
        if name.startswith("decoder") and isinstance(module, nn.LayerNorm)
    ]
    assert len(norms) == 3
    assert {norm.eps for norm in norms} == {1e-6}


# --- target and loss -------------------------------------------------------------------------------------------------


def test_normalised_target_by_hand() -> None:
    target = grey_mae(norm_pix_loss=True).target(grey_image((0, 2, 4, 6), (5, 5, 5, 5), (-1e-3, 1e-3, 1e-3, -1e-3)))
    # Means 3, 5, 0; unbiased variances 20/3, 0, 4/3 of a millionth, where the epsilon inside the root counts; the
    # constant patch does not divide by zero.
    first, third = 1 / math.sqrt(20 / 3 + 1e-6), 1e-3 / math.sqrt(4e-6 / 3 + 1e-6)
    expected = [[-3 * first, -first, first, 3 * first], [0] * 4, [-third, third, third, -third]]
    # float32 rounding of numbers near 1.
    assert target[0].tolist() == [pytest.approx(row, rel=0, abs=1e-6) for row in expected]


def test_plain_target_is_the_pixels() -> None:
    images = random_images()
    assert torch.equal(tiny_mae(norm_pix_loss=False).target(images), patchify(images, 2))


def test_loss_by_hand() -> None:
    model = grey_mae(norm_pix_loss=False)
    images = torch.zeros(2, 1, 2, 6)
    errors = torch.tensor(
        [[[1.0, 2, 3, 4], [100, 100, 100, 100], [0, 0, 0, 2]], [[50.0, 50, 50, 50], [0, 0, 0, 0], [-4, 0, 0, 0]]]
    )
    mask = torch.tensor([[1.0, 0, 1], [0, 1, 1]])
    # Means of the masked patches' squares: 30 / 4, 4 / 4, 0, 16 / 4; their mean is 12.5 / 4.
    assert model.forward_loss(images, errors, mask).item() == 3.125


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_a_perfect_prediction_costs_nothing(norm_pix_loss: bool) -> None:
    model, images, mask = tiny_mae(norm_pix_loss=norm_pix_loss), random_images(), masking_of().mask
    target = model.target(images)
    assert model.forward_loss(images, target, mask).item() == 0
    # An error of d everywhere costs d², whatever its sign. float32 sums of 324 squares of numbers near 1.
    for error in (0.5, -0.5):
        assert model.forward_loss(images, target + error, mask).item() == pytest.approx(0.25, rel=1e-5)


def test_only_masked_patches_count() -> None:
    model, images, masking = tiny_mae(), random_images(), masking_of()
    pixels = torch.randn(3, N, 12, generator=torch.Generator().manual_seed(6))
    loss = model.forward_loss(images, pixels, masking.mask)
    visible = (1 - masking.mask).unsqueeze(-1)
    assert torch.equal(model.forward_loss(images, pixels + 7 * visible, masking.mask), loss)
    assert model.forward_loss(images, pixels + 7 * (1 - visible), masking.mask) > loss + 1


def test_loss_is_float32_for_half_precision_predictions() -> None:
    model, images, mask = tiny_mae(), random_images(), masking_of().mask
    pixels = torch.randn(3, N, 12, generator=torch.Generator().manual_seed(6)).bfloat16()
    loss = model.forward_loss(images, pixels, mask)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, model.forward_loss(images, pixels.float(), mask))


# --- forward ---------------------------------------------------------------------------------------------------------


def test_forward_joins_encoder_decoder_and_loss() -> None:
    model, images, masking = tiny_mae(), random_images(), masking_of()
    output = model(images, masking)
    latent = model.forward_encoder(images, masking.ids_keep)
    assert latent.shape == (3, 1 + 6, 20)
    assert output.pixels.shape == (3, N, 12)
    assert torch.equal(output.pixels, model.forward_decoder(latent, masking.ids_restore))
    assert torch.equal(output.loss, model.forward_loss(images, output.pixels, masking.mask))
    assert output.loss.shape == ()


def test_hidden_pixels_do_not_leak_into_the_prediction() -> None:
    model, images, masking = tiny_mae(), random_images(), masking_of()
    noisy = unpatchify(patchify(images, 2) + 9 * masking.mask.unsqueeze(-1), 2, ENCODER.grid_size)
    with torch.no_grad():
        assert torch.equal(model(noisy, masking).pixels, model(images, masking).pixels)


def test_the_order_of_visible_patches_does_not_matter() -> None:
    model, images = tiny_mae(), random_images(batch=1)
    kept, hidden = [3, 11, 0, 7], [patch for patch in range(N) if patch not in (3, 11, 0, 7)]
    predictions = []
    for order in (kept, kept[::-1]):
        shuffled = torch.tensor([order + hidden])
        with torch.no_grad():
            predictions.append(
                model.forward_decoder(model.forward_encoder(images, shuffled[:, :4]), shuffled.argsort(dim=1))
            )
    # Attention sums over the tokens in another order.
    torch.testing.assert_close(*predictions, rtol=0, atol=1e-5)
    assert (predictions[0][0, 3] - predictions[0][0, 11]).abs().max() > 0.1, (
        "predictions are alike, so their order cannot show"
    )


def test_every_trained_parameter_gets_a_gradient() -> None:
    model = tiny_mae()
    model(random_images(), masking_of()).loss.backward()
    assert [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.any())
    ] == []


@pytest.mark.parametrize(
    "sizes",
    [
        {"decoder_depth": -1},
        {"decoder_embed_dim": 12, "decoder_num_heads": 5},
        {"decoder_embed_dim": 10, "decoder_num_heads": 5},
    ],
)
def test_impossible_decoders_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="decoder"):
        DecoderConfig(**sizes)


@pytest.mark.parametrize(
    ("width", "heads"), [(128, 4), (256, 8), (512, 16), (768, 24), (1024, 32), (16, 1), (100, 2), (96, 3)]
)
def test_decoder_heads_follow_the_width(width: int, heads: int) -> None:
    """One for every 32, as the paper's 16 of 512; fewer where that does not divide."""
    assert DecoderConfig(decoder_embed_dim=width).decoder_num_heads == heads
    assert DecoderConfig(decoder_embed_dim=width, decoder_num_heads=1).heads == 1


# --- other losses ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        # Errors 1, -2, 0, 0.5 on the masked patch and 4 everywhere on the visible one.
        ({}, (1 + 4 + 0 + 0.25) / 4),
        ({"loss": "l1"}, 3.5 / 4),
        ({"loss": "smooth_l1"}, (0.5 + 1.5 + 0 + 0.125) / 4),
        ({"loss_on": "all"}, ((1 + 4 + 0 + 0.25) / 4 + 16) / 2),
        ({"loss": "l1", "loss_on": "all"}, (3.5 / 4 + 4) / 2),
    ],
)
def test_other_losses_by_hand(objective: dict[str, Any], expected: float) -> None:
    config = EncoderConfig(name="grey", image_size=(2, 4), patch_size=2, in_chans=1, embed_dim=4, depth=1, num_heads=1)
    model = MaskedAutoencoder(
        config,
        grey_mae(norm_pix_loss=False).decoder_config,
        norm_pix_loss=False,
        objective=ObjectiveConfig(**objective),
    )
    predicted = torch.tensor([[[1, -2, 0, 0.5], [4, 4, 4, 4]]])
    assert model.forward_loss(torch.zeros(1, 1, 2, 4), predicted, torch.tensor([[1.0, 0]])).item() == expected


# --- mask tokens in the encoder --------------------------------------------------------------------------------------

IN_ENCODER = ObjectiveConfig(encoder_mask_tokens=True)


@pytest.mark.parametrize("depth", [1, 0])
def test_the_encoder_sees_a_mask_token_in_every_masked_place(depth: int) -> None:
    """Against a plain encoder whose embedded patches are replaced by hand, one by one."""
    model = fill(MaskedAutoencoder(ENCODER, replace(DECODER, decoder_depth=depth), objective=IN_ENCODER))
    images, masking = random_images(), masking_of()
    tokens = model.embed(images)
    for image, patch in masking.mask.nonzero().tolist():
        tokens[image, 1 + patch] = model.mask_token[0, 0] + model.pos_embed[0, 1 + patch]
    for block in model.blocks:
        tokens = block(tokens)
    latent = model.norm(tokens)
    if depth:
        decoded = model.decoder_embed(latent) + model.decoder_pos_embed
        latent = model.decoder_norm(model.decoder_blocks[0](decoded))
    # Attention in another order of sums.
    torch.testing.assert_close(model(images, masking).pixels, model.decoder_pred(latent)[:, 1:], rtol=0, atol=1e-5)


def test_what_the_mask_token_hides_does_not_leak() -> None:
    model, images, masking = (
        fill(MaskedAutoencoder(ENCODER, DECODER, objective=IN_ENCODER)),
        random_images(),
        masking_of(),
    )
    noisy = unpatchify(patchify(images, 2) + 9 * masking.mask.unsqueeze(-1), 2, ENCODER.grid_size)
    with torch.no_grad():
        assert torch.equal(model(noisy, masking).pixels, model(images, masking).pixels)


def test_the_mask_token_is_as_wide_as_the_encoder_and_a_linear_head_needs_nothing_else() -> None:
    deep = MaskedAutoencoder(ENCODER, DECODER, objective=IN_ENCODER).state_dict()
    assert (deep["mask_token"].shape, set(deep)) == ((1, 1, 20), set(MaskedAutoencoder(ENCODER, DECODER).state_dict()))
    linear = MaskedAutoencoder(ENCODER, replace(DECODER, decoder_depth=0), objective=IN_ENCODER)
    assert set(linear.state_dict()) - set(Encoder(ENCODER).state_dict()) == {
        "mask_token",
        "decoder_pred.weight",
        "decoder_pred.bias",
    }
    assert linear.decoder_pred.weight.shape == (12, 20)
    linear(random_images(), masking_of()).loss.backward()
    assert [
        name for name, parameter in linear.named_parameters() if parameter.requires_grad and parameter.grad is None
    ] == []


def test_no_decoder_without_mask_tokens() -> None:
    with pytest.raises(ConfigError, match="--decoder-depth 0 leaves masked patches without a token"):
        MaskedAutoencoder(ENCODER, replace(DECODER, decoder_depth=0))


# --- other targets ---------------------------------------------------------------------------------------------------


def test_features_are_given_to_the_model() -> None:
    model = fill(MaskedAutoencoder(ENCODER, DECODER, objective=ObjectiveConfig(target="features", target_dim=7)))
    images, masking = random_images(), masking_of()
    target = random_tensor(3, N, 7, seed=8)
    output = model(images, masking, target)
    assert output.pixels.shape == (3, N, 7)
    expected = ((output.pixels - target).square().mean(dim=-1) * masking.mask).sum() / masking.mask.sum()
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-6)  # float32
    with pytest.raises(ValueError, match="given to the model"):
        model(images, masking)


def test_the_components_of_the_patches() -> None:
    """`norm_pix_loss` normalises the patches before they are projected, and pictures undo both."""
    for norm_pix_loss in (True, False):
        model = MaskedAutoencoder(
            ENCODER, DECODER, norm_pix_loss=norm_pix_loss, objective=ObjectiveConfig(target="pca", target_dim=12)
        )
        assert model.pca is not None
        images = random_images()
        patches = model.patches(images).flatten(0, 1)
        model.pca.fit(len(patches), patches.sum(dim=0).double(), (patches.T @ patches).double())
        target = model.target(images)
        assert target.shape == (3, N, 12)
        # All twelve components of twelve numbers lose nothing; float32.
        torch.testing.assert_close(model.predicted_patches(images, target), patchify(images, 2), rtol=0, atol=1e-4)
        assert model(images, masking_of()).pixels.shape == (3, N, 12)


def test_more_components_than_numbers_are_refused() -> None:
    assert (
        MaskedAutoencoder(ENCODER, DECODER, objective=ObjectiveConfig(target="pca")).decoder_pred.out_features == 12
    )  # 96 at most
    with pytest.raises(ConfigError, match="--target-dim 13 is more than the 12 numbers of a patch"):
        MaskedAutoencoder(ENCODER, DECODER, objective=ObjectiveConfig(target="pca", target_dim=13))
    with pytest.raises(ConfigError, match="--target-dim 5 needs --target pca"):
        ObjectiveConfig(target_dim=5)
    with pytest.raises(ConfigError, match="--target-dim must be at least 1, got 0"):
        ObjectiveConfig(target="pca", target_dim=0)


def test_a_checkpoint_says_what_its_decoder_predicts() -> None:
    objective = ObjectiveConfig(target="pca", target_dim=5, loss="l1")
    model = fill(MaskedAutoencoder(ENCODER, DECODER, norm_pix_loss=False, objective=objective))
    built = build_model(metadata_of(model))
    assert isinstance(built, MaskedAutoencoder)
    assert (built.objective, built.norm_pix_loss) == (objective, False)
    built.load_state_dict(model.state_dict())
    # A checkpoint from before there were objectives predicts pixels.
    before = build_model(replace(metadata_of(tiny_mae()), objective=None))
    assert isinstance(before, MaskedAutoencoder)
    assert before.objective == ObjectiveConfig()
