"""What the outliers of today's families cost in INT8, and what brings it back: random networks with planted outliers.

    python scripts/measure_int8_outliers.py        prints the table of docs/results/int8-outliers.md

Random weights have no outliers. Planted are, each leaving what the other numbers say alone:
- gate: two units of SwiGLU's product, 50 times as large as the others;
- channels: three channels of the registers, 100 times as large as their norm was (Darcet et al. 2023, section 2);
- unit: one hidden unit that fires on registers alone, and writes a massive channel (Sun et al. 2024, section 4).
What is quantised is computed in PyTorch as the exported graphs compute it (`export.quantization.fake_quant`).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from mae_deploy.export.quantization.fake_quant import fake_quantized
from mae_deploy.models.config import EncoderConfig
from mae_deploy.models.quantization.activations import ActivationStats, Observer
from mae_deploy.models.quantization.policy import Policy
from mae_deploy.models.quantization.rounding import eligible_linears
from mae_deploy.models.quantization.smoothing import Divisors, smooth, smoothed_stats
from mae_deploy.models.vit import Encoder

GATED = EncoderConfig(
    name="dinov3",
    image_size=(96, 96),
    patch_size=16,
    embed_dim=192,
    depth=4,
    num_heads=3,
    rotary="dinov3",
    num_registers=4,
    activation="swiglu",
    norm_eps=1e-5,
)
PLAIN = replace(GATED, activation="gelu")
_UNIT, _CHANNELS = 7, [5, 40, 133]
_GAIN = 50.0


def network(config: EncoderConfig, seed: int) -> Encoder:
    """Linears that keep the variance, norms around 1, small biases."""
    generator, model = torch.Generator().manual_seed(seed), Encoder(config).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                tensor.copy_(1 + 0.2 * noise)
            elif name.endswith("bias") or "token" in name:
                tensor.copy_(0.2 * noise)
            else:
                tensor.copy_(noise / math.sqrt(tensor[0].numel()))
    return model


@torch.no_grad()
def plant_gate(model: Encoder) -> None:
    """Two units of every product times 50, their columns divided by it: the same function."""
    for block in cast(Any, model.blocks):
        first, second = block.mlp.fc1, block.mlp.fc2
        units = torch.ones(second.in_features)
        units[[_UNIT, 19]] = _GAIN
        rows = torch.cat([torch.ones_like(units), units])
        first.weight.mul_(rows[:, None])
        first.bias.mul_(rows)
        second.weight.div_(units)


@torch.no_grad()
def plant_channels(model: Encoder) -> None:
    """In the registers, as trained networks have them."""
    registers = model.reg_token
    assert registers is not None
    registers[..., _CHANNELS] = 100 * registers.norm(dim=-1, keepdim=True)


@torch.no_grad()
def plant_unit(model: Encoder) -> None:
    """In the second block, of registers that are alike; it fires where the norm's output has their direction."""
    registers, block = model.reg_token, cast(Any, model.blocks[1])
    mlp, norm = block.mlp, block.norm2
    assert registers is not None
    registers.copy_(4 * registers[:, :1].sign() + registers)
    seen = norm(registers[0]).mean(dim=0)
    direction, hidden = seen / seen.square().sum(), mlp.fc2.in_features
    size = 400.0 if hidden == mlp.fc1.out_features else 20.0
    for row in {_UNIT, mlp.fc1.out_features - hidden + _UNIT}:  # of a gated one, gate and value: 20 times 20
        mlp.fc1.weight[row] = 2 * size * direction
        mlp.fc1.bias[row] = -size
    mlp.fc2.weight[:, _UNIT] *= 0.05
    mlp.fc2.weight[_CHANNELS[1], _UNIT] = 0.5


PLANTED: dict[str, tuple[EncoderConfig, Callable[[Encoder], None] | None]] = {
    "none, SwiGLU": (GATED, None),
    "gate, SwiGLU": (GATED, plant_gate),
    "none, GELU": (PLAIN, None),
    "channels, GELU": (PLAIN, plant_channels),
    "unit, GELU": (PLAIN, plant_unit),
    "unit, SwiGLU": (GATED, plant_unit),
}


def observed(model: Encoder, images: Tensor, *, first: int = 0) -> dict[str, ActivationStats]:
    """Statistics of the inputs of Linears, of the tokens from `first` on."""
    names = eligible_linears(model)
    observer = Observer(model, names)

    def see(name: str) -> Callable[..., None]:
        return lambda _, given: observer.see(name, given[0][:, first:])

    hooks = [model.get_submodule(name).register_forward_pre_hook(see(name)) for name in names]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return observer.stats()


def sqnr(expected: Tensor, found: Tensor) -> float:
    """In dB."""
    return 10 * math.log10(float(expected.double().square().sum() / (found - expected).double().square().sum()))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    seeds = range(parser.parse_args().seeds)
    rows: dict[str, Callable[[Encoder, Tensor], tuple[dict[str, Tensor], dict[str, float | None]]]] = {
        "static, not smoothed": lambda model, images: quantised(model, images, alpha=None),
        "static, smoothed but fc2": lambda model, images: quantised(model, images, without="fc2"),
        "static": lambda model, images: quantised(model, images),
        "static, percentile": lambda model, images: quantised(model, images, method="percentile"),
        "static, ranges of patches alone": lambda model, images: quantised(
            model, images, first=model.config.num_prefix
        ),
        "static, fc2 of block 1 in FP32": lambda model, images: quantised(model, images, high="blocks.1.mlp.fc2"),
        "dynamic, smoothed but fc2": lambda model, images: quantised(model, images, static=False, without="fc2"),
        "dynamic": lambda model, images: quantised(model, images, static=False),
    }
    print(f"| SQNR of the patch tokens in dB | {' | '.join(PLANTED)} |\n|---|{'--:|' * len(PLANTED)}")
    table: dict[str, list[str]] = {name: [] for name in rows}
    for config, plant in PLANTED.values():
        found: dict[str, list[float]] = {name: [] for name in rows}
        for seed in seeds:
            model = network(config, seed)
            if plant is not None:
                plant(model)
            images = torch.randn(24, 3, *config.image_size, generator=torch.Generator().manual_seed(seed))
            with torch.no_grad():
                expected = model(images[16:])[:, config.num_prefix :]
            for name, row in rows.items():
                tensors, scales = row(model, images[:16])
                other = Encoder(config).eval()
                other.load_state_dict(tensors)
                with torch.no_grad(), fake_quantized(other, scales):
                    found[name].append(sqnr(expected, other(images[16:])[:, config.num_prefix :]))
        for name, values in found.items():
            table[name].append(f"{sum(values) / len(values):.1f}")
    for name, cells in table.items():
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def quantised(
    model: Encoder,
    images: Tensor,
    *,
    static: bool = True,
    alpha: float | None = 0.5,
    without: str | None = None,
    method: str = "mse",
    first: int = 0,
    high: str | None = None,
) -> tuple[dict[str, Tensor], dict[str, float | None]]:
    """Weights that were smoothed, and the scales of the inputs of Linears.

    Args:
        without: Linears whose inputs are not smoothed.
        first: the token from which on ranges are taken.
        high: a Linear that stays in FP32.
    """
    tensors, names = model.state_dict(), eligible_linears(model)
    policy = Policy(static=static, smooth_alpha=alpha, method=method)  # type: ignore[arg-type]
    stats = observed(model, images, first=first) if static else None
    found = policy.divisors(tensors, names, stats)
    divisors: Divisors = {name: divisor for name, divisor in found.items() if not (without and name.endswith(without))}
    scales = policy.scales(names, smoothed_stats(stats, divisors) if stats else {})
    return smooth(tensors, divisors), {name: scale for name, scale in scales.items() if name != high}


if __name__ == "__main__":
    main()
