"""Rotary positions: angles by hand, products that depend on distances alone, subsets, streams."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mae_deploy.config import from_dict, to_dict
from mae_deploy.errors import ConfigError
from mae_deploy.models.cached import empty_cache, update
from mae_deploy.models.config import DecoderConfig, EncoderConfig, ObjectiveConfig
from mae_deploy.models.mae import MaskedAutoencoder
from mae_deploy.models.masking import random_masking
from mae_deploy.models.rotary import Rotary, angles, coordinates, frequencies, rotate
from mae_deploy.models.taps import Tap, tapped
from mae_deploy.models.vit import Encoder, gather_tokens, patchify
from tests.models.families import KINDS, family
from tests.models.tiny_models import fill, random_images, random_tensor

DINOV3, INDEX = family("DINOv3"), family("Perception Encoder")


def test_coordinates_and_frequencies_by_hand() -> None:
    # Two patches down and one across, DINOv3: the middles of the halves of [-1, 1], and of the whole.
    small = replace(DINOV3, image_size=(8, 4))
    np.testing.assert_allclose(coordinates(small), [[-0.5, 0.0], [0.5, 0.0]], atol=1e-15)
    np.testing.assert_allclose(frequencies(small), [2 * math.pi, 2 * math.pi / 10])  # base 100, pairs 0 and 1 of 2
    np.testing.assert_allclose(angles(small)[0], [-math.pi, -math.pi / 10, 0, 0])
    # Numbers of patches from 1 on, scaled from 2 and 1 to a grid of 4x4.
    np.testing.assert_allclose(coordinates(replace(INDEX, image_size=(8, 4))), [[2.0, 4.0], [4.0, 4.0]])


def test_the_products_depend_on_the_way_between_patches_alone() -> None:
    config = replace(DINOV3, rotary="index", rotary_offset=0.0)
    q, k = random_tensor(8), random_tensor(8, seed=2)
    (cos, sin), *_ = Rotary(config)(None)
    P, (_, columns) = config.num_prefix, config.grid_size
    turned = [(rotate(v[None], (cos[P:], sin[P:]))) for v in (q.expand(35, 8), k.expand(35, 8))]
    products = (turned[0][0] @ turned[1][0].T).reshape(5, columns, 5, columns)
    # One row down and two columns across, from wherever.
    assert torch.allclose(products[0, 0, 1, 2], products[3, 4, 4, 6], atol=1e-6)
    assert not torch.allclose(products[0, 0, 1, 2], products[0, 0, 2, 1], atol=1e-3)


def test_where_no_patch_is_masked_mask_tokens_change_nothing() -> None:
    decoder, objective = DecoderConfig(decoder_depth=0), ObjectiveConfig(encoder_mask_tokens=True)
    model, images = fill(MaskedAutoencoder(DINOV3, decoder, objective=objective)), random_images(DINOV3)
    with torch.no_grad():
        found = model.forward_masked_encoder(images, torch.zeros(len(images), DINOV3.num_patches))
        assert torch.equal(found, model.forward_encoder(images))


@pytest.mark.parametrize("kind", KINDS)
def test_visible_patches_are_turned_by_their_own_places(kind: str) -> None:
    model, images = fill(Encoder(family(kind))), random_images(family(kind))
    P, N = model.config.num_prefix, model.config.num_patches
    order = torch.stack([torch.randperm(N, generator=torch.Generator().manual_seed(row)) for row in range(3)])
    with torch.no_grad():
        whole, permuted = model(images), model(images, order)
        # All patches in another order are the same network; fewer are another, whose order does not matter.
        assert torch.allclose(permuted[:, P:], gather_tokens(whole[:, P:], order), atol=2e-5)
        assert torch.allclose(permuted[:, :P], whole[:, :P], atol=2e-5)
        few = model(images, order[:, :4])
        assert few.shape == (3, P + 4, 24)
        assert torch.allclose(few[:, P:].flip(1), model(images, order[:, :4].flip(1))[:, P:], atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_of_whole_frames_is_the_encoder(kind: str) -> None:
    """Keys are kept as they were turned: what an update recomputes meets them at their own places."""
    model, images = fill(Encoder(family(kind))), random_images(family(kind))
    ids = torch.randperm(35, generator=torch.Generator().manual_seed(3)).expand(3, -1)
    patches = gather_tokens(patchify(images, 4), ids)
    with torch.no_grad():
        _, cache, _ = update(model, patches, ids, empty_cache(model, 3))
        again, _, _ = update(model, patches[:, :6], ids[:, :6], cache)
        whole = model(images)
    P = model.config.num_prefix
    assert torch.allclose(again[:, P:], gather_tokens(whole[:, P:], ids[:, :6]), atol=2e-5)


def test_tables_are_in_no_file_and_follow_the_image_size() -> None:
    model = Encoder(DINOV3)
    assert not [name for name in model.state_dict() if "rope" in name or "pos_embed" in name]
    larger = Encoder(replace(DINOV3, image_size=(28, 40)))
    larger.load_state_dict(model.state_dict())
    assert larger(random_images(larger.config)).shape == (3, 5 + 70, 24)


def test_taps_leave_registers_out() -> None:
    model, images = fill(Encoder(DINOV3)), random_images(DINOV3)
    wanted = {Tap("tokens", 1), Tap("qkv", 2), Tap("latent"), Tap("cls"), Tap("pooled")}
    with torch.no_grad():
        found, latent = tapped(model, images, wanted), model(images)
    assert found[Tap("tokens", 1)].shape == (3, 36, 24)
    assert found[Tap("qkv", 2)].shape == (3, 3, 3, 36, 8)
    assert torch.allclose(found[Tap("latent")][:, 1:], latent[:, 5:], atol=1e-6)
    assert torch.allclose(found[Tap("pooled")], latent[:, 5:].mean(dim=1), atol=1e-6)


@pytest.mark.parametrize("kind", ["DINOv3", "mixed", "no prefix"])
def test_an_autoencoder_learns_with_rotary_positions(kind: str) -> None:
    torch.manual_seed(0)
    model = MaskedAutoencoder(family(kind), DecoderConfig(decoder_depth=1, decoder_embed_dim=16, decoder_num_heads=2))
    images = random_images(family(kind))
    model(images, random_masking(torch.rand(3, 35), 0.5)).loss.backward()
    trained = {name: part for name, part in model.named_parameters() if part.requires_grad}
    assert [name for name, part in trained.items() if part.grad is None] == []


def test_only_what_differs_is_beyond_plain() -> None:
    assert EncoderConfig().beyond_plain() == {}
    assert EncoderConfig(rotary="dinov3").beyond_plain() == {"rotary": "dinov3", "position_table": False}
    assert from_dict(EncoderConfig, to_dict(DINOV3)) == DINOV3


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"rotary": "dinov3", "num_heads": 4}, "multiple of 4, not 6"),
        ({"pool_heads": 7}, "pool_heads, 7"),
        ({"rotary": "dinov3", "band_groups": ((0,), (1, 2))}, "--band-groups does not go with"),
    ],
)
def test_what_does_not_go_together_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        replace(family("SigLIP"), **given)
