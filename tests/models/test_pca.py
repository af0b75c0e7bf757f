"""Principal components of patches, against NumPy's singular values and a case that can be done by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from mae_deploy.models.pca import PatchPca
from tests.models.tiny_models import random_tensor


def fitted(patches: Tensor, num_components: int) -> PatchPca:
    pca = PatchPca(patches.shape[1], num_components)
    pca.fit(len(patches), patches.sum(dim=0).double(), patches.double().T @ patches.double())
    return pca


def test_by_hand() -> None:
    """Points on the diagonal (1, -1) around (1, 2): one component, pointing to where the larger weight (the first of
    equals) is positive.
    """
    pca = fitted(torch.tensor([[1.0, 2], [3, 0], [-1, 4]]), 1)
    assert pca.mean.tolist() == [1, 2]
    # Variance along the diagonal: (0 + 8 + 8) / 3, so coefficients are in units of its root.
    unit = (16 / 3) ** 0.5
    assert pca(torch.tensor([[3.0, 0]])).abs().item() == pytest.approx(8**0.5 / unit, rel=1e-6)
    # What lies beside the diagonal is lost on the way back.
    torch.testing.assert_close(
        pca.inverse(pca(torch.tensor([[3.0, 0], [2, 3]]))), torch.tensor([[3.0, 0], [1, 2]]), rtol=0, atol=1e-6
    )


def test_against_singular_values() -> None:
    patches = random_tensor(200, 13) @ random_tensor(13, 13, seed=2) + random_tensor(13, seed=3)
    pca = fitted(patches, 5)
    values = patches.double().numpy()
    centred = values - values.mean(axis=0)
    _, sizes, directions = np.linalg.svd(centred, full_matrices=False)
    signs = np.sign(directions[np.arange(5), np.abs(directions[:5]).argmax(axis=1)])
    expected = centred @ (directions[:5] * signs[:, None]).T / np.sqrt((sizes[:5] ** 2 / 200).mean())
    np.testing.assert_allclose(pca(patches).numpy(), expected, rtol=0, atol=1e-4)  # float32 of sums of 13 products
    assert pca(patches).square().mean().item() == pytest.approx(1, rel=1e-4)
    restored = values.mean(axis=0) + centred @ directions[:5].T @ directions[:5]
    np.testing.assert_allclose(pca.inverse(pca(patches)).numpy(), restored, rtol=0, atol=1e-4)


def test_patches_that_are_all_alike() -> None:
    pca = fitted(torch.full((4, 3), 2.0), 2)
    assert torch.isfinite(pca(torch.full((1, 3), 2.0))).all()
    torch.testing.assert_close(pca.inverse(pca(torch.full((1, 3), 2.0))), torch.full((1, 3), 2.0), rtol=0, atol=1e-6)


def test_the_target_is_not_rounded_by_autocast() -> None:
    patches = random_tensor(50, 7)
    pca = fitted(patches, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pca(patches), pca(patches).float())
        assert pca(patches).dtype == torch.float32
