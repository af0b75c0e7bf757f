"""Rounding in training on a GPU: the numbers of the CPU, and no step waits for the device but one that observes
ranges.
"""

from __future__ import annotations

from typing import Literal

import pytest

from mae_deploy.runtime.cuda.driver import Gpu

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_rounding_on_the_gpu_is_rounding_on_the_cpu(
    gpu: Gpu, kind: Literal["dynamic", "static"], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mae_deploy.models.quantization.policy import Policy
    from mae_deploy.models.quantization.training import quantize_in_training
    from tests.export.outlier_models import decibels, noisy_encoder
    from tests.models.tiny_models import random_tensor

    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    images = random_tensor(16, 3, 12, 20)
    tokens = []
    for device in ("cpu", f"cuda:{gpu.index}"):
        model = noisy_encoder().to(device)
        quantizer = quantize_in_training(model, kind, Policy(static=kind == "static"), penalises=True).to(device)
        given = images.to(device)
        with torch.no_grad():
            plain = model(given)
            for step in (0, 1):  # static: the first ranges are taken from step 0, and read in step 1
                with quantizer.step(step, step / 1000):
                    model(given)
        if device != "cpu":
            torch.cuda.set_sync_debug_mode("error")
        try:
            with quantizer.step(2, 2 / 1000):
                found = model(given)
            (found.square().mean() + quantizer.penalty()).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        tokens.append(found.detach().cpu())
    # Numbers that lie right between two integers fall to the one side or the other; the rounding's own noise is at 36
    # dB.
    assert decibels(*tokens) > decibels(plain.cpu(), tokens[1]) + 10
