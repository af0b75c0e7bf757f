"""LARS against numbers of the original implementation, and by hand."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mae_deploy.training.optim.lars import Lars

# Computed with the original implementation: lr 0.1, weight decay 0.01, momentum 0.9, trust coefficient 0.001, from the
# tensors of `drawn`.
STEPS = [
    {
        "w": [
            [-0.11410802602767944, 0.8351882696151733, 0.21547478437423706],
            [-0.24639059603214264, 0.8282093405723572, -0.11772516369819641],
            [0.6771878600120544, -0.6291412115097046, 0.13428987562656403],
            [0.35563138127326965, 0.7442527413368225, -0.24515558779239655],
        ],
        "b": [-0.12451685965061188, -0.1166658028960228, 0.19610315561294556, -0.02498490922152996],
    },
    {
        "w": [
            [-0.11408510059118271, 0.8351899981498718, 0.21538911759853363],
            [-0.2465524673461914, 0.8280894160270691, -0.11780254542827606],
            [0.6772025227546692, -0.6293006539344788, 0.13436642289161682],
            [0.35558170080184937, 0.7441844940185547, -0.24519404768943787],
        ],
        "b": [-0.05791643634438515, 0.07279641926288605, 0.4706539213657379, -0.1063707172870636],
    },
    {
        "w": [
            [-0.11409264802932739, 0.8352094888687134, 0.21538878977298737],
            [-0.24673020839691162, 0.8279946446418762, -0.11795973777770996],
            [0.6772409081459045, -0.6294886469841003, 0.1345287561416626],
            [0.3555658161640167, 0.744110107421875, -0.2451731115579605],
        ],
        "b": [0.010985437780618668, 0.24720482528209686, 0.7907790541648865, -0.1541757434606552],
    },
]


def drawn(name: str, *shape: int) -> Tensor:
    """A tensor that follows from its name: uniform of unit variance over the root of the fan-in, a tenth of it for a
    bias.
    """
    seed = int.from_bytes(hashlib.sha256(f"0:{name}".encode()).digest()[:8], "little")
    numbers = (np.random.Generator(np.random.PCG64(seed)).random(int(np.prod(shape))) - 0.5) * np.sqrt(12.0)
    scale = 0.1 if name.endswith("bias") else 1 / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy((numbers * scale).astype(np.float32).reshape(shape))


def group(parameter: nn.Parameter, **settings: float) -> dict[str, object]:
    return {"params": [parameter], "names": ["p"], "weight_decay": 0.0, "lr_scale": 1.0, "lr": 0.1, **settings}


def test_three_steps_are_those_of_the_original() -> None:
    weight, bias = nn.Parameter(drawn("lars.w", 4, 3)), nn.Parameter(drawn("lars.bias", 4))
    optimizer = Lars([group(weight, weight_decay=0.01), group(bias, weight_decay=0.01)])
    for step, expected in enumerate(STEPS):
        weight.grad, bias.grad = drawn(f"lars.gw{step}", 4, 3), drawn(f"lars.gb{step}", 4, 1)[:, 0]
        optimizer.step()
        # Float32: a few units in the last place of numbers up to 1.
        assert weight.detach().numpy() == pytest.approx(np.array(expected["w"]), abs=3e-7)
        assert bias.detach().numpy() == pytest.approx(np.array(expected["b"]), abs=3e-7)


def test_by_hand() -> None:
    """|w| = 5, |g| = 2: the gradient is scaled by 0.001 * 5 / 2; a vector's is not; the second step adds 0.9 of the
    first.
    """
    weight, bias = nn.Parameter(torch.tensor([[3.0, 4.0]])), nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = Lars([group(weight), group(bias)])
    weight.grad, bias.grad = torch.tensor([[0.0, 2.0]]), torch.tensor([0.0, 2.0])
    optimizer.step()
    assert weight.detach().tolist() == [[3.0, pytest.approx(4 - 0.1 * 0.005)]]
    assert bias.detach().tolist() == [3.0, pytest.approx(4 - 0.1 * 2)]
    optimizer.step()
    assert bias.detach()[1] == pytest.approx(4 - 0.2 - 0.1 * (0.9 * 2 + 2))


@pytest.mark.parametrize(("start", "gradient"), [(0.0, 2.0), (3.0, 0.0)])
def test_where_a_length_is_zero_nothing_is_scaled(start: float, gradient: float) -> None:
    weight = nn.Parameter(torch.full((1, 1), start))
    optimizer = Lars([group(weight)])
    weight.grad = torch.full((1, 1), gradient)
    optimizer.step()
    assert weight.item() == pytest.approx(start - 0.1 * gradient)


def test_weight_decay_is_for_matrices() -> None:
    weight, bias = nn.Parameter(torch.tensor([[2.0]])), nn.Parameter(torch.tensor([2.0]))
    optimizer = Lars([group(weight, weight_decay=0.5), group(bias, weight_decay=0.5)])
    weight.grad, bias.grad = torch.zeros(1, 1), torch.zeros(1)
    optimizer.step()
    assert weight.item() == pytest.approx(
        2 - 0.1 * 0.001 * 2
    )  # the decay alone is the gradient, scaled to 0.001 of the weight
    assert bias.item() == 2.0
