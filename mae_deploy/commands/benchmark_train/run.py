"""`mae-deploy benchmark-train`: the pretraining step against a plain one and the device's own rate, timed in turns."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mae_deploy import __version__
from mae_deploy.commands.benchmark_train.config import BenchmarkTrainConfig
from mae_deploy.commands.benchmark_train.plain_step import PlainStep
from mae_deploy.commands.benchmark_train.report import report_page, result_table
from mae_deploy.config import to_dict
from mae_deploy.data.dataset import Batch
from mae_deploy.data.transforms import NormaliseImages
from mae_deploy.errors import CheckFailed
from mae_deploy.files import refuse_to_overwrite
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.models.mae import MaskedAutoencoder
from mae_deploy.models.mask_config import keep_count
from mae_deploy.models.masking import random_masking
from mae_deploy.progress import progress
from mae_deploy.reporting.command_line import command_line
from mae_deploy.reporting.markdown import write_report
from mae_deploy.results import Result
from mae_deploy.runtime.flops import autoencoder_flops
from mae_deploy.runtime.timing import Timing, measure
from mae_deploy.seeding import derive_seed, seed_everything
from mae_deploy.training.cpu import keep_freed_memory
from mae_deploy.training.loop import make_accelerator
from mae_deploy.training.optim.groups import adamw, decay_groups
from mae_deploy.training.plan import RunPlan
from mae_deploy.training.state.sharding import Network
from mae_deploy.training.step import StepBatch, Stepper

OURS, PLAIN = "mae-deploy", "plain"

_LR = 1.5e-4
_TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""Relative difference of the first losses. FP32 sums in another order; BF16 has 8 bits of mantissa, FP16 11 (the plain
step's on a GPU)."""
_GEMM = {"cpu": 1024, "cuda": 8192}
"""Side of the matrices whose product is the device's yardstick."""
_DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class OurStep:
    """What `mae-deploy pretrain` does in a step, with its own classes."""

    def __init__(
        self,
        config: BenchmarkTrainConfig,
        model: MaskedAutoencoder,
        normalise: NormaliseImages,
        accelerator: Accelerator,
    ) -> None:
        if accelerator.device.type == "cpu":
            keep_freed_memory()
        network = Network(model, accelerator, sharded=False, compiled=config.compile)
        optimizer = adamw(network.groups(decay_groups(model, 0.05)), betas=(0.9, 0.95))
        plan = RunPlan(
            batch_size=config.batch_size, accum_iter=1, steps_per_epoch=1, total_steps=1, peak_lr=_LR, warmup_epochs=0
        )

        def loss(model: nn.Module, batch: StepBatch) -> dict[str, Tensor]:
            return {
                "loss": (
                    model(batch.images, random_masking(batch.rand(config.model.num_patches), config.mask_ratio)).loss
                )
            }

        self.stepper = Stepper(loss, network, optimizer, normalise, plan, clip_grad=None, seed=config.seed)

    def __call__(self, images: Tensor, step: int) -> Tensor:
        """`uint8 (B, C, H, W)`; returns the loss, on the device."""
        numbers = torch.zeros(len(images), dtype=torch.int64)
        batch = Batch(images, numbers, (), (), numbers, numbers)
        return self.stepper.take([batch], step, _LR, tuple).values[0]


def run_benchmark_train(config: BenchmarkTrainConfig) -> Result:
    """Time both steps and the matrix product.

    Raises:
        ConfigError: --out exists, or the precision needs another device.
        CheckFailed: both steps do not compute the same loss.
    """
    if config.out is not None:
        refuse_to_overwrite(config.out)
    accelerator = make_accelerator(config.device, config.precision, config.out or Path())
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device, dtype = accelerator.device, _DTYPES[accelerator.mixed_precision]
    plain_dtype = torch.float32 if device.type == "cpu" else torch.float16
    losses, calls = _steps(config, accelerator)
    difference = abs(losses[OURS] - losses[PLAIN]) / abs(losses[PLAIN])
    if not difference <= max(_TOLERANCES[dtype], _TOLERANCES[plain_dtype]):
        raise CheckFailed(
            f"the losses differ by {difference:.1e}: {losses[OURS]:.6f}, plain {losses[PLAIN]:.6f}",
            hint="this is a defect; please report it",
        )
    gemms = {str(kind).removeprefix("torch."): _gemm(device, kind) for kind in dict.fromkeys((dtype, plain_dtype))}
    with progress("timing", (config.warmup + config.repeats) * (len(calls) + len(gemms))) as bar:
        timings = measure({**calls, **gemms}, repeats=config.repeats, warmup=config.warmup, after_call=bar.advance)
    rates = {kind: 2 * _GEMM[device.type] ** 3 / min(timings[kind].seconds) for kind in gemms}
    report: dict[str, Any] = {
        "mae_deploy": __version__,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command_line("benchmark-train", config),
        "machine": _machine(device),
        "first_loss": losses,
        "loss_difference": difference,
        "gemm_tflops": {kind: rate / 1e12 for kind, rate in rates.items()},
        "speedup": timings[PLAIN].ratio(timings[OURS]),
        "rows": [
            _figures(config, device, name, str(kind).removeprefix("torch."), timings[name], rates)
            for name, kind in ((OURS, dtype), (PLAIN, plain_dtype))
        ],
    }
    if config.out is not None:
        write_report(config.out, "benchmark-train", report, report_page(report))
    return Result(report, result_table(report))


def _steps(
    config: BenchmarkTrainConfig, accelerator: Accelerator
) -> tuple[dict[str, float], dict[str, Callable[[], object]]]:
    """Both steps, from the same weights on the same images: the loss of the first, and calls that make a round of
    them.
    """
    device, seed = accelerator.device, config.seed
    C, (H, W) = config.model.in_chans, config.model.image_size
    seed_everything(derive_seed(seed, "weights"))
    model = MaskedAutoencoder(config.model, config.decoder)
    normalise = NormaliseImages(Preprocess(image_size=(H, W), mean=(0.5,) * C, std=(0.25,) * C)).to(device)
    plain = PlainStep(config.model, config.decoder, model.state_dict(), normalise, mask_ratio=config.mask_ratio, lr=_LR)
    ours = OurStep(config, model, normalise, accelerator)
    images = torch.randint(
        0, 256, (config.batch_size, C, H, W), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    if device.type == "cuda":
        images = images.pin_memory()
    noise = StepBatch(images.to(device), torch.zeros(0), seed=seed, effective=config.batch_size).rand(
        config.model.num_patches
    )
    losses = {PLAIN: plain(images, noise), OURS: ours(images, 0).item()}
    steps = config.steps or (1 if device.type == "cpu" else 10)

    def our_round() -> None:
        for step in range(steps):
            ours(images, 1 + step)
        _wait(device)

    def plain_round() -> None:
        for _ in range(steps):
            plain(images, torch.rand(config.batch_size, config.model.num_patches, device=device))
        _wait(device)

    return losses, {PLAIN: plain_round, OURS: our_round}


def _gemm(device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    """A call that multiplies two square matrices."""
    x, y = torch.randn(2, _GEMM[device.type], _GEMM[device.type], device=device).to(dtype)

    def product() -> None:
        torch.nn.functional.linear(x, y)
        _wait(device)

    return product


def _figures(
    config: BenchmarkTrainConfig, device: torch.device, name: str, dtype: str, timing: Timing, rates: dict[str, float]
) -> dict[str, Any]:
    steps = config.steps or (1 if device.type == "cpu" else 10)
    visible = keep_count(config.model.num_patches, 1 - config.mask_ratio, least=0)
    # The backward pass has two products for each of the forward pass.
    model: Any = to_dict(config.model)
    flops = 3 * autoencoder_flops(model, to_dict(config.decoder), visible, config.model.num_patches)
    rate = config.batch_size * steps / timing.median
    return {
        "step": name,
        "precision": dtype,
        "step_ms": 1000 * timing.median / steps,
        "fastest_ms": 1000 * min(timing.seconds) / steps,
        "images_per_second": rate,
        "gflop_per_image": flops / 1e9,
        "tflops": rate * flops / 1e12,
        "gemm_share": rate * flops / rates[dtype],
    }


def _machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on."""
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.backends.cpu.get_cpu_capability()}"
    )
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
