"""Taps: each is what the network computes there, nothing runs that is not needed, and what is said to have no gradient
has none.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from mae_deploy.models import vit
from mae_deploy.models.config import DecoderConfig, ObjectiveConfig
from mae_deploy.models.mae import MaskedAutoencoder
from mae_deploy.models.masking import Masking, random_masking
from mae_deploy.models.taps import Tap, encoder_depth, tapped, unreached
from mae_deploy.models.vit import Encoder, run_block
from tests.models.tiny_models import (
    DECODER,
    ENCODER,
    fill,
    random_images,
    random_tensor,
    tiny_classifier,
    tiny_encoder,
    tiny_mae,
)

DEEP = replace(ENCODER, depth=3)
N = ENCODER.num_patches


def masking(batch: int = 3) -> Masking:
    return random_masking(torch.rand(batch, N, generator=torch.Generator().manual_seed(4)), 0.5)


def deep_mae() -> MaskedAutoencoder:
    return fill(MaskedAutoencoder(DEEP, replace(DECODER, decoder_depth=2)))


class Called:
    """The numbers of calls of a model's blocks, encoder first."""

    def __init__(self, model: Encoder) -> None:
        self.blocks = [module for module in model.modules() if isinstance(module, Block)]
        self.counts = [0] * len(self.blocks)
        for index, block in enumerate(self.blocks):
            block.register_forward_hook(lambda *_, index=index: self._count(index))

    def _count(self, index: int) -> None:
        self.counts[index] += 1


# --- values ----------------------------------------------------------------------------------------------------------


def test_the_whole_way_of_an_autoencoder() -> None:
    model, images, view = deep_mae(), random_images(), masking()
    kinds = [Tap("latent"), Tap("cls"), Tap("pooled"), Tap("pixels"), Tap("tokens", 3)]
    taps = tapped(model, images, kinds, view)
    latent = model.forward_encoder(images, view.ids_keep)
    assert torch.equal(taps[Tap("latent")], latent)
    assert torch.equal(taps[Tap("cls")], latent[:, 0])
    assert torch.equal(taps[Tap("pooled")], latent[:, 1:].mean(dim=1))
    assert torch.equal(taps[Tap("pixels")], model(images, view).pixels)
    assert torch.equal(model.norm(taps[Tap("tokens", 3)]), latent)
    assert list(taps) == [Tap("tokens", 3), *kinds[:4]]


@pytest.mark.parametrize("pool", ["avg", "cls"])
def test_a_classifier(pool: Any) -> None:
    model, images, ids_keep = tiny_classifier(pool), random_images(), masking().ids_keep
    taps = tapped(model, images, [Tap("logits"), Tap("pooled")])
    assert torch.equal(taps[Tap("logits")], model(images))
    assert torch.equal(taps[Tap("pooled")], model.forward_pooled(images))
    assert torch.equal(tapped(model, images, [Tap("logits")], masking())[Tap("logits")], model(images, ids_keep))


def test_decoder_tokens_are_in_the_images_order_and_without_cls() -> None:
    model, images, view = deep_mae(), random_images(), masking()
    latent = model.forward_encoder(images, view.ids_keep)
    first = run_block(model.decoder_blocks[0], model.embed_decoder(latent, view.ids_restore))
    taps = tapped(model, images, [Tap("decoder", 1), Tap("decoder", 2)], view)
    assert torch.equal(taps[Tap("decoder", 1)], first[:, 1:])
    assert torch.equal(taps[Tap("decoder", 2)], run_block(model.decoder_blocks[1], first)[:, 1:])


def test_mask_tokens_in_the_encoder() -> None:
    objective = ObjectiveConfig(encoder_mask_tokens=True)
    model = fill(MaskedAutoencoder(ENCODER, DecoderConfig(decoder_depth=0, decoder_embed_dim=12), objective=objective))
    images, view = random_images(), masking()
    taps = tapped(model, images, [Tap("latent"), Tap("pixels")], view)
    assert torch.equal(taps[Tap("latent")], model.forward_masked_encoder(images, view.mask))
    assert torch.equal(taps[Tap("pixels")], model(images, view).pixels)


@pytest.mark.parametrize("explicit_up_to", [0, 65])
def test_queries_keys_and_values(explicit_up_to: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vit, "EXPLICIT_ATTENTION_TOKENS", explicit_up_to)
    model, images = tiny_encoder(DEEP), random_images()
    seen: list[Tensor] = []
    qkv_layer: Any = model.blocks.get_submodule("1.attn.qkv")
    qkv_layer.register_forward_hook(lambda module, given, found: seen.append(found))
    taps = tapped(model, images, [Tap("qkv", 2), Tap("tokens", 2), Tap("latent")])
    # 5 heads of 4: queries of all heads, then keys, then values.
    assert torch.equal(taps[Tap("qkv", 2)], seen[0].unflatten(2, (3, 5, 4)).permute(0, 2, 3, 1, 4))
    # The block that gives them computes what it does otherwise.
    assert torch.equal(taps[Tap("latent")], model(images))
    alone = tapped(model, images, [Tap("qkv", 2)])
    assert torch.equal(alone[Tap("qkv", 2)], taps[Tap("qkv", 2)])


def test_drop_path_is_the_blocks_own() -> None:
    block = vit.transformer_blocks(20, 2, 5, drop_path=0.5)[1].train()
    tokens = random_tensor(7, 4, 20)
    found = []
    for inner in (None, "with_qkv"):
        torch.manual_seed(0)
        given = run_block(block, tokens, inner=inner)
        found.append(given if inner is None else given[0])
    assert torch.equal(*found)
    assert not torch.equal(found[0], block.eval()(tokens))


# --- only what is needed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "calls"),
    [
        ([Tap("tokens", 1)], [1, 0, 0, 0, 0]),
        ([Tap("qkv", 2), Tap("tokens", 1)], [1, 1, 0, 0, 0]),
        ([Tap("latent")], [1, 1, 1, 0, 0]),
        ([Tap("decoder", 1), Tap("tokens", 2)], [1, 1, 1, 1, 0]),
        ([Tap("pixels"), Tap("decoder", 1)], [1, 1, 1, 1, 1]),
    ],
)
def test_no_block_runs_that_is_not_needed(wanted: list[Tap], calls: list[int]) -> None:
    model = deep_mae()
    called = Called(model)
    taps = tapped(model, random_images(), wanted, masking())
    assert called.counts == calls
    assert set(taps) == set(wanted)
    assert encoder_depth(wanted, 3) == sum(calls[:3])


def test_a_block_for_its_queries_alone_stops_there() -> None:
    model = tiny_encoder(DEEP)
    ran: list[str] = []
    for name, module in model.blocks.get_submodule("1").named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    tapped(model, random_images(), [Tap("qkv", 2), Tap("tokens", 1)])
    assert ran == ["attn.qkv"]


@pytest.mark.parametrize(
    "wanted",
    [
        [Tap("tokens", 2)],
        [Tap("qkv", 3)],
        [Tap("qkv", 3), Tap("tokens", 3)],
        [Tap("pooled"), Tap("qkv", 3)],
        [Tap("decoder", 1)],
        [Tap("pixels")],
        [Tap("cls")],
    ],
)
def test_what_is_unreached_has_no_gradient_and_everything_else_has(wanted: list[Tap]) -> None:
    without_gradient(deep_mae(), wanted)


@pytest.mark.parametrize("pool", ["avg", "cls"])
@pytest.mark.parametrize("wanted", [[Tap("tokens", 1)], [Tap("pooled")], [Tap("cls")], [Tap("logits")]])
def test_what_is_unreached_of_a_classifier(pool: Any, wanted: list[Tap]) -> None:
    without_gradient(tiny_classifier(pool), wanted)


def without_gradient(model: Encoder, wanted: Collection[Tap]) -> None:
    model.requires_grad_(True)
    taps = tapped(model, random_images(), wanted, masking())
    torch.stack([F.mse_loss(tap, torch.ones_like(tap)) for tap in taps.values()]).sum().backward()
    frozen = {
        id(tensor)
        for part in unreached(model, wanted)
        for tensor in ([part] if isinstance(part, nn.Parameter) else part.parameters())
    }
    wrong = [
        name for name, parameter in model.named_parameters() if (parameter.grad is None) != (id(parameter) in frozen)
    ]
    # Positions of the decoder are fixed, and are only asked for where it runs.
    assert [name for name in wrong if name != "decoder_pos_embed"] == []


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "wanted", "view", "message"),
    [
        (tiny_mae(), Tap("tokens", 3), None, "a tap at block 3 of 2"),
        (tiny_mae(), Tap("decoder", 2), masking(), "a tap at block 2 of the decoder's 1"),
        (tiny_mae(), Tap("pixels"), None, "only an autoencoder has a decoder, which predicts what a masking hides"),
        (tiny_encoder(), Tap("pixels"), masking(), "only an autoencoder"),
        (tiny_mae(), Tap("logits"), None, "logits of a network without a head"),
    ],
)
def test_places_that_there_are_not(model: Encoder, wanted: Tap, view: Masking | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tapped(model, random_images(), [wanted], view)
