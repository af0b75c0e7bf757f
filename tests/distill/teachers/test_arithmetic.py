"""In what a teacher computes on this device and on others."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mae_deploy.distill.teachers.arithmetic import resolve_precision, set_precision
from mae_deploy.errors import MissingDependency
from tests.models.tiny_models import tiny_encoder

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("avx512", "amx", "expected"), [(True, False, "bf16"), (False, True, "bf16"), (False, False, "fp32")]
)
def test_auto_on_a_cpu_is_what_it_multiplies_in(
    avx512: bool, amx: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert resolve_precision("auto", CPU) == expected
    assert resolve_precision("fp32", CPU) == "fp32"


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_on_a_gpu(native: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda *, including_emulation: native and not including_emulation
    )
    assert resolve_precision("auto", CUDA) == expected
    assert resolve_precision("fp16", CUDA) == "fp16"


def test_fp16_needs_a_gpu() -> None:
    with pytest.raises(MissingDependency, match="--teacher-precision fp16"):
        resolve_precision("fp16", CPU)


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
