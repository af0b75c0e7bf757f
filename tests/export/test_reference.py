"""The reference is the model's own forward pass, whatever the number of samples."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mae_deploy.export.reference import reference_outputs
from mae_deploy.models.vit import Encoder, Pool
from tests.models.tiny_models import CLASSES, random_tensor, tiny_classifier, tiny_encoder

SAMPLES = 11
"""More than one batch of 8."""


def test_encoder() -> None:
    model, images = tiny_encoder(), random_tensor(SAMPLES, 3, 6, 10)
    found = reference_outputs(model, images.numpy(), None, ("cls", "tokens", "pooled"), "cpu")
    with torch.no_grad():
        tokens = model(images).numpy()
    assert {name: (array.shape, array.dtype.name) for name, array in found.items()} == {
        "cls": ((SAMPLES, 20), "float32"),
        "tokens": ((SAMPLES, 15, 20), "float32"),
        "pooled": ((SAMPLES, 20), "float32"),
    }
    # A batch of 11 and one of 8 may sum in another order.
    np.testing.assert_allclose(found["cls"], tokens[:, 0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(found["tokens"], tokens[:, 1:], rtol=0, atol=1e-5)
    np.testing.assert_allclose(found["pooled"], tokens[:, 1:].mean(axis=1), rtol=0, atol=1e-5)


def test_each_sample_with_its_own_patches() -> None:
    model, images = tiny_encoder(), random_tensor(SAMPLES, 3, 6, 10)
    ids = np.stack([np.random.default_rng(index).permutation(15)[:4] for index in range(SAMPLES)])
    found = reference_outputs(model, images.numpy(), ids, ("tokens",), "cpu")
    assert list(found) == ["tokens"]
    with torch.no_grad():
        for index in range(SAMPLES):
            alone = model(images[index : index + 1], torch.from_numpy(ids[index : index + 1]))
            np.testing.assert_allclose(found["tokens"][index], alone[0, 1:].numpy(), rtol=0, atol=1e-5)  # as above


@pytest.mark.parametrize("pool", ["avg", "cls"])
def test_classifier(pool: Pool) -> None:
    model, images = tiny_classifier(pool), random_tensor(SAMPLES, 3, 6, 10)
    found = reference_outputs(model, images.numpy(), None, ("pooled", "logits"), "cpu")
    with torch.no_grad():
        pooled = model.forward_pooled(images) if pool == "avg" else Encoder.forward(model, images)[:, 1:].mean(dim=1)
        logits = model(images)
    assert logits.shape == (SAMPLES, CLASSES)
    assert list(found) == ["pooled", "logits"]
    np.testing.assert_allclose(found["pooled"], pooled.numpy(), rtol=0, atol=1e-5)  # as above
    np.testing.assert_allclose(found["logits"], logits.numpy(), rtol=0, atol=1e-5)


def test_a_model_in_training_is_judged_in_evaluation() -> None:
    torch.manual_seed(0)
    model, images = Encoder(tiny_encoder().config, drop_path=0.5).train(), random_tensor(SAMPLES, 3, 6, 10).numpy()
    first, second = (reference_outputs(model, images, None, ("cls",), "cpu")["cls"] for _ in range(2))
    np.testing.assert_array_equal(first, second)
