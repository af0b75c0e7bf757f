"""In what a teacher computes."""

from __future__ import annotations

import torch
from torch import nn

from mae_deploy.distill.teachers.arithmetic import set_precision
from tests.models.tiny_models import tiny_encoder

CPU = torch.device("cpu")


def test_products_are_rounded_and_the_residual_stream_is_not() -> None:
    model = tiny_encoder()
    with set_precision(model, "bf16", CPU)():
        assert model.blocks[0].mlp(torch.randn(1, 2, 20)).dtype == torch.bfloat16  # type: ignore[operator]
        assert model(torch.randn(1, 3, 6, 10)).dtype == torch.float32
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert module.weight.dtype == torch.bfloat16
        if isinstance(module, nn.LayerNorm):
            assert module.weight.dtype == torch.float32
    assert model.pos_embed.dtype == torch.float32
