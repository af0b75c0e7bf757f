"""Weights made elsewhere arrive tensor by tensor under the original's names, or are refused with a reason; nothing that
a file carries is run.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mae_deploy.checkpoint import NON_COMMERCIAL, UNKNOWN_LICENCE, Positions
from mae_deploy.config import from_dict
from mae_deploy.errors import CheckFailed, ConfigError
from mae_deploy.models.config import PRESETS, DecoderConfig, EncoderConfig
from mae_deploy.models.mae import MaskedAutoencoder
from mae_deploy.models.position import interpolate_position_embedding, sincos_position_embedding
from mae_deploy.models.vit import Classifier, Encoder, Pool
from mae_deploy.results import Result
from mae_deploy.weights.load import LoadedWeights, model_of
from mae_deploy.weights.read.convert import Imported, ImportOptions, import_weights
from mae_deploy.weights.read.shapes import expected_shapes
from tests.models.tiny_models import (
    CLASSES,
    DECODER,
    HEADS,
    SQUARE,
    tiny_classifier,
    tiny_encoder,
    tiny_mae,
    write_original,
)

OPTIONS = ImportOptions(num_heads=5, decoder_num_heads=3)


def assert_same(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(tensors) == set(expected)
    assert [
        name
        for name, tensor in tensors.items()
        if tensor.dtype != expected[name].dtype or not torch.equal(tensor, expected[name])
    ] == []


def encoder_of(imported: Imported) -> EncoderConfig:
    return from_dict(EncoderConfig, imported.metadata.encoder)


# --- the original's files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_pretraining_checkpoint(tmp_path: Path, legacy: bool) -> None:
    tensors = tiny_mae(SQUARE).state_dict()
    file = write_original(
        tmp_path / "checkpoint-3.pth", tensors, legacy=legacy, norm_pix_loss=False, input_size=10, mask_ratio=0.75
    )
    imported = import_weights(file, OPTIONS)
    assert_same(imported.tensors, tensors)
    metadata = imported.metadata
    assert (metadata.kind, metadata.norm_pix_loss, metadata.pool, metadata.num_classes) == ("mae", False, None, None)
    assert encoder_of(imported) == replace(SQUARE, name="vit_20x2_patch2")
    assert from_dict(DecoderConfig, metadata.decoder or {}) == DECODER
    assert metadata.preprocess["image_size"] == [10, 10]
    assert metadata.provenance["source"] == "checkpoint-3.pth"
    assert len(metadata.provenance["source_sha256"]) == 64
    assert imported.report == {
        "source": str(file),
        "layout": "original or timm",
        "architecture": None,
        "kind": "mae",
        "classes": None,
        "model": "vit_20x2_patch2",
        "image_size": [10, 10],
        "tensors": len(tensors),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "renamed": 0,
        "folded": [],
        "dropped": [],
        "reshaped": [],
        "missing": [],
        "unexpected": [],
        "preprocess": metadata.preprocess,
        "preprocess_from": "guessed, as the original MAE evaluates: nothing in the file tells it",
        "notes": [],
        "licence": UNKNOWN_LICENCE,
    }


def test_a_released_encoder(tmp_path: Path) -> None:
    tensors = tiny_encoder(SQUARE).state_dict()
    torch.save({"model": tensors}, tmp_path / "mae.pth")
    imported = import_weights(tmp_path / "mae.pth", OPTIONS)
    assert_same(imported.tensors, tensors)
    assert (imported.metadata.kind, imported.metadata.decoder) == ("encoder", None)


@pytest.mark.parametrize("pool", ["avg", "cls"])
def test_a_fine_tuned_classifier(tmp_path: Path, pool: Pool) -> None:
    tensors = tiny_classifier(pool, SQUARE).state_dict()
    imported = import_weights(write_original(tmp_path / "finetuned.pth", tensors), OPTIONS)
    assert_same(imported.tensors, tensors)
    assert (imported.metadata.kind, imported.metadata.pool, imported.metadata.num_classes) == (
        "classifier",
        pool,
        CLASSES,
    )


@pytest.mark.parametrize("channels", [1, 4])
def test_other_numbers_of_channels(tmp_path: Path, channels: int) -> None:
    tensors = tiny_mae(replace(SQUARE, in_chans=channels)).state_dict()
    imported = import_weights(write_original(tmp_path / "checkpoint.pth", tensors), OPTIONS)
    assert_same(imported.tensors, tensors)
    assert encoder_of(imported).in_chans == channels
    assert len(imported.metadata.preprocess["mean"]) == channels


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_dropped(tmp_path: Path, prefix: str) -> None:
    tensors = tiny_mae(SQUARE).state_dict()
    imported = import_weights(
        write_original(tmp_path / "checkpoint.pth", {prefix + name: tensor for name, tensor in tensors.items()}),
        OPTIONS,
    )
    assert_same(imported.tensors, tensors)


@pytest.mark.parametrize("key", ["model", "state_dict", None])
def test_a_bare_or_wrapped_state_dict(tmp_path: Path, key: str | None) -> None:
    tensors = tiny_encoder(SQUARE).state_dict()
    torch.save({key: tensors} if key else tensors, tmp_path / "weights.pth")
    assert_same(import_weights(tmp_path / "weights.pth", OPTIONS).tensors, tensors)


def test_half_precision_becomes_float32(tmp_path: Path) -> None:
    tensors = {name: tensor.half() for name, tensor in tiny_encoder(SQUARE).state_dict().items()}
    save_file(tensors, tmp_path / "half.safetensors")
    assert_same(
        import_weights(tmp_path / "half.safetensors", OPTIONS).tensors,
        {name: tensor.float() for name, tensor in tensors.items()},
    )


def test_heads_and_name_come_from_the_preset_of_that_width(tmp_path: Path) -> None:
    config = EncoderConfig(name="shallow", image_size=(32, 32), patch_size=16, embed_dim=192, depth=1, num_heads=3)
    save_file(Encoder(config).state_dict(), tmp_path / "shallow.safetensors")
    assert encoder_of(import_weights(tmp_path / "shallow.safetensors", ImportOptions())) == replace(
        config, name="vit_192x1_patch16"
    )
    nano = EncoderConfig(name="vit_nano_patch4", image_size=(12, 12))
    save_file(Encoder(nano).state_dict(), tmp_path / "nano.safetensors")
    assert encoder_of(import_weights(tmp_path / "nano.safetensors", ImportOptions())) == nano


def test_an_mlp_whose_ratio_is_no_exact_number(tmp_path: Path) -> None:
    # 44 * (49 / 44) is 48.999… in floating point: the MLP would be built one narrower.
    tensors = tiny_encoder(
        replace(SQUARE, embed_dim=44, num_heads=11, mlp_ratio=math.nextafter(49 / 44, 2))
    ).state_dict()
    assert (tensors["blocks.0.mlp.fc1.weight"].shape[0], int(44 * (49 / 44))) == (49, 48)
    save_file(tensors, tmp_path / "odd.safetensors")
    imported = import_weights(tmp_path / "odd.safetensors", ImportOptions(num_heads=11))
    assert_same(model_of(LoadedWeights(imported.metadata, imported.tensors, {})).state_dict(), tensors)


def test_vit_huge_has_heads_of_80(tmp_path: Path) -> None:
    # Every other preset's heads are 64 wide, which is what is assumed of an unknown width.
    config = EncoderConfig(
        name="vit_1280x1_patch14", image_size=(14, 14), patch_size=14, embed_dim=1280, depth=1, num_heads=16
    )
    save_file(
        {name: torch.zeros(shape, dtype=torch.float16) for name, shape in expected_shapes(config, None).items()},
        tmp_path / "huge.safetensors",
    )
    assert encoder_of(import_weights(tmp_path / "huge.safetensors", ImportOptions())) == config


def test_a_release_that_was_fine_tuned_at_448_pixels(tmp_path: Path) -> None:
    # ViT-H's width and patch, one block, three classes: 32x32 patches instead of 16x16.
    config = EncoderConfig(
        name="vit_1280x1_patch14", image_size=(448, 448), patch_size=14, embed_dim=1280, depth=1, num_heads=16
    )
    shapes = expected_shapes(config, None, pool="avg", num_classes=3)
    torch.save(
        {"model": {name: torch.zeros(shape, dtype=torch.float16) for name, shape in shapes.items()}},
        tmp_path / "mae_finetuned_vit_huge_448.pth",
    )
    imported = import_weights(tmp_path / "mae_finetuned_vit_huge_448.pth", ImportOptions())
    assert encoder_of(imported) == config
    assert (imported.metadata.pool, imported.metadata.licence, imported.metadata.preprocess["crop_pct"]) == (
        "avg",
        NON_COMMERCIAL,
        1.0,
    )


def test_norm_pix_loss_given_wins_over_the_files(tmp_path: Path) -> None:
    file = write_original(tmp_path / "checkpoint.pth", tiny_mae(SQUARE).state_dict(), norm_pix_loss=False)
    assert not import_weights(file, OPTIONS).metadata.norm_pix_loss
    assert import_weights(file, replace(OPTIONS, norm_pix_loss=True)).metadata.norm_pix_loss


# --- position tables -------------------------------------------------------------------------------------------------


def test_absent_position_tables_are_rebuilt_and_reported(tmp_path: Path) -> None:
    tensors = tiny_mae(SQUARE).state_dict()
    rest = {name: tensor for name, tensor in tensors.items() if name not in ("pos_embed", "decoder_pos_embed")}
    imported = import_weights(write_original(tmp_path / "checkpoint.pth", rest, input_size=10), OPTIONS)
    tables = {
        "pos_embed": sincos_position_embedding(20, (5, 5)),
        "decoder_pos_embed": sincos_position_embedding(12, (5, 5)),
    }
    assert_same(imported.tensors, {**tensors, **tables})
    assert imported.report["reshaped"] == [f"{name}: absent, rebuilt as the fixed sine-cosine table" for name in tables]


def test_absent_position_tables_of_an_unknown_size(tmp_path: Path) -> None:
    rest = {name: tensor for name, tensor in tiny_encoder().state_dict().items() if name != "pos_embed"}
    file = write_original(tmp_path / "checkpoint.pth", rest)
    with pytest.raises(ConfigError, match="no pos_embed") as caught:
        import_weights(file, OPTIONS)
    assert "--image-size" in (caught.value.hint or "")
    imported = import_weights(file, replace(OPTIONS, image_size=(6, 10)))
    assert torch.equal(imported.tensors["pos_embed"], sincos_position_embedding(20, (3, 5)))


def test_patches_that_form_no_square_need_the_size(tmp_path: Path) -> None:
    tensors = tiny_mae().state_dict()
    file = write_original(tmp_path / "checkpoint.pth", tensors)
    with pytest.raises(ConfigError, match="15 patches, which form no square") as caught:
        import_weights(file, OPTIONS)
    assert "--image-size" in (caught.value.hint or "")
    imported = import_weights(file, replace(OPTIONS, image_size=(6, 10)))
    assert_same(imported.tensors, tensors)
    assert encoder_of(imported).grid_size == (3, 5)
    with pytest.raises(ConfigError, match="pos_embed holds 15 patches"):
        import_weights(file, replace(OPTIONS, image_size=(10, 14)))


def test_another_image_size_interpolates_both_tables(tmp_path: Path) -> None:
    tensors = tiny_mae(SQUARE).state_dict()
    imported = import_weights(
        write_original(tmp_path / "checkpoint.pth", tensors), replace(OPTIONS, image_size=(6, 14))
    )
    tables = {
        name: interpolate_position_embedding(tensors[name], (5, 5), (3, 7))
        for name in ("pos_embed", "decoder_pos_embed")
    }
    assert_same(imported.tensors, {**tensors, **tables})
    assert imported.report["reshaped"] == [f"{name}: interpolated from 5x5 to 3x7 patches (bicubic)" for name in tables]
    assert imported.metadata.preprocess["image_size"] == [6, 14]


def test_a_decoders_table_tells_the_size_where_the_encoders_is_absent(tmp_path: Path) -> None:
    tensors = tiny_mae(SQUARE).state_dict()
    file = write_original(
        tmp_path / "checkpoint.pth", {name: tensor for name, tensor in tensors.items() if name != "pos_embed"}
    )
    assert_same(import_weights(file, OPTIONS).tensors, {**tensors, "pos_embed": sincos_position_embedding(20, (5, 5))})


def test_patches_that_form_both_a_square_and_the_asked_size_are_taken_as_asked(tmp_path: Path) -> None:
    tensors = tiny_encoder(replace(SQUARE, image_size=(8, 8))).state_dict()
    file = write_original(tmp_path / "checkpoint.pth", tensors)
    assert_same(import_weights(file, replace(OPTIONS, image_size=(4, 16))).tensors, tensors)


def test_a_size_that_is_no_multiple_of_the_patch(tmp_path: Path) -> None:
    file = write_original(tmp_path / "checkpoint.pth", tiny_encoder(SQUARE).state_dict())
    with pytest.raises(ConfigError, match="--image-size 7,10 is not a multiple of the patch size, 2"):
        import_weights(file, replace(OPTIONS, image_size=(7, 10)))


# --- strict ----------------------------------------------------------------------------------------------------------


def drop(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(name)


def put(name: str, *shape: int) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: torch.zeros(shape)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("norm.weight"), r"1 missing: norm\.weight$"),
        (drop("blocks.1.attn.qkv.bias"), r"1 missing: blocks\.1\.attn\.qkv\.bias$"),
        (drop("decoder_pred.bias"), r"1 missing: decoder_pred\.bias$"),
        (put("gamma_1", 3), r"1 unexpected: gamma_1$"),
        (put("decoder_blocks.1.norm1.weight", 12), r"11 missing: .* …$"),
        (put("norm.bias", 21), r"1 misshapen: norm\.bias \(21,\) instead of \(20,\)$"),
        (put("blocks.0.mlp.fc2.weight", 80, 20), r"blocks\.0\.mlp\.fc2\.weight \(80, 20\) instead of \(20, 80\)"),
        (put("pos_embed", 1, 26, 19), r"pos_embed \(1, 26, 19\) instead of \(1, 26, 20\)"),
        (put("pos_embed", 26, 20), "no tensor 'pos_embed' with 3 dimensions"),
        (put("decoder_pos_embed", 26), "no tensor 'decoder_pos_embed' with 3 dimensions"),
        (put("head.weight"), r"1 unexpected: head\.weight$"),
        (drop("patch_embed.proj.weight"), r"not a ViT: no tensor 'patch_embed\.proj\.weight' with 4 dimensions"),
        (drop("patch_embed.proj.bias"), r"1 missing: patch_embed\.proj\.bias$"),
        (put("patch_embed.proj.weight", 20, 12), r"not a ViT: no tensor 'patch_embed\.proj\.weight' with 4 dimensions"),
        (drop("blocks.0.mlp.fc1.weight"), r"not a ViT: no tensor 'blocks\.0\.mlp\.fc1\.weight'"),
        (drop("decoder_embed.weight"), r"not a ViT: no tensor 'decoder_embed\.weight'"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    tensors = dict(tiny_mae(SQUARE).state_dict())
    change(tensors)
    with pytest.raises(CheckFailed, match=message):
        import_weights(write_original(tmp_path / "checkpoint.pth", tensors), OPTIONS)


def test_every_tensor_that_does_not_fit_is_in_the_result(tmp_path: Path) -> None:
    tensors = dict(tiny_mae(SQUARE).state_dict())
    lost = [name for name in tensors if name.startswith("blocks.1.") and not name.endswith("mlp.fc1.weight")]
    more = {f"extra.{index}": torch.zeros(index) for index in range(6)}
    tensors = (
        {name: tensor for name, tensor in tensors.items() if name not in lost}
        | more
        | {"norm.bias": torch.zeros(21), "norm.weight": torch.zeros(())}
    )
    with pytest.raises(CheckFailed, match=r"11 missing: .* …; 6 unexpected: .* …; 2 misshapen") as caught:
        import_weights(write_original(tmp_path / "checkpoint.pth", tensors), OPTIONS)
    assert isinstance(caught.value.result, Result)
    data = caught.value.result.data
    assert data["source"] == str(tmp_path / "checkpoint.pth")
    assert [entry["name"] for entry in data["missing"]] == lost
    assert data["missing"][0] == {"name": "blocks.1.norm1.weight", "expected": [20]}
    assert data["unexpected"] == [{"name": name, "found": list(tensor.shape)} for name, tensor in more.items()]
    assert data["reshaped"] == [
        {"name": "norm.weight", "found": [], "expected": [20]},
        {"name": "norm.bias", "found": [21], "expected": [20]},
    ]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("decoder.0.weight", "the parts of SimMIM"),
        ("rel_pos_bias.relative_position_bias_table", "relative positions in its attention"),
        ("blocks.0.attn.relative_position_index", "relative positions in its attention"),
        ("blocks.0.attn.v_bias", "an attention without a bias of the keys"),
        ("lm_head.weight", "a head over visual words"),
        ("dist_token", "a distillation token"),
        ("layers.0.blocks.1.norm1.weight", "stages of different resolution"),
        ("encoder.layers.0.blocks.1.norm1.weight", "stages of different resolution"),
        ("backbone.pre_norm.weight", "a norm before the blocks"),
        ("reg_token", "register tokens"),
        ("register_tokens", "register tokens"),
        ("visual.transformer.resblocks.0.ln_1.weight", "the blocks of CLIP's ViT"),
        ("deit.embeddings.distillation_token", "a distillation token"),
        ("encoder.layer.0.layer_scale1.lambda1", "LayerScale under transformers' names"),
        ("blocks.0.attn.qkv.lora_A.weight", "adapters that were not merged"),
    ],
)
def test_other_families_are_refused_by_what_they_have(tmp_path: Path, name: str, said: str) -> None:
    file = write_original(tmp_path / "checkpoint.pth", {**tiny_mae(SQUARE).state_dict(), name: torch.zeros(3)})
    with pytest.raises(ConfigError, match=rf"checkpoint\.pth has {said}") as caught:
        import_weights(file, OPTIONS)
    assert "docs/import.md" in (caught.value.hint or "")


def test_a_model_without_a_class_token(tmp_path: Path) -> None:
    tensors = tiny_encoder(SQUARE).state_dict()
    without = {name: tensor for name, tensor in tensors.items() if name != "cls_token"}
    without["pos_embed"] = tensors["pos_embed"][:, 1:]
    torch.save(without, tmp_path / "vit.pth")
    with pytest.raises(ConfigError, match=r"vit\.pth has no class token"):
        import_weights(tmp_path / "vit.pth", OPTIONS)


def test_positions_without_an_entry_for_the_class_token(tmp_path: Path) -> None:
    tensors = tiny_encoder(SQUARE).state_dict()
    torch.save({**tensors, "pos_embed": tensors["pos_embed"][:, 1:]}, tmp_path / "deit3.pth")
    with pytest.raises(ConfigError, match="24 patches, which form no square") as caught:
        import_weights(tmp_path / "deit3.pth", OPTIONS)
    assert "each patch has an entry and the class token none" in (caught.value.hint or "")


@pytest.mark.parametrize("positions", ["timm", "torchvision", None])
def test_whose_interpolation_can_be_said(tmp_path: Path, positions: Positions | None) -> None:
    tensors = tiny_encoder(SQUARE).state_dict()
    torch.save(tensors, tmp_path / "vit.pth")
    imported = import_weights(tmp_path / "vit.pth", replace(OPTIONS, positions=positions, image_size=(14, 14)))
    expected = interpolate_position_embedding(tensors["pos_embed"], (5, 5), (7, 7), positions or "bicubic")
    assert torch.equal(imported.tensors["pos_embed"], expected)
    assert imported.metadata.positions == (positions or "bicubic")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.complex64, torch.bool])
def test_weights_that_are_no_floating_point_numbers(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {**tiny_mae(SQUARE).state_dict(), "norm.weight": torch.ones(20, dtype=dtype)}
    with pytest.raises(CheckFailed, match=r"holds norm\.weight as torch\."):
        import_weights(write_original(tmp_path / "checkpoint.pth", tensors), OPTIONS)


def test_the_same_tensors_twice(tmp_path: Path) -> None:
    tensors = tiny_encoder(SQUARE).state_dict()
    with pytest.raises(CheckFailed, match="the same tensors twice"):
        import_weights(
            write_original(tmp_path / "checkpoint.pth", {**tensors, "module.norm.bias": tensors["norm.bias"]}), OPTIONS
        )


def test_a_head_without_width_is_refused(tmp_path: Path) -> None:
    tensors = {**tiny_classifier("cls", SQUARE).state_dict(), "head.weight": torch.zeros(())}
    with pytest.raises(CheckFailed, match=r"no tensor 'head\.weight' with 2 dimensions"):
        import_weights(write_original(tmp_path / "checkpoint.pth", tensors), OPTIONS)


@pytest.mark.parametrize(
    "content",
    [{}, {"model": {}}, {"model": {"a": 1}}, {"model": [torch.zeros(3)]}, {"epoch": 3}, torch.zeros(3), "text", None],
    ids=["empty", "empty model", "a number", "a list", "no model", "a tensor", "text", "none"],
)
def test_no_state_dict(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "checkpoint.pth")
    with pytest.raises(CheckFailed, match=r"checkpoint\.pth holds no state dict of tensors"):
        import_weights(tmp_path / "checkpoint.pth", ImportOptions())


@pytest.mark.parametrize("name", ["absent.pth", "folder"])
def test_no_file(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match="no weights at"):
        import_weights(tmp_path / name, ImportOptions())


@pytest.mark.parametrize("kind", ["encoder", "mae", "avg", "cls"])
@pytest.mark.parametrize("name", ["vit_nano_patch4", "vit_huge_patch14"])
def test_expected_shapes_are_the_models(kind: str, name: str) -> None:
    patch = PRESETS[name].patch_size
    config = EncoderConfig(name=name, image_size=(2 * patch, 3 * patch), in_chans=4)
    pools: dict[str, Pool] = {"avg": "avg", "cls": "cls"}
    with torch.device("meta"):
        if kind in pools:
            model: Encoder = Classifier(config, num_classes=CLASSES, pool=pools[kind])
        else:
            model = MaskedAutoencoder(config, DECODER) if kind == "mae" else Encoder(config)
    shapes = expected_shapes(
        config, DECODER if kind == "mae" else None, pool=pools.get(kind), num_classes=CLASSES if kind in pools else None
    )
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == shapes


# --- unsafe and damaged files ----------------------------------------------------------------------------------------


class RunsOnUnpickling:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"echo run > '{self.marker}'",)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_code_in_a_file_is_refused_and_not_run(tmp_path: Path, form: str) -> None:
    marker, file = tmp_path / "marker", tmp_path / "checkpoint.pth"
    content = {"model": tiny_encoder(SQUARE).state_dict(), "args": RunsOnUnpickling(marker)}
    if form == "pickle":
        file.write_bytes(pickle.dumps(content["args"], protocol=2))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(CheckFailed, match=rf"refused to unpickle .*: it wants to run {os.name}\.system") as caught:
        import_weights(file, OPTIONS)
    assert not marker.exists()
    assert "\n" not in str(caught.value)
    # The marker is one that running the file writes.
    pickle.loads(pickle.dumps(content["args"]))
    assert marker.exists()


def test_an_unknown_class_in_a_file_is_refused(tmp_path: Path) -> None:
    torch.save({"model": tiny_encoder(SQUARE).state_dict(), "args": re.compile("x")}, tmp_path / "checkpoint.pth")
    with pytest.raises(CheckFailed, match=r"it wants to run re\._compile") as caught:
        import_weights(tmp_path / "checkpoint.pth", OPTIONS)
    assert "safetensors" in (caught.value.hint or "")


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("share", [0.0, 0.03, 0.3, 0.9, 0.999])
def test_a_truncated_file(tmp_path: Path, legacy: bool, share: float) -> None:
    file = write_original(tmp_path / "checkpoint.pth", tiny_encoder(SQUARE).state_dict(), legacy=legacy)
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CheckFailed, match=r"checkpoint\.pth") as caught:
        import_weights(file, OPTIONS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("seed", range(20))
def test_damaged_bytes_are_refused_with_our_error(tmp_path: Path, seed: int) -> None:
    # Damage to a legacy file's pickle reaches torch's unpickler, which then raises IndexError, struct.error,
    # AssertionError and others.
    file = write_original(tmp_path / "checkpoint.pth", tiny_encoder(SQUARE).state_dict(), legacy=True)
    data = bytearray(file.read_bytes())
    places = torch.randint(2000, (7,), generator=torch.Generator().manual_seed(seed)).tolist()
    for place in places:
        data[place] ^= 0x55
    file.write_bytes(data)
    with pytest.raises(CheckFailed):
        import_weights(file, OPTIONS)


@pytest.mark.parametrize("content", [b"hello", b"\x00" * 100, b"<html><body>404</body></html>", b"{}"])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_file_that_is_something_else(tmp_path: Path, content: bytes, suffix: str) -> None:
    file = tmp_path / f"weights.{suffix}"
    file.write_bytes(content)
    with pytest.raises(CheckFailed, match=rf"weights\.{suffix}") as caught:
        import_weights(file, ImportOptions())
    assert "\n" not in str(caught.value)


def test_truncated_safetensors(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    save_file(tiny_encoder(SQUARE).state_dict(), file)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckFailed, match=r"weights\.safetensors is cut off: its header tells of"):
        import_weights(file, OPTIONS)


# --- licence ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "licence"),
    [
        ("mae_pretrain_vit_base.pth", NON_COMMERCIAL),
        ("mae_visualize_vit_large_ganloss.pth", NON_COMMERCIAL),
        ("mae_finetuned_vit_huge.pth", NON_COMMERCIAL),
        ("vit_base_patch16_224.mae.safetensors", NON_COMMERCIAL),
        ("vit_large_patch16_224_mae.pth", NON_COMMERCIAL),
        ("facebook/vit-mae-base/model.safetensors", NON_COMMERCIAL),
        ("vit_base_patch16_224.mae/model.safetensors", NON_COMMERCIAL),
        ("hub/models--facebook--vit-mae-huge/snapshots/0123abcd/model.safetensors", NON_COMMERCIAL),
        ("hub/models--timm--vit_large_patch16_224.mae/snapshots/0123abcd/model.safetensors", NON_COMMERCIAL),
        ("checkpoint-799.pth", UNKNOWN_LICENCE),
        ("vit_base_patch16_224.safetensors", UNKNOWN_LICENCE),
        # A folder of one's own that is called like a release says nothing about the file in it.
        ("mae_pretrain_vit_base/checkpoint-799.pth", UNKNOWN_LICENCE),
    ],
)
def test_licence_by_name(tmp_path: Path, name: str, licence: str) -> None:
    file = tmp_path / name
    tensors = tiny_encoder(SQUARE).state_dict()
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file) if file.suffix == ".safetensors" else write_original(file, tensors)
    for path in [file, *([file.parent] if file.name == "model.safetensors" else [])]:
        imported = import_weights(path, OPTIONS)
        assert imported.metadata.licence == imported.report["licence"] == licence


def test_licence_by_the_name_in_the_config(tmp_path: Path) -> None:
    save_file(tiny_encoder(SQUARE).state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"_name_or_path": "facebook/vit-mae-large"}))
    assert import_weights(tmp_path, OPTIONS).metadata.licence == NON_COMMERCIAL


def test_licence_given(tmp_path: Path) -> None:
    file = write_original(tmp_path / "mae_pretrain_vit_base.pth", tiny_encoder(SQUARE).state_dict())
    assert import_weights(file, replace(OPTIONS, licence="MIT")).metadata.licence == "MIT"


# --- Hugging Face (whole models: tests/parity) -----------------------------------------------------------------------


def write_hugging_face(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(
        json.dumps({"num_attention_heads": 5, "decoder_num_attention_heads": 3, **config})
    )
    return folder


def hugging_face_classifier() -> dict[str, Tensor]:
    """The tensors of `tiny_classifier("cls")` under the names of `ViTForImageClassification`."""
    names = {
        "cls_token": "vit.embeddings.cls_token",
        "pos_embed": "vit.embeddings.position_embeddings",
        "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
        "head": "classifier",
    }
    tensors: dict[str, Tensor] = {}
    for name, tensor in tiny_classifier("cls", SQUARE).state_dict().items():
        target = re.sub(r"^norm\.", "vit.layernorm.", re.sub(r"^blocks\.", "vit.encoder.layer.", name))
        if ".attn.qkv." in target:
            for part, piece in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                tensors[target.replace("attn.qkv", f"attention.attention.{part}")] = piece.clone()
            continue
        source = next((source for source in names if target.startswith(source) or f".{source}." in target), None)
        tensors[target.replace(source, names[source], 1) if source else target] = tensor
    return tensors


def test_a_hugging_face_classifier_with_its_class_names(tmp_path: Path) -> None:
    labels = {str(index): f"class {index * index}" for index in reversed(range(CLASSES))}
    imported = import_weights(
        write_hugging_face(tmp_path / "model", hugging_face_classifier(), id2label=labels), ImportOptions()
    )
    assert_same(imported.tensors, tiny_classifier("cls", SQUARE).state_dict())
    assert (imported.metadata.kind, imported.metadata.pool) == ("classifier", "cls")
    assert imported.metadata.class_names == tuple(f"class {index * index}" for index in range(CLASSES))
    assert imported.report["layout"] == "Hugging Face"
    assert imported.report["renamed"] == len(hugging_face_classifier())
    assert encoder_of(imported).num_heads == HEADS["num_heads"]


def test_an_attention_without_its_key(tmp_path: Path) -> None:
    tensors = hugging_face_classifier()
    del tensors["vit.encoder.layer.1.attention.attention.key.bias"]
    with pytest.raises(CheckFailed, match=r"blocks\.1\.attn\.q\.bias lacks its key or value"):
        import_weights(write_hugging_face(tmp_path / "model", tensors), ImportOptions())


def test_another_activation_is_refused(tmp_path: Path) -> None:
    # Nothing in the tensors would show it, and every output would be wrong.
    with pytest.raises(ConfigError, match="hidden_act relu"):
        import_weights(
            write_hugging_face(tmp_path / "model", hugging_face_classifier(), hidden_act="relu"), ImportOptions()
        )


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_settings_without_names(tmp_path: Path, name: str) -> None:
    folder = write_hugging_face(tmp_path / "model", hugging_face_classifier())
    (folder / name).write_text("[3]")
    with pytest.raises(ConfigError, match=rf"{name} holds no settings by name"):
        import_weights(folder, ImportOptions())


def test_a_config_that_is_not_json(tmp_path: Path) -> None:
    folder = write_hugging_face(tmp_path / "model", hugging_face_classifier())
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"cannot read .*config\.json"):
        import_weights(folder, ImportOptions())
