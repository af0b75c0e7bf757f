"""What a run sets up on a CPU."""

from __future__ import annotations

import pytest
import torch

from mae_deploy.training import cpu
from mae_deploy.training.cpu import advise_bf16


@pytest.mark.parametrize("has", [True, False])
def test_bf16_is_named_where_the_cpu_has_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], has: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(cpu, "bf16_gain", lambda _: 4.96)
    advise_bf16.__wrapped__()
    assert ("5.0 times as fast as FP32: --precision bf16" in capsys.readouterr().err) is has
