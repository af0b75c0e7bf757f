"""What timm computes with the same weights: DINOv3, EUPE, Perception Encoder, EVA-02, RoPE-ViT, DINOv2 with registers,
SigLIP and CLIP, at their own and at other sizes, whole and of visible patches.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.eva import Eva
from torch import Tensor, nn

from mae_deploy.errors import CheckFailed, ConfigError
from mae_deploy.models.vit import Classifier, Encoder, gather_tokens
from mae_deploy.weights.load import LoadedWeights, at_image_size, model_of
from mae_deploy.weights.read.convert import Imported, ImportOptions, import_weights
from tests.models.tiny_models import random_tensor

SMALL: dict[str, Any] = {"embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": (64, 96)}
OTHER = (96, 80)

MODELS: dict[str, dict[str, Any]] = {
    "vit_small_patch16_dinov3": {},
    "vit_tiny_patch16_dinov3_qkvb": {"num_classes": 5},
    "vit_small_plus_patch16_dinov3": {},
    "vit_huge_plus_patch16_dinov3_qkvb": {"num_classes": 5, "global_pool": "token"},
    "vit_pe_core_tiny_patch16_384": {"attn_pool_num_heads": 4},
    "vit_pe_core_base_patch16_224": {"attn_pool_num_heads": 4, "num_classes": 5},
    "vit_pe_spatial_small_patch16_512": {},
    "vit_pe_lang_large_patch14_448": {"img_size": (56, 84)},
    "vit_small_patch16_rope_224": {},
    "vit_small_patch16_rope_mixed_ape_224": {"num_classes": 5},
    "vit_medium_patch16_rope_reg1_gap_256": {"num_classes": 5},
    "eva02_tiny_patch14_224": {"img_size": (56, 84), "num_classes": 5},
    "eva02_base_patch14_224": {"img_size": (56, 84), "num_classes": 5},
    "eva02_small_patch14_336": {"img_size": (56, 84)},
    "eva02_base_patch16_clip_224": {"num_classes": 5},
    "beit3_base_patch16_224": {"num_classes": 5},
    "vit_small_patch14_reg4_dinov2": {"img_size": (56, 84)},
    "vit_base_patch16_siglip_224": {},
    "vit_base_patch16_clip_quickgelu_224": {"num_classes": 5},
    "vit_little_patch16_reg4_gap_256": {"num_classes": 5},
    "vit_wee_patch16_reg1_gap_256": {},
    "vit_so150m_patch16_reg4_map_256": {},
    "vit_giant_patch14_dinov2": {"img_size": (56, 84)},
}


def settled(model: nn.Module, seed: int = 0) -> Any:
    """Random numbers whose products neither vanish nor explode; frequencies stay as they were drawn."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim > 1 and "token" not in name and name != "rope.freqs":
                tensor.copy_(noise / tensor[0].numel() ** 0.5)
            elif name != "rope.freqs":
                tensor.copy_((1 if name.endswith("weight") or "gamma" in name else 0) + 0.3 * noise)
    return model.eval()


def timm_model(name: str, **settings: Any) -> Any:
    return settled(timm.create_model(name, pretrained=False, **{"num_classes": 0, **SMALL, **settings}))


def imported(model: nn.Module, folder: Path, name: str, **settings: Any) -> Imported:
    """Through a folder as timm's hub has them."""
    save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, folder / "model.safetensors")
    config = {"architecture": name, "model_args": {**SMALL, **settings}, "pretrained_cfg": {"architecture": name}}
    (folder / "config.json").write_text(json.dumps(config))
    return import_weights(folder / "model.safetensors", ImportOptions())


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    """Within 1e-5 of the largest number: float32 sums in another order, LayerScale folded, tables from float64."""
    assert ours.shape == theirs.shape
    assert ((ours - theirs).abs().max() / theirs.abs().max()).item() < 1e-5


class _Keep(nn.Module):
    """timm's patch dropout with the patches that are asked for."""

    def __init__(self, ids: Tensor, prefix: int, *, with_indices: bool) -> None:
        super().__init__()
        self.ids, self.prefix, self.with_indices = ids, prefix, with_indices

    def forward(self, tokens: Tensor) -> Any:
        kept = torch.cat([tokens[:, : self.prefix], gather_tokens(tokens[:, self.prefix :], self.ids)], dim=1)
        return (kept, self.ids) if self.with_indices else kept


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_every_output_is_timms(tmp_path: Path, name: str) -> None:
    settings = MODELS[name]
    theirs = timm_model(name, **settings)
    found = imported(theirs, tmp_path, name, **settings)
    assert found.report["model"] == name
    loaded = LoadedWeights(found.metadata, found.tensors, {})
    for size in (None, OTHER if theirs.patch_embed.patch_size[0] == 16 else (84, 70)):
        if size is not None:
            theirs.set_input_size(img_size=size)
        loaded = at_image_size(loaded, size)
        ours = model_of(loaded)
        images = random_tensor(2, 3, *ours.config.image_size)
        latent = theirs.forward_features(images)
        assert_close(Encoder.forward(ours, images), latent)
        if theirs.global_pool in ("avg", "map"):
            assert_close(ours.pool_latent(latent), theirs.forward_head(latent, pre_logits=True))
        if isinstance(ours, Classifier):
            assert_close(ours(images), theirs(images))
        ids = torch.stack([torch.randperm(ours.config.num_patches)[:7] for _ in images])
        network: Any = theirs
        network.patch_drop = _Keep(ids, theirs.num_prefix_tokens, with_indices=isinstance(theirs, Eva))
        assert_close(Encoder.forward(ours, images, ids), theirs.forward_features(images))
        network.patch_drop = None if isinstance(theirs, Eva) else nn.Identity()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "convnext_tiny": (
        {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)},
        r"convolutions in place of attention \(ConvNeXt\)",
    ),
    "eva02_large_patch14_clip_224": ({"use_post_norm": True}, "EvaBlockPostNorm"),
    "beit_base_patch16_224": ({}, "relative positions"),
    "vit_base_patch16_224": ({"attn_layer": "diff"}, "attention of kind"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_computed_is_refused_by_name(tmp_path: Path, name: str) -> None:
    given, words = REFUSED[name]
    sizes: dict[str, Any] = {} if name.startswith("convnext") else {"depth": 1, "embed_dim": 48, "num_heads": 3}
    theirs = timm.create_model(name, pretrained=False, num_classes=0, **sizes, **given)
    save_file({key: tensor.contiguous() for key, tensor in theirs.state_dict().items()}, tmp_path / "model.safetensors")
    config = {"architecture": name, "model_args": {**sizes, **given}, "pretrained_cfg": {"architecture": name}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=words):
        import_weights(tmp_path / "model.safetensors", ImportOptions())


def test_biases_that_the_named_model_has_not_are_an_error(tmp_path: Path) -> None:
    """DINOv3's own files have biases of queries, keys and values: of zeros where timm's model has none."""
    name = "vit_small_patch16_dinov3"
    theirs = timm_model(name)
    tensors = {
        key.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma").replace("reg_", "storage_"): value
        for key, value in theirs.state_dict().items()
    }
    tensors["storage_tokens"] = tensors.pop("storage_token")
    biases = {f"blocks.{block}.attn.qkv.bias": torch.zeros(3 * 48) for block in range(2)}
    imported(theirs, tmp_path, name)
    save_file({**tensors, **biases, "mask_token": torch.zeros(1, 48)}, tmp_path / "model.safetensors")
    found = import_weights(tmp_path / "model.safetensors", ImportOptions())
    assert found.report["dropped"] == ["mask_token"]
    biases["blocks.1.attn.qkv.bias"][5] = 1.0
    save_file({**tensors, **biases}, tmp_path / "model.safetensors")
    with pytest.raises(CheckFailed, match=r"blocks\.1\.attn\.qkv\.bias among them") as refused:
        import_weights(tmp_path / "model.safetensors", ImportOptions())
    assert refused.value.hint == "pass --model vit_small_patch16_dinov3_qkvb"
