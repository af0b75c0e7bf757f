"""`mae-deploy benchmark-train` as it is typed: two steps that compute the same, figures that follow from their times,
and the report.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from mae_deploy.cli import main
from mae_deploy.commands.benchmark_train import run as benchmark_train
from mae_deploy.commands.benchmark_train.plain_step import PlainStep
from mae_deploy.data.transforms import NormaliseImages
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.models.config import DecoderConfig, EncoderConfig
from mae_deploy.models.mae import MaskedAutoencoder
from mae_deploy.models.masking import random_masking
from mae_deploy.runtime.timing import Timing
from mae_deploy.training.optim.groups import adamw, decay_groups

TINY = (
    "--model",
    "vit_nano_patch4",
    "--image-size",
    "12,20",
    "--decoder-depth",
    "1",
    "--decoder-embed-dim",
    "32",
    "--batch-size",
    "3",
)

N, K, D, P, E = 15, 2, 64, 4, 32
"""At a mask ratio of 0.8, 2 of 15 patches stay: the original truncates 2.9999999999999996."""


def block(tokens: int, dim: int) -> int:
    """The four maps of a block (12 D² for each token) and its two products."""
    return tokens * 12 * dim * dim + 2 * tokens * tokens * dim


FLOPS = 3 * 2 * (K * P * P * 3 * D + 4 * block(1 + K, D) + (1 + K) * D * E + block(1 + N, E) + N * E * P * P * 3)
"""Two operations for each multiply-add, and two products in the backward pass for each in the forward pass."""


@pytest.fixture(autouse=True)
def few_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MAE_DEPLOY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(benchmark_train._GEMM, "cpu", 64)


def command(*more: str) -> list[str]:
    return ["benchmark-train", *TINY, "--mask-ratio", "0.8", "--repeats", "2", "--device", "cpu", *more]


def test_figures_follow_from_the_times(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def timed(functions: Mapping[str, Callable[[], object]], **_: Any) -> dict[str, Timing]:
        for function in functions.values():
            function()
        return {"plain": Timing((3.0, 5.0, 4.0)), "mae-deploy": Timing((2.5, 2.0, 1.0))} | {
            name: Timing((0.5, 0.25)) for name in functions if name not in ("plain", "mae-deploy")
        }

    monkeypatch.setattr(benchmark_train, "measure", timed)
    assert main(command("--steps", "2", "--out", str(tmp_path / "report"), "--json")) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["speedup"] == 2.0
    ours, plain = report["rows"]
    assert (ours["step"], ours["step_ms"], ours["images_per_second"]) == ("mae-deploy", 1000.0, 3.0)
    assert (plain["step"], plain["step_ms"], plain["fastest_ms"], plain["images_per_second"]) == (
        "plain",
        2000.0,
        1500.0,
        1.5,
    )
    assert ours["gflop_per_image"] == pytest.approx(FLOPS / 1e9)
    assert ours["gemm_share"] == pytest.approx(3 * FLOPS / (2 * 64**3 / 0.25))
    written = json.loads((tmp_path / "report" / "benchmark-train.json").read_text())
    assert written == report
    page = (tmp_path / "report" / "benchmark-train.md").read_text()
    assert "2.00 times as fast as the plain step" in page
    assert "| mae-deploy | float32 | 1000.0 | 3.00 |" in page


def test_the_command_in_the_report_makes_the_same_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command("--json", "--seed", "3")) == 0
    report = json.loads(capsys.readouterr().out)
    words = shlex.split(report["command"])
    assert words[:2] == ["mae-deploy", "benchmark-train"]
    assert main([*words[1:], "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert (again["command"], again["first_loss"]) == (report["command"], report["first_loss"])
    assert report["loss_difference"] < 1e-5


def test_bf16_is_compared_with_fp32(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command("--json", "--precision", "bf16", "--threads", str(torch.get_num_threads()))) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["precision"] for row in report["rows"]] == ["bfloat16", "float32"]
    assert set(report["gemm_tflops"]) == {"bfloat16", "float32"}


def test_steps_that_differ_fail(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    original = PlainStep.__call__
    monkeypatch.setattr(PlainStep, "__call__", lambda self, *given: 1.001 * original(self, *given))
    assert main(command()) == 1
    assert "the losses differ by 1.0e-03" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--mask-ratio", "1"), "--mask-ratio must be above 0 and below 1, got 1"),
        (("--mask-ratio", "0.99"), "leaves none to see"),
        (("--steps", "0"), "--steps must be at least 1, got 0"),
        (("--band-groups", "0;1,2"), "--band-groups 0;1,2: benchmark-train compares with an autoencoder without"),
    ],
)
def test_what_cannot_be_timed_is_refused(more: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command(), *more]) == 2
    assert said in capsys.readouterr().err


def test_plain_steps_are_ours() -> None:
    """Three steps: the same losses, so the same gradients and updates."""
    encoder = EncoderConfig(name="vit_nano_patch4", image_size=(12, 20))
    decoder = DecoderConfig(decoder_depth=1, decoder_embed_dim=32)
    torch.manual_seed(0)
    model = MaskedAutoencoder(encoder, decoder)
    normalise = NormaliseImages(Preprocess(image_size=(12, 20), mean=(0.5,) * 3, std=(0.25,) * 3))
    plain = PlainStep(encoder, decoder, model.state_dict(), normalise, mask_ratio=0.75, lr=1e-2)
    optimizer = adamw(decay_groups(model, 0.05), betas=(0.9, 0.95))
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    for _ in range(3):
        images, noise = torch.randint(0, 256, (5, 3, 12, 20), dtype=torch.uint8), torch.rand(5, 15)
        loss = model(normalise(images), random_masking(noise, 0.75)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        # Sums in another order; AdamW divides by the gradient's size, which enlarges that.
        assert plain(images, noise) == pytest.approx(loss.item(), rel=1e-4)
