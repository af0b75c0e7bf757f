"""The training step's benchmark on a GPU: BF16 against FP16 with a loss scaler, and the same loss."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mae_deploy.cli import main
from mae_deploy.runtime.cuda.driver import Gpu

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_both_steps_agree(gpu: Gpu, precision: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip(f"{gpu.name} has no BF16")
    out = tmp_path / "report"
    command = [
        "benchmark-train",
        "--device",
        "cuda",
        "--precision",
        precision,
        "--batch-size",
        "32",
        "--steps",
        "3",
        "--repeats",
        "3",
        "--out",
        str(out),
    ]
    assert main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    ours, plain = report["rows"]
    assert (ours["precision"], plain["precision"]) == ({"bf16": "bfloat16", "fp32": "float32"}[precision], "float16")
    assert report["loss_difference"] < 2e-2
    assert all(0 < row["gemm_share"] < 1 for row in (ours, plain))
    assert (out / "benchmark-train.md").is_file()
