"""What a resumed run needs beside the weights comes back bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mae_deploy.checkpoint import WEIGHTS
from mae_deploy.errors import CheckFailed, ConfigError
from mae_deploy.files import read_json, write_json
from mae_deploy.training.optim.groups import adamw, decay_groups
from mae_deploy.training.state.progress import (
    OPTIMIZER,
    REST,
    STATE,
    TRAINED,
    Progress,
    load_optimizer,
    load_progress,
    optimizer_tensors,
    prefix_of,
    read_weights,
    save_progress,
    split_weights,
    write_tensors,
)
from mae_deploy.training.state.sharding import load_whole, whole_tensors


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
    return {
        f"{name}/{key}": value
        for name, parameter in layer.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def save(folder: Path, optimizer: torch.optim.Optimizer) -> Path:
    write_tensors(folder / STATE / OPTIMIZER, whole_tensors(optimizer_tensors(optimizer), keep=True))
    return folder


def test_the_optimiser_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    layer, optimizer = trained(3)
    save(tmp_path, optimizer)

    restored, resumed = trained(1)
    restored.load_state_dict(layer.state_dict())
    load_optimizer(tmp_path, resumed)
    before, after = tensors_of(optimizer, layer), tensors_of(resumed, restored)
    assert (
        set(after)
        == {f"{name}/{slot}" for name in ("weight", "bias") for slot in ("step", "exp_avg", "exp_avg_sq")}
        == set(before)
    )
    assert all(torch.equal(after[name], before[name]) and after[name].dtype == before[name].dtype for name in before)

    advance(layer, optimizer, 2)
    advance(restored, resumed, 2)
    assert torch.equal(restored.weight, layer.weight)
    assert torch.equal(restored.bias, layer.bias)


def test_an_optimiser_that_goes_back_to_the_start_has_no_state(tmp_path: Path) -> None:
    _, optimizer = trained(3)
    load_optimizer(None, optimizer)
    assert len(optimizer.state) == 0


def test_progress(tmp_path: Path) -> None:
    progress = Progress(
        step=7,
        best=12.5,
        scaler={"scale": 65536.0, "_growth_tracker": 3},
        processes=2,
        effective_batch=24,
        lr_factor=0.25,
        good=5,
    )
    save_progress(tmp_path, progress)
    assert load_progress(tmp_path) == progress
    assert read_json(tmp_path / "progress.json")["step"] == 7


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"step": -1}, "'step' is -1"),
        ({"step": 10**19}, "'step' is 10000000000000000000"),
        ({"step": "x"}, "step 'x' is not a whole number"),
        ({"step": None}, "step None is not a whole number"),
        ({"good": []}, r"good \[\] is not"),
        ({"lr_factor": "x"}, "lr_factor 'x' is not a number"),
        ({"lr_factor": -0.5}, "'lr_factor' is -0.5"),
        ({"another": 1}, "unknown setting 'another'"),
    ],
)
def test_progress_that_no_run_has_made(tmp_path: Path, values: dict[str, Any], said: str) -> None:
    save_progress(tmp_path, Progress(step=3))
    write_json(tmp_path / "progress.json", {**read_json(tmp_path / "progress.json"), **values})
    with pytest.raises(ConfigError, match=rf"progress\.json: {said}"):
        load_progress(tmp_path)


def test_a_state_of_whole_numbers_is_refused(tmp_path: Path) -> None:
    _, optimizer = trained(1)
    write_tensors(
        tmp_path / STATE / OPTIMIZER,
        {name: value.to(torch.int64) for name, value in optimizer_tensors(optimizer).items()},
    )
    with pytest.raises(CheckFailed, match=r"the optimiser's \w+/\w+ is torch.int64"):
        load_optimizer(tmp_path, optimizer)


def test_weights_of_another_model_are_refused() -> None:
    layer = nn.Linear(5, 4)
    for tensors in ({"weight": torch.zeros(4, 5)}, {"weight": torch.zeros(3, 5), "bias": torch.zeros(4)}):
        with pytest.raises(CheckFailed, match=r"weights do not fit the run's model: .*(bias|weight)"):
            load_whole(layer, tensors)


def test_kernels_that_an_earlier_version_chose_are_passed_over(tmp_path: Path) -> None:
    save_progress(tmp_path, Progress(step=7))
    recorded = read_json(tmp_path / "progress.json")
    write_json(tmp_path / "progress.json", recorded | {"kernels": {"torch 2.15/forward/256x5x3": "onednn"}})
    assert load_progress(tmp_path) == Progress(step=7)


def test_a_checkpoint_of_a_part_and_the_rest_are_the_whole_model(tmp_path: Path) -> None:
    model = nn.ModuleDict({"student": nn.Linear(5, 3), "projector": nn.Linear(3, 7)})
    prefix = prefix_of(model, model["student"])
    part, rest = split_weights(model.state_dict(), prefix)
    assert (set(part), set(rest)) == ({"weight", "bias"}, {"projector.weight", "projector.bias"})
    write_tensors(tmp_path / WEIGHTS, part)
    write_tensors(tmp_path / STATE / REST, rest)
    weights, averaged = read_weights(tmp_path, prefix)
    assert averaged is None
    assert set(weights) == set(model.state_dict())
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())


def test_of_a_run_with_a_moving_average_both_are_read(tmp_path: Path) -> None:
    model = nn.Linear(5, 3)
    assert prefix_of(model, model) == ""
    write_tensors(tmp_path / WEIGHTS, {name: tensor + 1 for name, tensor in model.state_dict().items()})
    write_tensors(tmp_path / STATE / TRAINED, model.state_dict())
    weights, averaged = read_weights(tmp_path, "")
    assert averaged is not None
    assert torch.equal(weights["weight"], model.weight)
    assert torch.equal(averaged["weight"], model.weight + 1)


def test_no_rest_no_file(tmp_path: Path) -> None:
    write_tensors(tmp_path / STATE / REST, {})
    assert list(tmp_path.iterdir()) == []
