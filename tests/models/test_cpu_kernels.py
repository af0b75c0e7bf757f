"""Linear layers by measured kernels: the same numbers as `nn.Linear`, chosen once, and never where they were not
measured.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mae_deploy.models import cpu_kernels as kernels_module
from mae_deploy.models.cpu_kernels import ATTENTION, DEFAULT, PRODUCTS, Kernels, MeasuredLinear, measure, use_kernels
from tests.models.tiny_models import tiny_encoder

M, K, N = 7, 11, 13


@pytest.fixture(autouse=True)
def everything_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kernels_module, "_SMALLEST", 0)
    monkeypatch.setenv("MAE_DEPLOY_CACHE", str(tmp_path))


def layer(kernels: Kernels, *, bias: bool = True) -> tuple[nn.Linear, nn.Linear]:
    """A plain layer, and the same one by measured kernels."""
    torch.manual_seed(0)
    plain = nn.Linear(K, N, bias=bias)
    measured = copy.deepcopy(plain)
    use_kernels(measured, kernels)
    return plain, measured


class Forced(Kernels):
    """Always takes the kernel of this name, if there is one of this kind."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def product(self, kind: str, M: int, K: int, N: int) -> str:
        return self.name if self.name in PRODUCTS[kind] else DEFAULT


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")
@pytest.mark.parametrize("name", sorted({name for kind in PRODUCTS.values() for name in kind}))
@pytest.mark.parametrize("bias", [True, False])
def test_every_kernel_gives_outputs_and_gradients_of_the_plain_layer(name: str, bias: bool) -> None:
    plain, measured = layer(Forced(name), bias=bias)
    x = torch.randn(2, M, K)
    results = []
    for module in (plain, measured):
        given = x.clone().requires_grad_()
        out = module(given)
        out.backward(torch.arange(out.numel()).view_as(out) / 100.0)
        results.append([out, given.grad, *(parameter.grad for parameter in module.parameters())])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # sums of up to 14 products in another order


def test_gradients_that_nobody_needs_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: list[str] = []
    kernels = Kernels()

    def product(kind: str, *_: int) -> str:
        kinds.append(kind)
        return DEFAULT

    monkeypatch.setattr(kernels, "product", product)
    _, measured = layer(kernels)
    measured(torch.randn(M, K)).sum().backward()
    assert kinds == ["forward", "grad weight"]
    kinds.clear()
    measured.weight.requires_grad_(False)
    measured(torch.randn(M, K, requires_grad=True)).sum().backward()
    assert kinds == ["forward", "grad input"]


def test_elsewhere_it_is_the_plain_layer() -> None:
    plain, measured = layer(Forced("no such kernel is there"))
    assert isinstance(measured, MeasuredLinear)
    measured.kernels.product = None  # type: ignore[method-assign, assignment]  # calling it would fail
    x = torch.randn(M, K)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(measured(x), plain(x))
    assert torch.equal(measured.double()(x.double()), plain.double()(x.double()))


def test_names_copies_and_other_modules_stay() -> None:
    encoder = tiny_encoder()
    names, kernels = list(encoder.state_dict()), Kernels()
    use_kernels(encoder, kernels)
    assert list(encoder.state_dict()) == names
    found = [module for module in copy.deepcopy(encoder).modules() if isinstance(module, MeasuredLinear)]
    assert len(found) == 4 * len(encoder.blocks)
    assert all(module.kernels is kernels for module in found)


# --- the choice ------------------------------------------------------------------------------------------------------


def took(monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float]) -> list[int]:
    """Let every measurement find this; counts them."""
    calls: list[int] = []

    def find(*_: object) -> dict[str, float]:
        calls.append(1)
        return seconds

    monkeypatch.setattr(kernels_module, "measure", find)
    return calls


def test_the_fastest_is_taken_if_it_is_clearly_faster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    took(monkeypatch, {DEFAULT: 1.0, "onednn": 0.98, "onednn packed": 1.5})
    assert Kernels(file=tmp_path / "1").product("forward", M, K, N) == DEFAULT
    took(monkeypatch, {DEFAULT: 1.0, "onednn": 0.9, "onednn packed": 0.5})
    kernels = Kernels(file=tmp_path / "2")
    assert kernels.product("forward", M, K, N) == "onednn packed"
    assert "1 of 1 sizes have one that is faster than PyTorch's own, 2.00 times" in str(kernels.summary())
    assert kernels.summary() is None


def test_a_size_is_measured_once_by_a_run_its_continuation_and_the_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = took(monkeypatch, {DEFAULT: 1.0, "onednn": 0.5})
    run = Kernels()
    assert [run.product("forward", rows, K, N) for rows in (5, 6, 7, 8)] == ["onednn"] * 4
    assert len(calls) == 1
    took(monkeypatch, {DEFAULT: 1.0, "onednn": 2.0})
    assert Kernels(dict(run.chosen), file=tmp_path / "elsewhere").product("forward", M, K, N) == "onednn"
    assert Kernels().product("forward", M, K, N) == "onednn"
    assert Kernels(file=tmp_path / "elsewhere").product("forward", M, K, N) == DEFAULT


def test_processes_take_the_choice_of_the_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", lambda: store)
    found = []
    for process, onednn in (("a", 0.5), ("b", 2.0)):
        took(monkeypatch, {DEFAULT: 1.0, "onednn": onednn})
        found.append(Kernels(file=tmp_path / process).product("forward", M, K, N))
    assert found == ["onednn", "onednn"]


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1}', "null"])
def test_a_broken_file_is_measured_again(monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    took(monkeypatch, {DEFAULT: 1.0, "onednn": 0.5})
    file = kernels_module.machine_file()
    file.parent.mkdir()
    file.write_text(content)
    kernels = Kernels()
    assert kernels.product("forward", M, K, N) == "onednn"
    assert kernels.chosen.items() <= json.loads(file.read_text()).items()


def test_a_cache_that_cannot_be_written_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    kernels = Kernels(file=tmp_path / "file" / "kernels.json")
    assert kernels.product("forward", M, K, N) in PRODUCTS["forward"]


def test_what_fails_or_computes_something_else_is_left_out() -> None:
    def fails(x: Tensor, y: Tensor) -> Tensor:
        raise RuntimeError("not on this CPU")

    candidates: dict[str, Callable[..., Tensor]] = {
        DEFAULT: F.linear,
        "fails": fails,
        "bf16": lambda x, y: F.linear(x.bfloat16(), y.bfloat16()).float(),
        "same": lambda x, y: x @ y.t(),
    }
    assert list(measure(candidates, (torch.randn(M, K), torch.randn(N, K)))) == [DEFAULT, "same"]


def test_measuring_leaves_the_random_numbers_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    Kernels().product("forward", M, K, N)
    Kernels().fused_attention(2, 3, 5, 4, unmeasured=True)
    assert torch.equal(torch.rand(4), expected)


def test_attention_is_chosen_by_its_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for explicit, fused in ((0.5, False), (2.0, True)):
        took(monkeypatch, {"fused": 1.0, "explicit": explicit})
        assert Kernels(file=tmp_path / str(explicit)).fused_attention(2, 3, 5, 4, unmeasured=not fused) is fused


def test_both_attentions_agree() -> None:
    q, k, v = torch.randn(3, 2, 3, 5, 4).unbind()
    torch.testing.assert_close(ATTENTION["explicit"](q, k, v), ATTENTION["fused"](q, k, v))


def test_blocks_ask_for_the_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = tiny_encoder()
    kernels = Kernels()
    use_kernels(encoder, kernels)
    asked: list[tuple[int, ...]] = []

    def fused(*sizes: int, unmeasured: bool) -> bool:
        asked.append(sizes)
        return not unmeasured

    monkeypatch.setattr(kernels, "fused_attention", fused)
    config = encoder.config
    encoder(torch.randn(2, config.in_chans, *config.image_size))
    assert all(block.attn.fused_attn for block in encoder.blocks)  # type: ignore[union-attr]
    assert asked == [(2, config.heads, 1 + config.num_patches, config.width // config.heads)] * config.blocks
