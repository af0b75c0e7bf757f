"""The decoder's graph gives the pixels that the autoencoder predicts, in the space asked for, whatever the order of the
visible patches.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mae_deploy.config import from_dict
from mae_deploy.export.graph.spec import Images, Pixels
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.images.read import Array
from mae_deploy.models.config import DecoderConfig
from mae_deploy.models.mae import MaskedAutoencoder
from mae_deploy.models.masking import random_masking
from mae_deploy.models.vit import patchify, unpatchify
from mae_deploy.pretrain.reconstruct import draw_reconstructions
from tests.export.tiny_exports import assert_close, graph_of, normalised, permutations, pytorch_outputs, random_pixels
from tests.models.tiny_models import ENCODER, fill, metadata_of, random_tensor, tiny_mae

N = ENCODER.num_patches


def preprocess_of(model: MaskedAutoencoder) -> Preprocess:
    return from_dict(Preprocess, metadata_of(model).preprocess)


def in_space(model: MaskedAutoencoder, predicted: Array, images: Array, pixels: Pixels) -> Array:
    """What the decoder predicts in units of each patch's own deviation, in those of the images; in float64."""
    values = predicted.astype(np.float64)
    if model.norm_pix_loss and pixels != "target":
        patches = patchify(torch.from_numpy(images).double(), model.config.patch).numpy()
        values = values * np.sqrt(patches.var(axis=-1, ddof=1, keepdims=True) + 1e-6) + patches.mean(
            axis=-1, keepdims=True
        )
    if pixels == "image":
        spec = preprocess_of(model)
        grid = values.reshape(*values.shape[:2], -1, spec.channels)
        values = (grid * np.array(spec.std) + np.array(spec.mean)).reshape(values.shape)
    return values.astype(np.float32)


@pytest.mark.parametrize("images", ["float32", "uint8"])
@pytest.mark.parametrize("pixels", ["target", "normalised", "image"])
@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_pixels_in_every_space(tmp_path: Path, norm_pix_loss: bool, pixels: Pixels, images: Images) -> None:
    model = tiny_mae(norm_pix_loss=norm_pix_loss)
    raw, ids = random_pixels(ENCODER, 3), permutations(N, 3, 4)
    host = normalised(model, raw)
    found = graph_of(model, tmp_path, "reconstruct", pixels=pixels, images=images)(
        images=raw if images == "uint8" else host, ids_keep=ids
    )
    expected = in_space(model, pytorch_outputs(model, host, {"ids_keep": ids})["pixels"], host, pixels)
    assert_close(found, {"pixels": expected})


def test_a_flat_patch_has_no_deviation(tmp_path: Path) -> None:
    """Its variance is 0: what stays is the root of 1e-6, as in the original."""
    model, ids = tiny_mae(replace(ENCODER, in_chans=1)), permutations(N, 2, 4)
    images = np.full((2, 1, 6, 10), 0.5, np.float32)
    found = graph_of(model, tmp_path, "reconstruct", pixels="normalised")(images=images, ids_keep=ids)["pixels"]
    np.testing.assert_allclose(
        found, 0.5 + 1e-3 * pytorch_outputs(model, images, {"ids_keep": ids})["pixels"], rtol=0, atol=1e-6
    )  # eight FP32 steps of numbers up to 1


def test_the_order_of_ids_keep_does_not_matter(tmp_path: Path) -> None:
    model, images, ids = tiny_mae(), random_tensor(3, 3, 6, 10).numpy(), permutations(N, 3, 7)
    graph = graph_of(model, tmp_path, "reconstruct")
    found = graph(images=images, ids_keep=ids)
    assert_close(graph(images=images, ids_keep=ids[:, ::-1].copy()), found)
    assert (
        np.abs(found["pixels"] - graph(images=images, ids_keep=permutations(N, 3, 7, seed=5))["pixels"]).max() > 0.1
    ), "other patches, same pixels"


@pytest.mark.parametrize("keep", [1, N])
def test_one_patch_and_all_of_them(tmp_path: Path, keep: int) -> None:
    model, images, ids = tiny_mae(), random_tensor(2, 3, 6, 10).numpy(), permutations(N, 2, keep)
    assert_close(
        graph_of(model, tmp_path, "reconstruct", keep=keep)(images=images, ids_keep=ids),
        {"pixels": pytorch_outputs(model, images, {"ids_keep": ids})["pixels"]},
    )


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_the_picture_is_that_of_the_reconstruct_command(tmp_path: Path, norm_pix_loss: bool) -> None:
    """For the same mask, the same image, to the last of 256 levels."""
    model, raw = tiny_mae(norm_pix_loss=norm_pix_loss), random_pixels(ENCODER, 2)
    # Crops of the very size: what the command reads from files is these pixels.
    spec = Preprocess(image_size=ENCODER.image_size, crop_pct=1.0)
    draw_reconstructions(
        model,
        [Image.fromarray(one) for one in raw],
        spec,
        tmp_path / "grid.png",
        mask_ratio=0.7,
        seed=3,
        paste_visible=False,
    )
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    factor = 16  # 6 pixels become 96
    drawn = [grid[row * (96 + 4) :, 2 * (160 + 4) :][:96:factor, :160:factor] for row in range(2)]
    ids = random_masking(torch.rand(2, N, generator=torch.Generator().manual_seed(3)), 0.7).ids_keep
    pixels = graph_of(model, tmp_path, "reconstruct", pixels="image", images="uint8")(images=raw, ids_keep=ids.numpy())[
        "pixels"
    ]
    images = unpatchify(torch.from_numpy(pixels), ENCODER.patch, ENCODER.grid_size).permute(0, 2, 3, 1).numpy()
    levels = (images.clip(0, 1) * 255 + 0.5).astype(np.uint8)
    assert np.abs(levels.astype(int) - np.stack(drawn)).max() <= 1
    assert 0.1 < ((levels > 0) & (levels < 255)).mean(), "all is clipped, so nothing is compared"


def test_encoder_outputs_beside_the_pixels(tmp_path: Path) -> None:
    model, images, ids = tiny_mae(), random_tensor(2, 3, 6, 10).numpy(), permutations(N, 2, 5)
    names = ("tokens", "pixels", "block_0")
    expected = pytorch_outputs(model, images, {"ids_keep": ids})
    assert_close(
        graph_of(model, tmp_path, "reconstruct", outputs=names)(images=images, ids_keep=ids),
        {name: expected[name] for name in names},
    )


@pytest.mark.parametrize(("width", "heads", "depth"), [(12, 3, 1), (20, 5, 3), (64, 1, 2)])
def test_decoders_of_other_sizes(tmp_path: Path, width: int, heads: int, depth: int) -> None:
    model = fill(
        MaskedAutoencoder(ENCODER, DecoderConfig(decoder_depth=depth, decoder_embed_dim=width, decoder_num_heads=heads))
    )
    images, ids = random_tensor(2, 3, 6, 10).numpy(), permutations(N, 2, 4)
    saved = graph_of(model, tmp_path, "reconstruct")
    assert_close(
        saved(images=images, ids_keep=ids), {"pixels": pytorch_outputs(model, images, {"ids_keep": ids})["pixels"]}
    )
    assert sum(node.op_type == "Softmax" for node in saved.model.graph.node) == ENCODER.blocks + depth
