"""A teacher's rows in the student's grid, of the student's patches."""

from __future__ import annotations

import torch

from mae_deploy.distill.teachers.answers import answers_for
from mae_deploy.models.taps import Tap

LATENT, QKV, DECODER, TOKENS = Tap("latent"), Tap("qkv", 1), Tap("decoder", 1), Tap("tokens", 1)


def test_maps_are_interpolated_by_hand() -> None:
    """Bilinear from 2 to 4 columns with half-pixel centres: 0, 1/4, 3/4, 1; the CLS row stays."""
    rows = torch.tensor([7.0, 0.0, 1.0])[None, :, None]
    found = answers_for({LATENT: rows, DECODER: rows[:, 1:]}, None, found=(1, 2), asked=(1, 4))
    assert found[LATENT].flatten().tolist() == [7, 0, 0.25, 0.75, 1]
    assert not found[DECODER].any()  # of one channel, LayerNorm leaves nothing


def test_a_ramp_stays_a_ramp_in_a_smaller_grid_for_every_channel_of_qkv() -> None:
    """4 columns to 2: each is the mean of two, as with any window that is symmetric."""
    B, H, D = 2, 5, 3
    channels = torch.arange(B * 3 * H * D, dtype=torch.float32).reshape(B, 3, H, 1, D)
    columns = torch.tensor([0.0, 1.0, 2.0, 3.0])[:, None]
    qkv = channels + torch.cat([torch.tensor([[50.0]]), columns])
    found = answers_for({QKV: qkv}, None, found=(1, 4), asked=(1, 2))[QKV]
    assert found.shape == (B, 3, H, 3, D)
    centred = (found - channels)[..., 1:, :]
    torch.testing.assert_close(
        centred.sum(dim=3), torch.full((B, 3, H, D), 3.0), rtol=0, atol=1e-4
    )  # float32 numbers up to 140
    assert torch.equal((found - channels)[..., 0, :], torch.full((B, 3, H, D), 50.0))


def test_rows_are_picked_after_they_are_interpolated() -> None:
    rows = torch.tensor([7.0, 0.0, 1.0])[None, :, None]
    found = answers_for({LATENT: rows, Tap("pooled"): rows[:, 0]}, torch.tensor([[3, 1]]), found=(1, 2), asked=(1, 4))
    assert found[LATENT].flatten().tolist() == [7, 1, 0.25]
    assert found[Tap("pooled")].item() == 7


def test_tokens_are_normalised_and_the_rest_is_not() -> None:
    value = torch.tensor([[[1.0, 3.0], [5.0, 5.5]]], dtype=torch.bfloat16)
    found = answers_for({TOKENS: value, LATENT: value}, None, found=(1, 1), asked=(1, 1))
    assert torch.equal(found[LATENT], value.float())
    torch.testing.assert_close(
        found[TOKENS], torch.tensor([[[-1.0, 1.0], [-1.0, 1.0]]]), rtol=0, atol=1e-3
    )  # eps 1e-5 beside a variance of 1/16
