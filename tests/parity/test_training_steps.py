"""Twenty optimiser steps against the paper's method written down once more: float64, plain functions on a dict of
arrays, AdamW by hand.

Nothing of the package computes the reference: it shares names of parameters, starting weights, images and noise, and no
line of code.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from mae_deploy.models.config import DecoderConfig, EncoderConfig
from mae_deploy.models.mae import MaskedAutoencoder
from mae_deploy.models.masking import random_masking
from mae_deploy.training.optim.groups import adamw, decay_groups
from mae_deploy.training.plan import learning_rate

Weights = dict[str, Tensor]

STEPS, STEPS_PER_EPOCH, EPOCHS, WARMUP, PEAK = 20, 5, 4, 1.5, 3e-3
BATCH, RATIO, DECAY, BETAS = 3, 0.75, 0.05, (0.9, 0.95)
# 3x5 patches of 4x4 pixels; the decoder's heads are of 8.
ENCODER = EncoderConfig(name="steps", image_size=(12, 20), patch_size=4, embed_dim=36, depth=2, num_heads=3)
DECODER = DecoderConfig(decoder_depth=1, decoder_embed_dim=24, decoder_num_heads=3)


@dataclass(frozen=True)
class Step:
    """What is compared."""

    loss: float
    norm: float


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    """Images with structure, so that there is something to learn, and the noise that masks them."""
    generator = torch.Generator().manual_seed(11)
    y, x = torch.meshgrid(torch.linspace(-1, 1, 12), torch.linspace(-1, 1, 20), indexing="ij")
    for _ in range(STEPS):
        slope = torch.randn(BATCH, 3, 3, generator=generator)
        plane = slope[..., 0, None, None] * x + slope[..., 1, None, None] * y + slope[..., 2, None, None]
        yield (
            (plane + 0.3 * torch.randn(BATCH, 3, 12, 20, generator=generator)),
            torch.rand(BATCH, 15, generator=generator),
        )


# --- the reference ---------------------------------------------------------------------------------------------------


def norm(x: Tensor, w: Weights, name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(x: Tensor, w: Weights, name: str) -> Tensor:
    return torch.einsum("...i,oi->...o", x, w[f"{name}.weight"]) + w[f"{name}.bias"]


def transformer(x: Tensor, w: Weights, prefix: str, depth: int, heads: int) -> Tensor:
    for index in range(depth):
        name = f"{prefix}.{index}"
        B, T, D = x.shape
        q, k, v = (
            linear(norm(x, w, f"{name}.norm1"), w, f"{name}.attn.qkv").reshape(B, T, 3, heads, D // heads).unbind(2)
        )
        weights = torch.softmax(torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(D // heads), dim=-1)
        x = x + linear(torch.einsum("bhts,bshd->bthd", weights, v).reshape(B, T, D), w, f"{name}.attn.proj")
        hidden = linear(norm(x, w, f"{name}.norm2"), w, f"{name}.mlp.fc1")
        x = x + linear(hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))), w, f"{name}.mlp.fc2")
    return x


def reference_loss(w: Weights, images: Tensor, noise: Tensor, norm_pix: bool) -> Tensor:
    """Patches cut out one by one; visible tokens written to their places, the mask token everywhere else."""
    P, rows, columns, B = 4, 3, 5, len(images)
    patches = torch.stack(
        [images[:, :, r * P : (r + 1) * P, c * P : (c + 1) * P] for r in range(rows) for c in range(columns)], dim=1
    )
    orders = [sorted(range(15), key=row.__getitem__) for row in noise.tolist()]
    visible, hidden = (
        torch.tensor([order[part] for order in orders])
        for part in (slice(int(15 * (1 - RATIO))), slice(int(15 * (1 - RATIO)), None))
    )
    image = torch.arange(B)[:, None]
    embedded = (
        torch.einsum("bnchw,dchw->bnd", patches, w["patch_embed.proj.weight"])
        + w["patch_embed.proj.bias"]
        + w["pos_embed"][:, 1:]
    )
    cls = (w["cls_token"] + w["pos_embed"][:, :1]).expand(B, 1, 36)
    tokens = transformer(torch.cat([cls, embedded[image, visible]], dim=1), w, "blocks", 2, 3)
    latent = linear(norm(tokens, w, "norm"), w, "decoder_embed")
    full = w["mask_token"].repeat(B, 16, 1)
    full[:, 0] = latent[:, 0]
    full[image, 1 + visible] = latent[:, 1:]
    decoded = norm(transformer(full + w["decoder_pos_embed"], w, "decoder_blocks", 1, 3), w, "decoder_norm")
    predicted = linear(decoded, w, "decoder_pred")[image, 1 + hidden]
    target = patches[image, hidden].permute(0, 1, 3, 4, 2).flatten(2)
    if norm_pix:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, unbiased=True, keepdim=True) + 1e-6).sqrt()
    return (predicted - target).pow(2).mean()


def reference_steps(start: Weights, norm_pix: bool) -> Iterator[Step]:
    """AdamW (Loshchilov and Hutter, algorithm 2), the cosine schedule with warm-up, no decay on vectors."""
    w = {name: tensor.double() for name, tensor in start.items()}
    trained = [name for name in w if "pos_embed" not in name]
    first, second = ({name: torch.zeros_like(w[name]) for name in trained} for _ in range(2))
    for step, (images, noise) in enumerate(batches()):
        for name in trained:
            w[name] = w[name].detach().requires_grad_()
        loss = reference_loss(w, images.double(), noise, norm_pix)
        gradients = dict(zip(trained, torch.autograd.grad(loss, [w[name] for name in trained]), strict=True))
        yield Step(loss.item(), math.sqrt(sum(float(g.pow(2).sum()) for g in gradients.values())))
        epoch = step / STEPS_PER_EPOCH
        lr = (
            PEAK * epoch / WARMUP
            if epoch < WARMUP
            else PEAK * 0.5 * (1 + math.cos(math.pi * (epoch - WARMUP) / (EPOCHS - WARMUP)))
        )
        for name, g in gradients.items():
            first[name] = BETAS[0] * first[name] + (1 - BETAS[0]) * g
            second[name] = BETAS[1] * second[name] + (1 - BETAS[1]) * g * g
            moved = (first[name] / (1 - BETAS[0] ** (step + 1))) / (
                (second[name] / (1 - BETAS[1] ** (step + 1))).sqrt() + 1e-8
            )
            decay = 0.0 if w[name].ndim == 1 else DECAY
            w[name] = w[name].detach() * (1 - lr * decay) - lr * moved


# --- ours ------------------------------------------------------------------------------------------------------------


def our_steps(model: MaskedAutoencoder) -> Iterator[Step]:
    optimizer = adamw(decay_groups(model, DECAY), betas=BETAS)
    for step, (images, noise) in enumerate(batches()):
        loss = model(images, random_masking(noise, RATIO)).loss
        optimizer.zero_grad()
        loss.backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        yield Step(loss.item(), torch.stack([gradient.double().norm() for gradient in gradients]).norm().item())
        lr = learning_rate(step / STEPS_PER_EPOCH, peak=PEAK, min_lr=0.0, warmup_epochs=WARMUP, epochs=EPOCHS)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        optimizer.step()


@pytest.mark.parametrize("norm_pix", [True, False])
def test_twenty_steps(norm_pix: bool) -> None:
    torch.manual_seed(5)
    model = MaskedAutoencoder(ENCODER, DECODER, norm_pix_loss=norm_pix).train()
    with torch.no_grad():  # biases and norms too
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected, found = list(reference_steps(start, norm_pix)), list(our_steps(model))
    assert expected[-1].loss < 0.95 * expected[0].loss, "nothing was learnt, so twenty steps say no more than one"
    # float32 against float64 over twenty steps; the most that was seen is 4e-7.
    for name in ("loss", "norm"):
        assert [getattr(step, name) for step in found] == pytest.approx(
            [getattr(step, name) for step in expected], rel=1e-5
        )
