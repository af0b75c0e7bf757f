"""Encoders whose activations have the outliers of large trained ones, and still carry information beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from mae_deploy.models.config import EncoderConfig
from mae_deploy.models.vit import Encoder


def trained_like(depth: int, width: int, heads: int, seed: int = 0) -> Encoder:
    """5x3 patches of 8 pixels; linear maps of the size that training starts from, biases and norms that are not
    trivial.
    """
    config = EncoderConfig(
        name="deep", image_size=(40, 24), patch_size=8, embed_dim=width, depth=depth, num_heads=heads
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = Encoder(config)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name == "cls_token" or name.endswith("bias"):
                tensor.copy_(0.2 * torch.randn(tensor.shape, generator=generator))
            elif "norm" in name:
                tensor.copy_(1 + 0.2 * torch.randn(tensor.shape, generator=generator))
    return model.eval()


@torch.no_grad()
def plant_stream_outliers(
    model: Encoder, images: Tensor, channels: Mapping[int, float], *, hidden: float = 4000.0, cls_alone: bool = False
) -> Encoder:
    """Residual channels of given size in every token (or in CLS alone), and hidden units of `hidden` in every third
    MLP.

    Half of a channel's size comes with the positions, half from the first MLP. The norms behind it are set so that the
    other channels come out of them as large as before: what the model computes still hangs on numbers a thousand times
    smaller than the outliers.
    """
    weights = model.state_dict()  # shares the model's memory
    for index in range(2, model.config.blocks, 3):
        weights[f"blocks.{index}.mlp.fc1.bias"][[3, 8]] += torch.tensor([hidden, -hidden])
        weights[f"blocks.{index}.mlp.fc2.weight"][:, 3] *= 1e-3
    for channel, size in channels.items():
        if cls_alone:
            weights["cls_token"][..., channel] += size
        else:
            weights["pos_embed"][..., channel] += size / 2
            weights["blocks.0.mlp.fc2.bias"][channel] += size / 2
    outliers = torch.zeros(model.config.width, dtype=torch.bool)
    outliers[list(channels)] = True
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    if not cls_alone:
        # Each is set just before it computes, so one pass does for all.
        hooks = [
            norm.register_forward_pre_hook(lambda norm, given: _see_past(norm, given[0], outliers)) for norm in norms
        ]
        model(images)
        for hook in hooks:
            hook.remove()
    for norm in norms:
        norm.weight[outliers] *= 0.1
    return model


@torch.no_grad()
def inputs_of(modules: Sequence[nn.Module], run: Callable[[], object]) -> list[Tensor]:
    """What modules are given while something runs, in the order in which they run."""
    found: list[Tensor] = []
    hooks = [module.register_forward_pre_hook(lambda _, given: found.append(given[0])) for module in modules]
    run()
    for hook in hooks:
        hook.remove()
    return found


def _see_past(norm: nn.Module, tokens: Tensor, outliers: Tensor) -> None:
    """Scale and shift a norm so that all but the outliers come out as if these were not there."""
    rest = tokens[..., ~outliers]
    deviation = rest.std(dim=-1, correction=0)
    scale = (tokens.std(dim=-1, correction=0) / deviation).mean()
    shift = ((tokens.mean(dim=-1) - rest.mean(dim=-1)) / deviation).mean()
    weights = norm.state_dict()
    weights["bias"].add_(weights["weight"] * shift)
    weights["weight"].mul_(scale)
    weights["weight"][outliers] = 1.0
