"""Operation counts: by hand, against what PyTorch counts while the same networks run, and of the ViT-B that everybody
knows.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mae_deploy.config import to_dict
from mae_deploy.models.config import EncoderConfig
from mae_deploy.models.pyramid import SimpleFeaturePyramid
from mae_deploy.runtime.flops import flops_per_image
from tests.models.tiny_models import CLASSES, DECODER, ENCODER, random_images, tiny_classifier, tiny_encoder, tiny_mae

B, K = 3, 7
IDS = torch.stack(
    [torch.randperm(ENCODER.num_patches, generator=torch.Generator().manual_seed(row))[:K] for row in range(B)]
)


def manifest(config: EncoderConfig = ENCODER, outputs: dict[str, list[Any]] | None = None, **more: Any) -> Any:
    """What the count reads of a manifest."""
    entries = [
        {"name": name, "dtype": "float32", "shape": shape}
        for name, shape in (outputs or {"cls": ["B", config.width]}).items()
    ]
    return {
        "model": to_dict(config),
        "num_patches": config.num_patches,
        "token_mode": "visible",
        "graph": {"outputs": entries},
        **more,
    }


def counted(function: Any, *inputs: Any) -> int:
    """What PyTorch counts for B images, divided by B."""
    with (
        FlopCounterMode(display=False) as counter,
        torch.no_grad(),
        nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH),
    ):
        function(*inputs)
    total: int = counter.get_total_flops()
    assert total % B == 0
    return total // B


def test_by_hand() -> None:
    config = EncoderConfig(name="h", image_size=(4, 6), patch_size=2, embed_dim=4, depth=2, num_heads=1, mlp_ratio=2.0)
    # 3 patches of 12 numbers to 4; for 4 tokens of 4: qkv 4x12, proj 4x4, MLP 4x8 and 8x4; q kᵀ and its product with v
    # 4x4x4 each.
    blocks = 2 * (4 * (48 + 16 + 32 + 32) + 64 + 64)
    assert flops_per_image(manifest(config), 3) == 2 * (3 * 12 * 4 + blocks)
    assert flops_per_image(manifest(config, {"logits": ["B", 5]}), 3) == 2 * (3 * 12 * 4 + blocks + 4 * 5)


@pytest.mark.parametrize("keep", [None, IDS], ids=["full", "visible"])
def test_encoder_as_pytorch_counts_it(keep: torch.Tensor | None) -> None:
    num_keep = ENCODER.num_patches if keep is None else K
    assert flops_per_image(manifest(), num_keep) == counted(tiny_encoder(), random_images(), keep)


def test_classifier_as_pytorch_counts_it() -> None:
    found = flops_per_image(
        manifest(outputs={"logits": ["B", CLASSES], "pooled": ["B", ENCODER.width]}), ENCODER.num_patches
    )
    assert found == counted(tiny_classifier("avg"), random_images())


def test_autoencoder_as_pytorch_counts_it() -> None:
    model = tiny_mae()
    N, P = ENCODER.num_patches, ENCODER.patch_dim
    latent = torch.zeros(B, 1 + K, ENCODER.width)
    restore = torch.stack([torch.randperm(N) for _ in range(B)])
    # PyTorch's decoder predicts CLS too, and cuts it off.
    expected = (
        counted(tiny_encoder(), random_images(), IDS)
        + counted(model.forward_decoder, latent, restore)
        - 2 * DECODER.decoder_embed_dim * P
    )
    assert flops_per_image(manifest(outputs={"pixels": ["B", N, P]}, decoder=to_dict(DECODER)), K) == expected
    assert flops_per_image(manifest(outputs={"pixels": ["B", N, P]}), K) is None, "the decoder's numbers are not there"


def test_pyramid_as_pytorch_counts_it() -> None:
    pyramid = SimpleFeaturePyramid(ENCODER.width, out_channels=6)
    maps = pyramid(torch.zeros(B, ENCODER.width, *ENCODER.grid_size))
    outputs: dict[str, list[Any]] = {name: ["B", *maps[name].shape[1:]] for name in maps}
    encoder = flops_per_image(manifest(), ENCODER.num_patches)
    assert encoder is not None
    assert flops_per_image(manifest(outputs=outputs), ENCODER.num_patches) == encoder + counted(
        pyramid, torch.zeros(B, ENCODER.width, *ENCODER.grid_size)
    )


def test_blocks_after_the_last_output_are_not_run() -> None:
    one = EncoderConfig(**{**to_dict(ENCODER), "image_size": ENCODER.image_size, "depth": 1})
    tokens = ["B", "K", ENCODER.width]
    assert flops_per_image(manifest(outputs={"block_0": tokens}), K) == flops_per_image(manifest(one), K)
    assert flops_per_image(manifest(outputs={"block_0": tokens, "block_1": tokens}), K) == flops_per_image(
        manifest(), K
    )
    assert flops_per_image(manifest(outputs={"block_0": tokens, "cls": ["B", ENCODER.width]}), K) == flops_per_image(
        manifest(), K
    )


def test_vit_base() -> None:
    full, quarter = (flops_per_image(manifest(EncoderConfig(name="vit_base_patch16")), count) for count in (196, 49))
    assert full is not None
    assert quarter is not None
    assert full == pytest.approx(35.1e9, rel=0.01)
    assert quarter / full == pytest.approx(0.246, abs=5e-4)
