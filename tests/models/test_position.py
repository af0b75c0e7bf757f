"""The position table is the original's, number by number, and its interpolation keeps rows and columns apart."""

from __future__ import annotations

import math

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from mae_deploy.models.position import interpolate_position_embedding, sincos_position_embedding


def test_every_number_follows_the_formula() -> None:
    H, W, D = 3, 5, 28
    table = sincos_position_embedding(D, (H, W))
    assert table.shape == (1, 1 + H * W, D)
    assert table.dtype == torch.float32
    frequencies = [10000 ** (-i / (D // 4)) for i in range(D // 4)]
    for row in range(H):
        for column in range(W):
            expected = [wave(at * f) for at in (column, row) for wave in (math.sin, math.cos) for f in frequencies]
            # Numbers up to 1 rounded once to float32.
            assert table[0, 1 + row * W + column].tolist() == pytest.approx(expected, rel=0, abs=2**-24)


def test_the_class_token_has_no_position() -> None:
    assert torch.equal(sincos_position_embedding(12, (2, 3))[:, 0], torch.zeros(1, 12))


@pytest.mark.parametrize(
    ("token", "channel", "value"),
    [
        (1, 320, 1.0),
        (17, 640, 0.8414709568023682),
        (17, 700, 0.17689219117164612),
        (256, 0, 0.6502878665924072),
        (256, 319, 0.0015438002301380038),
        (256, 320, -0.7596879005432129),
        (256, 1279, 0.9999988079071045),
    ],
)
def test_numbers_of_the_original_for_vit_huge(token: int, channel: int, value: float) -> None:
    # Another libm may round a sine the other way: one unit in the last place of float32.
    assert sincos_position_embedding(1280, (16, 16))[0, token, channel].item() == pytest.approx(
        value, rel=0, abs=2**-23
    )


@pytest.mark.parametrize(
    ("token", "channel", "value"),
    [
        (1, 8, -0.0664239227771759),
        (30, 40, 0.028104403987526894),
        (30, 480, 0.0019140656804665923),
        (411, 24, 0.3803408145904541),
        (784, 760, 0.999998152256012),
    ],
)
def test_interpolated_numbers_of_the_original(token: int, channel: int, value: float) -> None:
    table = interpolate_position_embedding(sincos_position_embedding(768, (14, 14)), (14, 14), (28, 28))
    # Sixteen products are summed, in an order that depends on the CPU: a few units in the last place.
    assert table[0, token, channel].item() == pytest.approx(value, rel=0, abs=1e-6)


def random_table(H: int, W: int, D: int = 8) -> Tensor:
    return torch.randn(1, 1 + H * W, D, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("source", "target"), [((3, 5), (7, 11)), ((7, 11), (5, 3)), ((5, 5), (2, 13))])
def test_interpolation_is_timms(source: tuple[int, int], target: tuple[int, int]) -> None:
    table = random_table(*source)
    expected = resample_abs_pos_embed(
        table, list(target), list(source), num_prefix_tokens=1, interpolation="bicubic", antialias=False
    )
    # The same function with the same weights, on another memory layout.
    torch.testing.assert_close(interpolate_position_embedding(table, source, target), expected, rtol=0, atol=1e-6)


def test_interpolation_to_the_same_grid_changes_nothing() -> None:
    table = random_table(3, 5)
    assert torch.equal(interpolate_position_embedding(table, (3, 5), (3, 5)), table)


def test_interpolation_leaves_the_class_token() -> None:
    table = random_table(3, 5)
    assert torch.equal(interpolate_position_embedding(table, (3, 5), (4, 7))[:, :1], table[:, :1])


def test_interpolating_columns_leaves_rows() -> None:
    H, W = 3, 5
    rows = torch.arange(H, dtype=torch.float32).repeat_interleave(W)
    table = torch.cat([torch.zeros(1), rows]).reshape(1, 1 + H * W, 1)
    wider = interpolate_position_embedding(table, (H, W), (H, 11))
    # The weights of a cubic sum to 1 in float32 but for rounding.
    torch.testing.assert_close(
        wider[0, 1:, 0], torch.arange(H, dtype=torch.float32).repeat_interleave(11), rtol=0, atol=1e-6
    )
