"""What a resumed run needs beside the weights comes back bit for bit."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mae_deploy.files import read_json
from mae_deploy.training.optim import adamw, decay_groups
from mae_deploy.training.state import REST, Progress, load_optimizer, load_progress, load_rest, save_rest, save_state


def trained(steps: int) -> tuple[nn.Linear, torch.optim.AdamW]:
    """A layer and its optimiser after some steps."""
    torch.manual_seed(0)
    layer = nn.Linear(5, 3)
    optimizer = adamw(decay_groups(layer, 0.05), betas=(0.9, 0.95))
    advance(layer, optimizer, steps)
    return layer, optimizer


def advance(layer: nn.Linear, optimizer: torch.optim.Optimizer, steps: int) -> None:
    generator = torch.Generator().manual_seed(steps)
    for _ in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.01
        layer(torch.randn(7, 5, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def tensors_of(optimizer: torch.optim.Optimizer, layer: nn.Linear) -> dict[str, Tensor]:
    return {f"{name}/{key}": value for name, parameter in layer.named_parameters() for key, value in optimizer.state[parameter].items()}


def test_the_optimiser_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    layer, optimizer = trained(3)
    save_state(tmp_path, decay_groups(layer, 0.05), optimizer, Progress(step=3))

    restored = nn.Linear(5, 3)
    restored.load_state_dict(layer.state_dict())
    groups = decay_groups(restored, 0.05)
    resumed = adamw(groups, betas=(0.9, 0.95))
    load_optimizer(tmp_path, groups, resumed)
    before, after = tensors_of(optimizer, layer), tensors_of(resumed, restored)
    assert set(after) == {f"{name}/{slot}" for name in ("weight", "bias") for slot in ("step", "exp_avg", "exp_avg_sq")} == set(before)
    assert all(torch.equal(after[name], before[name]) and after[name].dtype == before[name].dtype for name in before)

    advance(layer, optimizer, 2)
    advance(restored, resumed, 2)
    assert torch.equal(restored.weight, layer.weight)
    assert torch.equal(restored.bias, layer.bias)


def test_progress(tmp_path: Path) -> None:
    layer, optimizer = trained(1)
    progress = Progress(step=7, best=12.5, scaler={"scale": 65536.0, "_growth_tracker": 3}, processes=2)
    save_state(tmp_path, decay_groups(layer, 0.05), optimizer, progress)
    assert load_progress(tmp_path) == progress
    assert read_json(tmp_path / "progress.json")["step"] == 7


def test_the_rest_is_what_the_checkpoint_does_not_hold(tmp_path: Path) -> None:
    model = nn.ModuleDict({"student": nn.Linear(5, 3), "projector": nn.Linear(3, 7)})
    save_rest(tmp_path, model, model["student"])
    assert set(load_file(tmp_path / REST)) == {"projector.weight", "projector.bias"}
    other = nn.ModuleDict({"student": nn.Linear(5, 3), "projector": nn.Linear(3, 7)})
    student = other["student"].state_dict()["weight"].clone()
    load_rest(tmp_path, other)
    assert torch.equal(other["projector"].state_dict()["weight"], model["projector"].state_dict()["weight"])
    assert torch.equal(other["student"].state_dict()["weight"], student)


def test_no_rest_no_file(tmp_path: Path) -> None:
    model = nn.Linear(5, 3)
    save_rest(tmp_path, model, model)
    assert list(tmp_path.iterdir()) == []
    load_rest(tmp_path, model)
