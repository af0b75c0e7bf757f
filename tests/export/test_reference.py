"""The reference is the model's own forward pass, whatever the number of samples and whichever patches each of them
has.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mae_deploy.config import from_dict
from mae_deploy.export.graph.spec import TokenMode, available_outputs
from mae_deploy.export.reference import Reference
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.images.read import Array
from mae_deploy.models.mae import MaskedAutoencoder
from mae_deploy.models.pyramid import LEVELS
from mae_deploy.models.vit import Classifier, Encoder, Pool, patchify, unpatchify
from mae_deploy.weights.pyramid import random_pyramid
from tests.export.tiny_exports import padded, permutations, pytorch_outputs
from tests.models.tiny_models import (
    CLASSES,
    ENCODER,
    metadata_of,
    random_tensor,
    tiny_classifier,
    tiny_encoder,
    tiny_mae,
)

SAMPLES = 11
"""More than one batch of 8."""

IMAGES = random_tensor(SAMPLES, 3, 6, 10).numpy()
N = ENCODER.num_patches


def reference_of(model: Encoder, **more: object) -> Reference:
    preprocess = from_dict(Preprocess, metadata_of(model).preprocess)
    return Reference(model=model, preprocess=preprocess, **more)  # type: ignore[arg-type]


def tokens_for(mode: TokenMode) -> dict[str, Array]:
    if mode == "ragged":
        return padded(N, [7, 1, 2, 5, 7, 3, 3, 4, 6, 1, 2], 7)
    return {} if mode == "full" else {"ids_keep": permutations(N, SAMPLES, 4)}


def assert_the_same(found: dict[str, Array], expected: dict[str, Array]) -> None:
    """A batch of 11 and one of 8 may sum in another order."""
    for name, array in found.items():
        assert array.dtype == np.float32
        np.testing.assert_allclose(array, expected[name], rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("mode", ["full", "visible", "ragged"])
@pytest.mark.parametrize("kind", ["encoder", "avg", "cls"])
def test_every_output_in_every_mode(kind: str, mode: TokenMode) -> None:
    model = tiny_encoder() if kind == "encoder" else tiny_classifier("avg" if kind == "avg" else "cls")
    names = available_outputs(metadata_of(model), mode)
    tokens = tokens_for(mode)
    found = reference_of(model).outputs({"images": IMAGES, **tokens}, names)
    assert tuple(found) == names
    assert_the_same(found, pytorch_outputs(model, IMAGES, tokens))


def test_the_models_own_forward_pass() -> None:
    """Nothing of it is written out again here."""
    model = tiny_encoder()
    found = reference_of(model).outputs({"images": IMAGES}, ("tokens", "pooled", "cls"))
    assert list(found) == ["tokens", "pooled", "cls"]
    with torch.no_grad():
        tokens = model(torch.from_numpy(IMAGES)).numpy()
    assert_the_same(found, {"cls": tokens[:, 0], "tokens": tokens[:, 1:], "pooled": tokens[:, 1:].mean(axis=1)})


@pytest.mark.parametrize("pool", ["avg", "cls"])
def test_the_classifiers_own_forward_pass(pool: Pool) -> None:
    model = tiny_classifier(pool)
    found = reference_of(model).outputs({"images": IMAGES}, ("pooled", "logits", "probs"))
    images = torch.from_numpy(IMAGES)
    with torch.no_grad():
        pooled = model.forward_pooled(images) if pool == "avg" else Encoder.forward(model, images)[:, 1:].mean(dim=1)
        logits = model(images)
        expected = {"pooled": pooled, "logits": logits, "probs": logits.softmax(dim=1)}
        assert_the_same(found, {name: tensor.numpy() for name, tensor in expected.items()})
    assert found["logits"].shape == (SAMPLES, CLASSES)


@pytest.mark.parametrize("mode", ["full", "visible", "ragged"])
def test_the_pyramid_on_the_last_block(mode: TokenMode) -> None:
    model, pyramid, tokens = tiny_encoder(), random_pyramid(ENCODER.width, 0, out_channels=7).module, tokens_for(mode)
    found = reference_of(model, pyramid=pyramid).outputs({"images": IMAGES, **tokens}, LEVELS)
    assert_the_same(found, pytorch_outputs(model, IMAGES, tokens, pyramid=pyramid))


@pytest.mark.parametrize("pixels", ["target", "normalised", "image"])
@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_pixels(norm_pix_loss: bool, pixels: str) -> None:
    model, ids = tiny_mae(norm_pix_loss=norm_pix_loss), permutations(N, SAMPLES, 4)
    found = reference_of(model, pixels=pixels).outputs({"images": IMAGES, "ids_keep": ids}, ("pixels",))["pixels"]
    expected = pytorch_outputs(model, IMAGES, {"ids_keep": ids})["pixels"].astype(np.float64)
    if norm_pix_loss and pixels != "target":
        patches = patchify(torch.from_numpy(IMAGES).double(), 2).numpy()
        expected = expected * np.sqrt(patches.var(axis=2, ddof=1, keepdims=True) + 1e-6) + patches.mean(
            axis=2, keepdims=True
        )
    if pixels == "image":
        images = unpatchify(torch.from_numpy(expected), 2, ENCODER.grid_size).numpy()
        mean, std = (np.reshape(values, (3, 1, 1)) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        expected = patchify(torch.from_numpy(images * std + mean), 2).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)  # sums of FP32 numbers up to 30


def test_a_perfect_prediction_is_the_image() -> None:
    """The target itself, taken back to the space of images."""

    class Perfect(MaskedAutoencoder):
        def forward_decoder(self, latent: torch.Tensor, ids_restore: torch.Tensor) -> torch.Tensor:
            return self.target(torch.from_numpy(IMAGES[:8]))

    own = tiny_mae()
    model = Perfect(own.config, own.decoder_config)
    found = reference_of(model, pixels="normalised").outputs(
        {"images": IMAGES[:8], "ids_keep": permutations(N, 8, 4)}, ("pixels",)
    )["pixels"]
    np.testing.assert_allclose(found, patchify(torch.from_numpy(IMAGES[:8]), 2).numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("mode", "tokens"), [("full", 16), ("visible", 5), ("ragged", 2)])
def test_what_every_block_gives(mode: TokenMode, tokens: int) -> None:
    """CLS first; of a ragged batch as many tokens as each of the samples has."""
    model, inputs = tiny_encoder(), tokens_for(mode)
    found = reference_of(model).blocks({"images": IMAGES, **inputs}, num_samples=3, num_tokens=17)
    assert (found.shape, found.dtype.name) == ((3, 2, tokens, 20), "float32")
    expected = pytorch_outputs(model, IMAGES[:3], {name: array[:3] for name, array in inputs.items()})
    for index in range(2):
        np.testing.assert_allclose(found[:, index, 1:], expected[f"block_{index}"][:, : tokens - 1], rtol=0, atol=1e-5)
    with torch.no_grad():  # the last block, CLS too, is what the final norm reads
        np.testing.assert_allclose(
            model.norm(torch.from_numpy(found[:, 1, 0])).numpy(), expected["cls"], rtol=0, atol=1e-5
        )
    few = reference_of(model).blocks({"images": IMAGES, **inputs}, num_samples=1, num_tokens=2)
    np.testing.assert_allclose(few, found[:1, :, :2], rtol=0, atol=1e-5)


def test_a_model_in_training_is_judged_in_evaluation() -> None:
    torch.manual_seed(0)
    model = Encoder(tiny_encoder().config, drop_path=0.5).train()
    first, second = (reference_of(model).outputs({"images": IMAGES}, ("cls",))["cls"] for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_no_hook_is_left_behind() -> None:
    model = tiny_classifier("cls")
    assert isinstance(model, Classifier)
    reference_of(model).outputs({"images": IMAGES}, ("block_0",))
    assert not any(module._forward_hooks for module in model.modules())
