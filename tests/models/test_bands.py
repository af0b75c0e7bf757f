"""Groups of bands: tokens of their own, a code for each group, masks for each or the same for all; without groups
nothing changes.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from mae_deploy.checkpoint import Metadata
from mae_deploy.config import from_dict, to_dict
from mae_deploy.errors import ConfigError
from mae_deploy.models.bands import feature_map, join_bands, split_bands, spread_over_bands
from mae_deploy.models.config import DecoderConfig, EncoderConfig, ObjectiveConfig
from mae_deploy.models.mae import MaskedAutoencoder
from mae_deploy.models.masking import Masking, masking_of, random_masking
from mae_deploy.models.position import sincos_position_embedding
from mae_deploy.models.vit import Classifier, Encoder, patchify
from mae_deploy.training.optim.groups import layer_decay_groups
from mae_deploy.weights.frozen import image_size_for
from mae_deploy.weights.load import LoadedWeights, encoder_of, model_of, start_from
from tests.models.tiny_models import (
    CLASSES,
    DECODER,
    ENCODER,
    fill,
    metadata_of,
    random_images,
    random_tensor,
    tiny_encoder,
    tiny_mae,
)

GROUPS = ((0, 3), (4,), (1, 2))
"""Neither in order nor of one size."""
BANDS = replace(ENCODER, in_chans=5, band_groups=GROUPS)
"""3x5 patches of 2x2 pixels in each of 3 groups: 45 tokens, 20 wide, 4 of which tell the group."""
N = 15


def masking(ratio: float = 0.6, batch: int = 3) -> Masking:
    return random_masking(torch.rand(batch, BANDS.num_tokens, generator=torch.Generator().manual_seed(2)), ratio)


# --- configuration ---------------------------------------------------------------------------------------------------


def test_groups_are_written_with_semicolons() -> None:
    config = from_dict(EncoderConfig, {**to_dict(BANDS), "band_groups": "0,3; 4; 1,2"})
    assert config == BANDS
    assert from_dict(EncoderConfig, to_dict(config)) == BANDS
    assert (config.num_groups, config.num_tokens, config.group_dim) == (3, 45, 4)
    assert (ENCODER.num_groups, ENCODER.num_tokens, ENCODER.group_dim) == (1, 15, 0)


@pytest.mark.parametrize("name", ["vit_base_patch16", "vit_large_patch16", "vit_huge_patch14"])
def test_the_codes_widths_are_satmaes(name: str) -> None:
    assert EncoderConfig(name=name, in_chans=5, band_groups=GROUPS).group_dim == 256


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ("0,3;4;1", "band 2 0 times"),
        ("0,3;4;1,2,3", "band 3 2 times"),
        ("0,3;4;1,2,5", "band 5 of 5"),
        ("0,3;4;1,-2", "band -2 of 5"),
        ([[0, 3], [], [1, 2, 4]], "an empty group"),
        ([], "an empty group"),
        ("0,3;4;one", "'one' is not a whole number"),
    ],
)
def test_every_band_is_in_one_group(groups: str | list[list[int]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(EncoderConfig, {**to_dict(BANDS), "band_groups": groups})


def test_other_targets_are_refused() -> None:
    for objective in (ObjectiveConfig(target="pca", target_dim=3), ObjectiveConfig(encoder_mask_tokens=True)):
        with pytest.raises(ConfigError, match="--band-groups"):
            MaskedAutoencoder(BANDS, DECODER, objective=objective)


# --- patches and tokens ----------------------------------------------------------------------------------------------


def test_patches_are_split_by_group_and_joined_again() -> None:
    images = random_images(BANDS)
    patches = patchify(images, 2)
    parts = split_bands(patches, GROUPS)
    for group, part in zip(GROUPS, parts, strict=True):
        assert torch.equal(part, patchify(images[:, list(group)], 2))
    assert torch.equal(join_bands(parts, GROUPS), patches)


def test_a_mask_of_tokens_covers_the_pixels_of_their_bands() -> None:
    mask = masking().mask
    pixels = spread_over_bands(mask, GROUPS, 2).unflatten(-1, (4, 5))
    for group, bands in enumerate(GROUPS):
        for band in bands:
            assert torch.equal(pixels[..., band], mask[:, group * N : (group + 1) * N, None].expand(-1, -1, 4))


def test_names_and_shapes_are_satmaes() -> None:
    state = MaskedAutoencoder(BANDS, DECODER).state_dict()
    shapes = {
        name: tuple(tensor.shape) for name, tensor in state.items() if "blocks" not in name and "norm" not in name
    }
    assert shapes == {
        "cls_token": (1, 1, 20),
        "pos_embed": (1, 16, 16),
        "channel_embed": (1, 3, 4),
        **{f"patch_embed.{group}.proj.weight": (20, bands, 2, 2) for group, bands in enumerate((2, 1, 2))},
        **{f"patch_embed.{group}.proj.bias": (20,) for group in range(3)},
        "mask_token": (1, 1, 12),
        "decoder_pos_embed": (1, 16, 8),
        "decoder_channel_embed": (1, 4, 4),
        "decoder_embed.weight": (12, 20),
        "decoder_embed.bias": (12,),
        **{f"decoder_pred.{group}.weight": (4 * bands, 12) for group, bands in enumerate((2, 1, 2))},
        **{f"decoder_pred.{group}.bias": (4 * bands,) for group, bands in enumerate((2, 1, 2))},
    }


def test_positions_are_those_of_the_place_beside_the_code_of_the_group() -> None:
    model = MaskedAutoencoder(BANDS, DECODER)
    places = sincos_position_embedding(16, (3, 5))[0]
    for group in range(3):
        code = torch.tensor(
            [np.sin(group), np.sin(group / 100), np.cos(group), np.cos(group / 100)], dtype=torch.float32
        )
        rows = model.positions()[0, 1 + group * N : 1 + (group + 1) * N]
        assert torch.equal(rows[:, :16], places[1:])
        torch.testing.assert_close(rows[:, 16:], code.expand(N, 4))
    assert not model.positions()[0, 0].any()
    torch.testing.assert_close(
        model.decoder_positions()[0, 0, 8:],
        torch.tensor([np.sin(3), np.sin(3 / 100), np.cos(3), np.cos(3 / 100)]).float(),
    )


def test_each_groups_tokens_see_its_own_bands_only() -> None:
    model, images = fill(Encoder(BANDS)), random_images(BANDS)
    before = model.embed(images)[:, 1:].unflatten(1, (3, N))
    images[:, 4] += 1
    changed = (model.embed(images)[:, 1:].unflatten(1, (3, N)) != before).flatten(2).any(dim=2)
    assert changed.tolist() == [[False, True, False]] * 3


def test_tokens_are_picked_group_by_group() -> None:
    model, images = fill(Encoder(BANDS)), random_images(BANDS)
    ids = torch.stack([torch.randperm(45, generator=torch.Generator().manual_seed(seed))[:7] for seed in range(3)])
    everything = model.embed(images)
    torch.testing.assert_close(
        model.embed(images, ids),
        torch.cat([everything[:, :1], everything[:, 1:].gather(1, ids[..., None].expand(-1, -1, 20))], dim=1),
    )


def test_one_group_of_all_bands_is_the_plain_encoder_with_other_positions() -> None:
    plain, grouped = tiny_encoder(), fill(Encoder(replace(ENCODER, band_groups=((0, 1, 2),))))
    tensors = {
        name.replace("patch_embed.", "patch_embed.0."): tensor
        for name, tensor in plain.state_dict().items()
        if name != "pos_embed"
    }
    grouped.load_state_dict(tensors, strict=False)
    with torch.no_grad():
        plain.pos_embed.copy_(grouped.positions())
    images = random_images()
    torch.testing.assert_close(grouped(images), plain(images))


# --- the autoencoder -------------------------------------------------------------------------------------------------


def by_hand(model: MaskedAutoencoder, images: Tensor, masking: Masking, pixels: Tensor) -> float:
    """The loss, token by token."""
    errors = []
    for image, hidden, predicted in zip(images, masking.mask, pixels, strict=True):
        for token in hidden.nonzero()[:, 0].tolist():
            group, place = divmod(token, N)
            bands, (row, column) = list(GROUPS[group]), divmod(place, 5)
            target = image[bands, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            if model.norm_pix_loss:
                target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
            errors.append((predicted[place].reshape(2, 2, 5)[..., bands].permute(2, 0, 1) - target).square().mean())
    return torch.stack(errors).mean().item()


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_the_loss_is_the_mean_over_masked_patches_of_groups(norm_pix_loss: bool) -> None:
    model, images, masks = tiny_mae(BANDS, norm_pix_loss=norm_pix_loss), random_images(BANDS), masking()
    loss, pixels = model(images, masks)
    assert pixels.shape == (3, N, 20)
    assert loss.item() == pytest.approx(by_hand(model, images, masks, pixels), rel=1e-5)
    target = model.target(images)
    assert float(model.forward_loss(images, target, masks.mask)) == 0
    torch.testing.assert_close(model.predicted_patches(images, target), patchify(images, 2))


def test_what_is_hidden_does_not_matter_to_the_prediction() -> None:
    """A place that is masked in one group is seen in the others: only the masked bands there may change."""
    model, images, masks = tiny_mae(BANDS, norm_pix_loss=False), random_images(BANDS), masking()
    hidden = spread_over_bands(masks.mask, GROUPS, 2).bool()
    patches = patchify(images, 2)
    noisy = torch.where(hidden, patches + random_tensor(*patches.shape), patches)
    others = noisy.reshape(3, 3, 5, 2, 2, 5).permute(0, 5, 1, 3, 2, 4).reshape(images.shape)
    assert torch.equal(model(images, masks).pixels, model(others, masks).pixels)


def test_consistent_masks_hide_the_same_places_in_every_group() -> None:
    noise = torch.rand(2, 45, generator=torch.Generator().manual_seed(3))
    masks = masking_of("random", noise, 0.6, (3, 5), group_masking="consistent")
    places = masking_of("random", noise[:, :N], 0.6, (3, 5))
    assert torch.equal(masks.mask.unflatten(1, (3, N)), places.mask[:, None].expand(-1, 3, -1))
    assert torch.equal(
        masks.ids_keep.unflatten(1, (3, 6)) - N * torch.arange(3)[:, None], places.ids_keep[:, None].expand(-1, 3, -1)
    )
    # ids_restore undoes the shuffle: first all that is kept, then the rest.
    shuffled = masks.ids_restore.argsort(dim=1)
    assert torch.equal(shuffled[:, :18], masks.ids_keep)
    assert torch.equal(masks.mask.gather(1, shuffled).sum(dim=1), torch.full((2,), 27.0))
    independent = masking_of("random", noise, 0.6, (3, 5)).mask.unflatten(1, (3, N))
    assert not torch.equal(independent[:, 0], independent[:, 1])
    assert torch.equal(masking_of("random", noise[:, :N], 0.6, (3, 5), group_masking="consistent").mask, places.mask)


def test_it_trains() -> None:
    torch.manual_seed(0)
    model, images, masks = MaskedAutoencoder(BANDS, DECODER), random_images(BANDS), masking()
    optimiser = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=2e-2)
    losses = []
    for _ in range(10):
        optimiser.zero_grad()
        loss = model(images, masks).loss
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    fixed = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert fixed == {"pos_embed", "channel_embed", "decoder_pos_embed", "decoder_channel_embed"}


# --- what is made of it ----------------------------------------------------------------------------------------------


def loaded(model: Encoder) -> LoadedWeights:
    metadata: Metadata = metadata_of(model)
    return LoadedWeights(metadata, model.state_dict(), {})


def test_a_checkpoint_is_loaded_whole_or_as_its_encoder() -> None:
    model = tiny_mae(BANDS)
    found = model_of(loaded(model))
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in found.state_dict().items())
    images = random_images(BANDS)
    assert torch.equal(encoder_of(loaded(model))(images), model.forward_encoder(images))


def test_a_classifier_starts_from_it_at_another_size() -> None:
    source = tiny_mae(BANDS)
    target = start_from(Classifier(replace(BANDS, image_size=(8, 6)), num_classes=CLASSES), loaded(source))
    assert target.pos_embed.shape == (1, 13, 16)
    assert torch.equal(target.channel_embed, source.channel_embed)
    assert target(random_tensor(2, 5, 8, 6)).shape == (2, CLASSES)
    with pytest.raises(ConfigError, match="band_groups"):
        start_from(Classifier(replace(BANDS, band_groups=None), num_classes=CLASSES), loaded(source))


def test_fine_tuning_counts_the_codes_among_the_embeddings() -> None:
    model = Classifier(BANDS, num_classes=CLASSES)
    model.channel_embed.requires_grad_(True)
    (group,) = (group for group in layer_decay_groups(model, 0.05, 0.5) if "channel_embed" in group["names"])
    assert "cls_token" in group["names"]
    assert (group["weight_decay"], group["lr_scale"]) == (0.0, 0.5**3)


def test_the_feature_map_is_the_mean_over_the_groups_that_are_seen() -> None:
    tokens = random_tensor(1, 4, 2)
    ids = torch.tensor([[0, N, 2 * N + 14, 7]])  # place 0 in two groups, place 14 and place 7 in one
    found = feature_map(tokens, ids, BANDS)[0].flatten(1).T
    torch.testing.assert_close(found[0], (tokens[0, 0] + tokens[0, 1]) / 2)
    torch.testing.assert_close(found[14], tokens[0, 2])
    torch.testing.assert_close(found[7], tokens[0, 3])
    assert not found[[1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13]].any()
    everything = random_tensor(2, 45, 3)
    torch.testing.assert_close(
        feature_map(everything, None, BANDS),
        everything.unflatten(1, (3, N)).mean(dim=1).transpose(1, 2).reshape(2, 3, 3, 5),
    )


def test_no_student_follows_tokens_of_groups() -> None:
    with pytest.raises(ConfigError, match="groups of bands"):
        image_size_for(loaded(tiny_encoder(BANDS)), (3, 5))


def test_the_decoder_may_have_any_width() -> None:
    for width, code in ((8, 4), (64, 16), (512, 128)):
        model = MaskedAutoencoder(BANDS, DecoderConfig(decoder_depth=1, decoder_embed_dim=width, decoder_num_heads=2))
        assert model.decoder_channel_embed.shape == (1, 4, code)
