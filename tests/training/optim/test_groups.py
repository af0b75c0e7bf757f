"""Which parameter decays and how fast it learns, against the groups that the original's code printed for a network of
four blocks.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mae_deploy.models.mae import MaskedAutoencoder
from mae_deploy.models.vit import Classifier, Pool
from mae_deploy.training.optim.groups import ParamGroup, adamw, decay_groups, layer_decay_groups, layer_of
from tests.training.tiny_runs import DECODER, ENCODER

FOUR_BLOCKS = replace(ENCODER, depth=4)
BLOCK_PLAIN = {
    "norm1.weight",
    "norm1.bias",
    "attn.qkv.bias",
    "attn.proj.bias",
    "norm2.weight",
    "norm2.bias",
    "mlp.fc1.bias",
    "mlp.fc2.bias",
}
BLOCK_DECAYS = {"attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"}


def found(groups: list[ParamGroup]) -> dict[tuple[float, float], set[str]]:
    """Names by scale of the learning rate and weight decay; no group comes twice."""
    by_setting = {(group["lr_scale"], group["weight_decay"]): set(group["names"]) for group in groups}
    assert len(by_setting) == len(groups)
    return by_setting


def test_pretraining_decays_all_but_vectors_and_biases() -> None:
    model = MaskedAutoencoder(replace(ENCODER, depth=1), DECODER)
    decays = {"cls_token", "mask_token", "patch_embed.proj.weight", "decoder_embed.weight", "decoder_pred.weight"}
    plain = {
        "patch_embed.proj.bias",
        "norm.weight",
        "norm.bias",
        "decoder_embed.bias",
        "decoder_norm.weight",
        "decoder_norm.bias",
        "decoder_pred.bias",
    }
    for prefix in ("blocks.0.", "decoder_blocks.0."):
        decays |= {prefix + name for name in BLOCK_DECAYS}
        plain |= {prefix + name for name in BLOCK_PLAIN}
    # pos_embed and decoder_pos_embed are in neither: they are fixed.
    assert found(decay_groups(model, 0.05)) == {(1.0, 0.05): decays, (1.0, 0.0): plain}


@pytest.mark.parametrize(("pool", "norm"), [("avg", "fc_norm"), ("cls", "norm")])
def test_fine_tuning_groups_by_layer(pool: Pool, norm: str) -> None:
    model = Classifier(FOUR_BLOCKS, num_classes=7, pool=pool)
    model.pos_embed.requires_grad_(True)
    scales = (0.17850625000000003, 0.274625, 0.42250000000000004, 0.65)
    expected = {
        (0.11602906250000002, 0.0): {"cls_token", "pos_embed", "patch_embed.proj.bias"},
        (0.11602906250000002, 0.05): {"patch_embed.proj.weight"},
        (1.0, 0.05): {"head.weight"},
        (1.0, 0.0): {"head.bias", f"{norm}.weight", f"{norm}.bias"},
    }
    for block, scale in enumerate(scales):
        expected[scale, 0.0] = {f"blocks.{block}.{name}" for name in BLOCK_PLAIN}
        expected[scale, 0.05] = {f"blocks.{block}.{name}" for name in BLOCK_DECAYS}
    assert found(layer_decay_groups(model, 0.05, 0.65)) == expected


def test_names_go_with_their_parameters() -> None:
    model = Classifier(ENCODER, num_classes=7)
    parameters = dict(model.named_parameters())
    for group in (*decay_groups(model, 0.05), *layer_decay_groups(model, 0.05, 0.65)):
        assert all(
            parameters[name] is parameter for name, parameter in zip(group["names"], group["params"], strict=True)
        )


def test_layers() -> None:
    names = (
        "cls_token",
        "pos_embed",
        "patch_embed.proj.weight",
        "blocks.0.norm1.weight",
        "blocks.11.norm1.weight",
        "norm.weight",
        "fc_norm.bias",
        "head.bias",
    )
    assert [layer_of(name, 13) for name in names] == [0, 0, 0, 1, 12, 13, 13, 13]


def test_the_first_step_by_hand() -> None:
    """AdamW's first step is lr·sign(g), after a decay by lr·wd."""
    layer = torch.nn.Linear(2, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[2.0, -4.0]]))
        layer.bias.copy_(torch.tensor([3.0]))
    optimizer = adamw(decay_groups(layer, 0.5), betas=(0.9, 0.95))
    for group in optimizer.param_groups:
        group["lr"] = 0.1 * group["lr_scale"]
    layer(torch.tensor([[1.0, -1.0]])).sum().backward()
    optimizer.step()
    # eps of 1e-8 beside gradients of 1, and float32.
    torch.testing.assert_close(
        layer.weight.detach(), torch.tensor([[2 * 0.95 - 0.1, -4 * 0.95 + 0.1]]), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(layer.bias.detach(), torch.tensor([2.9]), rtol=1e-6, atol=0)
