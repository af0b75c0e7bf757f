"""The encoder and the classifier: order of pixels and patches, visible subsets, attention, heads and starting
weights.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mae_deploy.errors import ConfigError
from mae_deploy.models import vit
from mae_deploy.models.config import PRESETS, EncoderConfig
from mae_deploy.models.position import sincos_position_embedding
from mae_deploy.models.vit import Classifier, Encoder, Pool, gather_tokens, patchify, transformer_blocks, unpatchify
from tests.models.tiny_models import CLASSES, ENCODER, random_images, tiny_classifier, tiny_encoder

N, D = ENCODER.num_patches, ENCODER.width


def permutations(batch: int, keep: int = N, seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(N, generator=generator)[:keep] for _ in range(batch)])


# --- patches ---------------------------------------------------------------------------------------------------------


def test_patchify_by_hand() -> None:
    # One image of 2 channels and 2x4 pixels; the pixel's value is channel, row, column as decimal digits.
    image = torch.tensor([[[[c * 100 + y * 10 + x for x in range(4)] for y in range(2)] for c in range(2)]])
    assert patchify(image, 2).tolist() == [[[0, 100, 1, 101, 10, 110, 11, 111], [2, 102, 3, 103, 12, 112, 13, 113]]]


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_unpatchify_inverts_patchify(channels: int) -> None:
    images = torch.randn(2, channels, 3 * 5, 3 * 7)
    patches = patchify(images, 3)
    assert patches.shape == (2, 5 * 7, 9 * channels)
    assert torch.equal(unpatchify(patches, 3, (5, 7)), images)


def test_patch_embedding_is_the_convolution() -> None:
    encoder, images = tiny_encoder(), random_images()
    conv = F.conv2d(images, encoder.patch_embed.proj.weight, encoder.patch_embed.proj.bias, stride=ENCODER.patch)
    # Twelve products a number, summed in another order.
    torch.testing.assert_close(
        encoder.patch_embed(patchify(images, ENCODER.patch)), conv.flatten(2).transpose(1, 2), rtol=0, atol=1e-5
    )


def test_gather_tokens_by_hand() -> None:
    tokens = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], [[7.0, 8.0], [9.0, 10.0], [11.0, 12.0]]])
    assert gather_tokens(tokens, torch.tensor([[2, 0], [1, 1]])).tolist() == [[[5, 6], [1, 2]], [[9, 10], [9, 10]]]


# --- visible subsets -------------------------------------------------------------------------------------------------


def test_keeping_every_patch_in_order_changes_nothing() -> None:
    encoder, images = tiny_encoder(), random_images()
    with torch.no_grad():
        full, kept = encoder(images), encoder(images, torch.arange(N).expand(3, N))
    assert full.shape == (3, 1 + N, D)
    # The same sums; a gathered tensor may lie otherwise in memory.
    torch.testing.assert_close(kept, full, rtol=0, atol=1e-6)


def test_permuting_ids_permutes_tokens() -> None:
    encoder, images, ids = tiny_encoder(), random_images(), permutations(3, keep=7)
    order = torch.tensor([4, 0, 6, 2, 5, 1, 3])
    with torch.no_grad():
        tokens, permuted = encoder(images, ids), encoder(images, ids[:, order])
    # Attention sums over the tokens in another order.
    torch.testing.assert_close(permuted[:, 1:], tokens[:, 1:][:, order], rtol=0, atol=1e-5)
    torch.testing.assert_close(permuted[:, 0], tokens[:, 0], rtol=0, atol=1e-5)
    assert (tokens[:, 1] - tokens[:, 2]).abs().max() > 0.1, "tokens are alike, so their order cannot show"


def test_hidden_pixels_have_no_influence() -> None:
    encoder, images, ids = tiny_encoder(), random_images(), permutations(3, keep=4)
    hidden = torch.ones(3, N, 1).scatter(1, ids.unsqueeze(-1), 0.0)
    noisy = unpatchify(patchify(images, 2) + 9 * hidden, 2, ENCODER.grid_size)
    with torch.no_grad():
        assert torch.equal(encoder(noisy, ids), encoder(images, ids))
        assert not torch.equal(encoder(noisy), encoder(images))


def test_each_sample_has_its_own_patches() -> None:
    encoder, images, ids = tiny_encoder(), random_images(), permutations(3, keep=4)
    with torch.no_grad():
        together = encoder(images, ids)
        for index in range(3):
            alone = encoder(images[index : index + 1], ids[index : index + 1])
            # A matrix product of another height may sum in another order.
            torch.testing.assert_close(together[index : index + 1], alone, rtol=0, atol=1e-5)


def test_embedding_adds_the_position_of_the_kept_patch() -> None:
    encoder, images, ids = tiny_encoder(), random_images(), permutations(3, keep=4)
    embedded = encoder.embed(images, ids)
    for sample, row in enumerate(ids.tolist()):
        for place, patch in enumerate(row):
            pixels = patchify(images, 2)[sample, patch]
            expected = encoder.patch_embed(pixels) + encoder.pos_embed[0, 1 + patch]
            # Twelve products a number, summed in another order.
            torch.testing.assert_close(embedded[sample, 1 + place], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        embedded[:, 0], (encoder.cls_token + encoder.pos_embed[:, :1])[0].expand(3, -1), rtol=0, atol=0
    )


@pytest.mark.parametrize("shape", [(3, 10, 6), (3, 6, 6), (1, 6, 10), (3, 12, 10)])
def test_another_size_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="the encoder takes 3x"):
        tiny_encoder()(torch.zeros(2, *shape))


# --- attention -------------------------------------------------------------------------------------------------------


def test_fused_and_explicit_attention_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, images = tiny_encoder(), random_images()
    outputs, fused = [], []
    for limit in (0, 1000):
        monkeypatch.setattr(vit, "EXPLICIT_ATTENTION_TOKENS", limit)
        with torch.no_grad():
            outputs.append(encoder(images))
        fused.append([block.attn.fused_attn for block in encoder.blocks])  # type: ignore[union-attr]
    assert fused == [[True, True], [False, False]]
    # The fused kernel sums the softmax online: a few units in the last place of numbers near 1.
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)


# --- classifier ------------------------------------------------------------------------------------------------------


def test_mean_pooling_leaves_out_the_class_token_and_the_norm() -> None:
    model, images = tiny_classifier("avg"), random_images()
    state = model.state_dict()
    assert "norm.weight" not in state
    with torch.no_grad():
        tokens = vit.run_blocks(model.blocks, model.embed(images))
        pooled = F.layer_norm(tokens[:, 1:].mean(dim=1), (D,), state["fc_norm.weight"], state["fc_norm.bias"], eps=1e-6)
        # The same operations one by one.
        torch.testing.assert_close(model.forward_pooled(images), pooled, rtol=0, atol=1e-6)
        torch.testing.assert_close(model(images), pooled @ model.head.weight.T + model.head.bias, rtol=0, atol=1e-5)


def test_class_token_pooling_is_the_encoders_first_token() -> None:
    model, images, ids = tiny_classifier("cls"), random_images(), permutations(3, keep=4)
    encoder = Encoder(ENCODER).eval()
    encoder.load_state_dict(
        {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("head.")}
    )
    with torch.no_grad():
        assert torch.equal(model.forward_pooled(images, ids), encoder(images, ids)[:, 0])
        assert model(images, ids).shape == (3, CLASSES)


@pytest.mark.parametrize("pool", ["avg", "cls"])
def test_a_fresh_head_starts_near_zero(pool: Pool) -> None:
    torch.manual_seed(0)
    head = Classifier(ENCODER, num_classes=101, pool=pool).head
    # The original's trunc_normal(2e-5): 2,020 numbers estimate their spread to about 1.6 %, five times that is allowed.
    assert head.weight.std().item() == pytest.approx(2e-5, rel=0.08)
    assert not head.bias.any()


def test_drop_path_rises_linearly() -> None:
    blocks: Any = transformer_blocks(20, 5, 5, drop_path=0.2)
    assert [getattr(block.drop_path2, "drop_prob", 0.0) for block in blocks] == pytest.approx(
        [0.0, 0.05, 0.1, 0.15, 0.2]
    )


# --- starting weights ------------------------------------------------------------------------------------------------


def test_linear_layers_start_xavier_uniform() -> None:
    torch.manual_seed(0)
    encoder = Encoder(replace(ENCODER, name="wider", embed_dim=40))
    layers = {name: module for name, module in encoder.blocks.named_modules() if isinstance(module, nn.Linear)}
    assert len(layers) == 2 * 4
    for name, layer in layers.items():
        bound = math.sqrt(6 / (layer.in_features + layer.out_features))
        assert 0.99 * bound < layer.weight.abs().max().item() <= bound, name
        assert not layer.bias.any()
    # The patch embedding as if it were linear: 12 inputs, not the convolution's own fan.
    proj = encoder.patch_embed.proj
    bound = math.sqrt(6 / (2 * 2 * 3 + 40))
    assert 0.99 * bound < proj.weight.abs().max().item() <= bound


def test_tokens_and_positions_start_as_in_the_paper() -> None:
    torch.manual_seed(0)
    encoder = Encoder(replace(ENCODER, name="wide", embed_dim=1000))
    # 1,000 numbers estimate their spread to about 2.2 %, five times that is allowed.
    assert encoder.cls_token.std().item() == pytest.approx(0.02, rel=0.11)
    assert torch.equal(encoder.pos_embed, sincos_position_embedding(1000, (3, 5)))
    assert not encoder.pos_embed.requires_grad


def test_every_norm_has_the_originals_epsilon() -> None:
    norms = [
        module
        for model in (Encoder(ENCODER), Classifier(ENCODER, num_classes=3))
        for module in model.modules()
        if isinstance(module, nn.LayerNorm)
    ]
    assert len(norms) == 5 + 5
    assert {norm.eps for norm in norms} == {1e-6}
    assert all(torch.equal(norm.weight, torch.ones(D)) and not norm.bias.any() for norm in norms)


# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "image_size", "parameters"),
    # 12 D² + 13 D a block, (P² C + 1) D for patches, 2 D for the final norm, D for CLS and (N + 1) D for positions.
    [
        ("vit_base_patch16", 224, 85_798_656),
        ("vit_large_patch16", 224, 303_301_632),
        ("vit_huge_patch14", 224, 630_764_800),
        ("vit_tiny_patch4", 32, 5_360_832),
    ],
)
def test_presets_have_the_papers_size(name: str, image_size: int, parameters: int) -> None:
    with torch.device("meta"):
        encoder = Encoder(EncoderConfig(name=name, image_size=(image_size, image_size)))
    assert sum(parameter.numel() for parameter in encoder.parameters()) == parameters


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_fits_a_multiple_of_its_patch(name: str) -> None:
    patch = PRESETS[name].patch_size
    assert EncoderConfig(name=name, image_size=(3 * patch, 5 * patch)).grid_size == (3, 5)


@pytest.mark.parametrize(
    ("settings", "message", "hint"),
    [
        ({"name": "vit_bass_patch16"}, "--model 'vit_bass_patch16' is not a known model", "vit_base_patch16"),
        (
            {"image_size": (224, 230)},
            "--image-size 224,230 is not a multiple of the patch size, 16",
            "the nearest is 224,224",
        ),
        ({"image_size": (0, 224)}, "each of --image-size must be at least 1, got 0,224", None),
        ({"depth": 11}, "model 'vit_base_patch16' has depth 12, not 11", "a name of its own"),
        (
            {"name": "odd", "patch_size": 2, "embed_dim": 20, "depth": 1, "num_heads": 3},
            "embed_dim 20 must be a multiple of 4 and of num_heads, 3",
            None,
        ),
        (
            {"name": "odd", "patch_size": 2, "embed_dim": 22, "depth": 1, "num_heads": 2},
            "embed_dim 22 must be a multiple of 4",
            None,
        ),
    ],
)
def test_impossible_sizes_are_refused(settings: dict[str, Any], message: str, hint: str | None) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        EncoderConfig(**settings)
    assert (hint or "") in (caught.value.hint or "")


def test_another_patch_size_of_a_preset() -> None:
    assert EncoderConfig(name="vit_tiny_patch16", image_size=(20, 30), patch_size=5).grid_size == (4, 6)
