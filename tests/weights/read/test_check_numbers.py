"""Weights that are no finite floating-point numbers are refused by name, wherever weights are read."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mae_deploy.checkpoint import save_checkpoint
from mae_deploy.cli import main
from mae_deploy.errors import CheckFailed
from mae_deploy.weights.load import read_weights
from mae_deploy.weights.read.check_numbers import check_numbers
from tests.models.tiny_models import SQUARE, metadata_of, tiny_classifier

FILE = Path("weights.pth")


def tensor_with(*values: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.cat([torch.zeros(5), torch.tensor(values)]).to(dtype)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ((math.nan,), r"b\.weight \(1 NaN of 6\)"),
        ((math.inf, -math.inf), r"b\.weight \(2 infinite of 7\)"),
        ((math.nan, math.nan, math.inf), r"b\.weight \(2 NaN and 1 infinite of 8\)"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_what_is_not_finite_is_named_and_counted(values: tuple[float, ...], said: str, dtype: torch.dtype) -> None:
    tensors = {"a.weight": tensor_with(1.0), "b.weight": tensor_with(*values, dtype=dtype)}
    with pytest.raises(CheckFailed, match=rf"\.pth holds weights that are no finite numbers: {said}$") as caught:
        check_numbers(tensors, FILE)
    assert "earlier checkpoint" in (caught.value.hint or "")


def test_numbers_of_eight_bits() -> None:
    check_numbers({"a": tensor_with(1.0, dtype=torch.float8_e4m3fn)}, FILE)
    with pytest.raises(CheckFailed, match=r"a \(1 NaN of 6\)"):
        check_numbers({"a": tensor_with(math.nan, dtype=torch.float8_e4m3fn)}, FILE)


def test_numbers_that_float32_does_not_hold() -> None:
    with pytest.raises(CheckFailed, match=r"a \(1 infinite of 6\)"):
        check_numbers({"a": tensor_with(1.0).double() * 1e39}, FILE)


def test_extreme_numbers_are_numbers() -> None:
    check_numbers({"a": tensor_with(3e38, -3e38, 1e-45), "b": torch.empty(0)}, FILE)


def test_a_long_list_is_cut_and_the_files_own_names_are_said() -> None:
    tensors = {f"blocks.{index}": tensor_with(math.nan) for index in range(7)}
    with pytest.raises(CheckFailed, match=r"layers\.0 \(1 NaN of 6\), blocks\.1 .*blocks\.3 .* and 3 tensors more$"):
        check_numbers(tensors, FILE, {"blocks.0": "layers.0"})


@pytest.mark.parametrize("command", ["import", "info", "export"])
def test_commands_refuse_a_foreign_file(tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {**tiny_classifier("cls", SQUARE).state_dict()}
    tensors["blocks.1.mlp.fc1.weight"][3, 2] = math.nan
    torch.save(tensors, tmp_path / "diverged.pth")
    out = [] if command == "info" else ["--out", str(tmp_path / "out")]
    assert main([command, str(tmp_path / "diverged.pth"), *out]) == 1
    error = capsys.readouterr().err
    assert "blocks.1.mlp.fc1.weight (1 NaN of 1,600)" in error
    assert "report this" not in error
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_ours_is_refused_where_it_is_read(tmp_path: Path) -> None:
    model = tiny_classifier("avg", SQUARE)
    tensors = {**model.state_dict()}
    tensors["head.bias"] = torch.full_like(tensors["head.bias"], math.inf)
    save_checkpoint(tmp_path / "checkpoint", tensors, metadata_of(model))
    with pytest.raises(CheckFailed, match=r"model\.safetensors holds weights .*: head\.bias \(11 infinite of 11\)"):
        read_weights(tmp_path / "checkpoint")
