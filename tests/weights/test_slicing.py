"""A slice computes what the larger encoder does where nothing is left out, and takes what belongs together."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mae_deploy.errors import ConfigError
from mae_deploy.models.config import EncoderConfig, SliceBlocks
from mae_deploy.models.mae import MaskedAutoencoder
from mae_deploy.models.position import sincos_position_embedding
from mae_deploy.models.vit import Classifier, Encoder, Pool, patchify
from mae_deploy.weights.load import LoadedWeights
from mae_deploy.weights.slicing import choose_blocks, evenly, slice_encoder, start_from_slice
from tests.models.tiny_models import CLASSES, DECODER, ENCODER, fill, metadata_of, random_images, random_tensor

LARGER = EncoderConfig(name="larger", image_size=(6, 10), patch_size=2, embed_dim=40, depth=5, num_heads=5)
"""Heads of 8; the student has 20 channels, 2 blocks, and 5 heads of 4 or 1 of 20."""


def loaded(model: Encoder) -> LoadedWeights:
    return LoadedWeights(metadata_of(model), model.state_dict(), {})


def with_sincos(model: Encoder) -> Encoder:
    """Positions as every untrained model has them."""
    model.pos_embed.data = sincos_position_embedding(model.config.width, model.config.grid_size)
    return model


# --- the whole
# ---------------------------------------------------------------------------------------------------------


def test_the_same_shape_computes_the_same() -> None:
    """All tensors, trained positions too."""
    larger = fill(Encoder(LARGER))
    student = start_from_slice(Encoder(LARGER).eval(), loaded(larger))
    images = random_images(LARGER)
    # Positions are the table plus what differs from it, which float32 rounds.
    torch.testing.assert_close(student(images), larger(images), rtol=1e-5, atol=1e-5)
    found, expected = student.state_dict(), larger.state_dict()
    assert [name for name in expected if name != "pos_embed" and not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("pool", ["avg", "cls"])
def test_a_classifier_of_the_same_shape_computes_the_same_logits(pool: Pool) -> None:
    larger = fill(Classifier(LARGER, num_classes=CLASSES, pool=pool))
    student = start_from_slice(Classifier(LARGER, num_classes=CLASSES, pool=pool).eval(), loaded(larger))
    images = random_images(LARGER)
    torch.testing.assert_close(student(images), larger(images), rtol=1e-5, atol=1e-5)


def test_a_head_of_other_classes_or_another_pooling_stays_as_it_started() -> None:
    larger = loaded(fill(Classifier(LARGER, num_classes=CLASSES, pool="avg")))
    for other in (Classifier(ENCODER, num_classes=CLASSES - 1), Classifier(ENCODER, num_classes=CLASSES, pool="cls")):
        before = other.head.weight.clone()
        assert torch.equal(start_from_slice(other, larger).head.weight, before)
    student = start_from_slice(Classifier(ENCODER, num_classes=CLASSES), larger)
    assert torch.equal(student.head.weight, larger.tensors["head.weight"][:, ::2])
    assert torch.equal(student.state_dict()["fc_norm.bias"], larger.tensors["fc_norm.bias"][::2])


def test_an_autoencoder_starts_with_a_sliced_encoder_and_its_own_decoder() -> None:
    student = MaskedAutoencoder(ENCODER, DECODER)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    start_from_slice(student, loaded(fill(Encoder(LARGER))))
    same = {name for name, tensor in student.state_dict().items() if torch.equal(tensor, before[name])}
    decoder = {name for name in before if name.startswith("decoder") or name == "mask_token"}
    assert decoder <= same
    assert not any(name.startswith(("blocks", "patch_embed", "cls_token", "norm")) for name in same)


# --- layers and channels
# -----------------------------------------------------------------------------------------------


def test_channels_that_say_nothing_may_be_left_out() -> None:
    """A larger encoder that is a small one spread over every other channel, head dim and hidden unit, with zeros
    between, gives it back.

    LayerNorm would see the zeros: it is compared tensor by tensor, and a linear layer by what it computes.
    """
    small = fill(Encoder(ENCODER))
    larger = {name: torch.zeros_like(tensor) for name, tensor in Encoder(LARGER).state_dict().items()}
    chosen = choose_blocks(2, 5, "even")
    channels, inner, hidden = torch.arange(20) * 2, torch.arange(20) * 2, torch.arange(80) * 2
    for block, place in enumerate(chosen):
        for name, own in small.blocks[block].state_dict().items():
            there = larger[f"blocks.{place}.{name}"]
            if name.startswith("attn.qkv"):
                rows: Tensor = torch.cat([part * 40 + inner for part in range(3)])
            else:
                rows = hidden if name.startswith("mlp.fc1") else channels
            if own.ndim == 1:
                there[rows] = own
            else:
                columns = inner if name == "attn.proj.weight" else hidden if name == "mlp.fc2.weight" else channels
                there[rows[:, None], columns] = own
    sliced = slice_encoder(LoadedWeights(metadata_of(Encoder(LARGER)), larger, {}), ENCODER)
    for name, own in small.state_dict().items():
        if name.startswith("blocks"):
            assert torch.equal(sliced[name], own), name


def test_heads_are_chosen_as_a_whole_and_cut_evenly() -> None:
    """Row i of queries, keys and values says where it comes from."""
    larger = loaded(fill(Encoder(LARGER)))
    larger.tensors["blocks.0.attn.qkv.bias"].copy_(torch.arange(120.0))
    larger.tensors["blocks.0.attn.proj.weight"].copy_(torch.arange(40.0).expand(40, 40))
    target = replace(ENCODER, embed_dim=8, num_heads=2)  # heads 0 and 2 of 5, four of eight channels each
    sliced = slice_encoder(larger, target)
    expected = [0, 2, 4, 6, 16, 18, 20, 22]
    assert sliced["blocks.0.attn.qkv.bias"].tolist() == [part * 40 + place for part in range(3) for place in expected]
    assert sliced["blocks.0.attn.proj.weight"].tolist() == [expected] * 8


def test_the_residual_stream_has_the_same_channels_everywhere() -> None:
    model = fill(Encoder(LARGER))
    sliced = slice_encoder(loaded(model), replace(ENCODER, embed_dim=12, num_heads=3))
    channels = [place * 40 // 12 for place in range(12)]
    tensors = model.state_dict()
    assert torch.equal(sliced["cls_token"], tensors["cls_token"][:, :, channels])
    assert torch.equal(sliced["patch_embed.proj.weight"], tensors["patch_embed.proj.weight"][channels])
    assert torch.equal(sliced["norm.weight"], tensors["norm.weight"][channels])
    assert torch.equal(sliced["blocks.1.norm2.bias"], tensors["blocks.4.norm2.bias"][channels])
    assert torch.equal(sliced["blocks.1.mlp.fc2.bias"], tensors["blocks.4.mlp.fc2.bias"][channels])


def test_evenly_spaced_indices() -> None:
    assert evenly(3, 3).tolist() == [0, 1, 2]
    assert evenly(3, 12).tolist() == [0, 4, 8]
    assert evenly(4, 6).tolist() == [0, 1, 3, 4]
    assert evenly(192, 1280)[-1] < 1280


@pytest.mark.parametrize(
    ("count", "total", "blocks", "expected"),
    [
        (4, 4, "even", [0, 1, 2, 3]),
        (3, 5, "even", [0, 2, 4]),
        (4, 12, "even", [0, 4, 7, 11]),
        (1, 12, "even", [0]),
        (3, 12, "first", [0, 1, 2]),
    ],
)
def test_blocks_are_spread_from_first_to_last_or_the_first_ones(
    count: int, total: int, blocks: SliceBlocks, expected: list[int]
) -> None:
    assert choose_blocks(count, total, blocks) == expected


def test_no_block_is_chosen_twice() -> None:
    for total in range(1, 33):
        for count in range(1, total + 1):
            assert len(set(choose_blocks(count, total, "even"))) == count


# --- images
# ------------------------------------------------------------------------------------------------------------


def test_positions_are_the_students_own_table() -> None:
    """With every other channel, the larger one's table is the smaller one's, on the same grid; another grid is computed
    anew.
    """
    larger = loaded(with_sincos(fill(Encoder(LARGER))))
    found = slice_encoder(larger, ENCODER)["pos_embed"]
    assert torch.equal(found, sincos_position_embedding(20, (3, 5)))
    torch.testing.assert_close(
        found, larger.tensors["pos_embed"][:, :, ::2], rtol=0, atol=1e-6
    )  # the same frequencies, in another order of rounding
    wide = replace(ENCODER, image_size=(8, 14))
    assert torch.equal(slice_encoder(larger, wide)["pos_embed"], sincos_position_embedding(20, (4, 7)))


def test_what_positions_have_learned_is_kept() -> None:
    model = with_sincos(fill(Encoder(LARGER)))
    learned = random_tensor(1, 16, 40)
    model.pos_embed.data += learned
    found = slice_encoder(loaded(model), ENCODER)["pos_embed"]
    torch.testing.assert_close(
        found, sincos_position_embedding(20, (3, 5)) + learned[:, :, ::2], rtol=0, atol=1e-6
    )  # float32


def test_another_patch_sees_the_same_in_an_enlarged_image() -> None:
    """FlexiViT's resampling: patches enlarged from 2 to 3 pixels a side embed as they did."""
    model = fill(Encoder(LARGER))
    target = replace(LARGER, name="other", patch_size=3, image_size=(9, 15))
    student = start_from_slice(Encoder(target).eval(), loaded(model))
    patches = random_images(LARGER)[:, :, :2, :2]
    enlarged = torch.nn.functional.interpolate(patches, size=(3, 3), mode="bicubic", antialias=True)
    expected, found = model.patch_embed(patchify(patches, 2)), student.patch_embed(patchify(enlarged, 3))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # a pseudo-inverse in float32


# --- what cannot be sliced
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embed_dim": 80, "num_heads": 5}, "a width of 80, and the larger encoder has 40"),
        ({"depth": 6}, "6 blocks, and the larger encoder has 5"),
        ({"embed_dim": 40, "num_heads": 10}, "10 heads, and the larger encoder has 5"),
        ({"num_heads": 2}, "10 channels a head, and the larger encoder has 8"),
        ({"mlp_ratio": 9.0}, "180 channels in its MLP, and the larger encoder has 160"),
        ({"in_chans": 4}, "reads 3 channels, the student 4"),
        ({"in_chans": 3, "band_groups": ((0, 1), (2,))}, "groups of bands"),
    ],
)
def test_a_student_that_is_no_slice(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        slice_encoder(loaded(fill(Encoder(LARGER))), replace(ENCODER, **change))  # type: ignore[arg-type]
