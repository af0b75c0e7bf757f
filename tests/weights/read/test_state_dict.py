"""The weights are found where wrappers put them, and nothing is left out unsaid."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mae_deploy.errors import CheckFailed, ConfigError
from mae_deploy.weights.load import load_model
from mae_deploy.weights.read.convert import Imported, ImportOptions, import_weights
from tests.models.tiny_models import SQUARE, fill, tiny_classifier, tiny_encoder, tiny_mae

OPTIONS = ImportOptions(num_heads=5, decoder_num_heads=3)


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    return dict(tiny_encoder(SQUARE).state_dict())


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def imported_from(path: Path, content: Any, **options: Any) -> Imported:
    torch.save(content, path)
    return import_weights(path, ImportOptions(num_heads=5, decoder_num_heads=3, **options))


def assert_read(imported: Imported, tensors: dict[str, Tensor]) -> None:
    assert set(imported.tensors) == set(tensors)
    assert all(torch.equal(imported.tensors[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    "key", ["model", "state_dict", "model_state_dict", "net", "weights", "params", "module", "network", "my_vit"]
)
def test_keys_of_training_scripts(tmp_path: Path, tensors: dict[str, Tensor], key: str) -> None:
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3), "step": torch.zeros(())}}, "param_groups": []}
    content = {"epoch": 3, key: tensors, "optimizer": optimizer, "args": argparse.Namespace(lr=0.1)}
    imported = imported_from(tmp_path / "a.pth", content)
    assert_read(imported, tensors)
    assert imported.report["notes"] == (["the weights under 'my_vit' are taken"] if key == "my_vit" else [])


@pytest.mark.parametrize("keys", [("model", "state_dict"), ("state_dict", "model"), ("checkpoint", "model", "net")])
def test_keys_within_keys(tmp_path: Path, tensors: dict[str, Tensor], keys: tuple[str, ...]) -> None:
    content: Any = tensors
    for key in reversed(keys):
        content = {key: content, "epoch": 3}
    assert_read(imported_from(tmp_path / "a.pth", content), tensors)


def test_records_among_the_tensors(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    assert_read(imported_from(tmp_path / "a.pth", {**tensors, "epoch": 3, "name": "vit"}), tensors)


def test_a_running_average_beside_the_weights_is_said(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    average = dict(fill(tiny_encoder(SQUARE), seed=1).state_dict())
    imported = imported_from(tmp_path / "a.pth", {"model": tensors, "model_ema": average})
    assert_read(imported, tensors)
    [note] = imported.report["notes"]
    assert "'model_ema' (" in note
    assert_read(imported_from(tmp_path / "a.pth", {"model": tensors, "model_ema": average}, key="model_ema"), average)


def test_dinos_teacher_without_its_head(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    student = dict(fill(tiny_encoder(SQUARE), seed=1).state_dict())
    head = {"head.mlp.0.weight": torch.ones(4, 20), "head.last_layer.weight_g": torch.ones(4, 1)}
    content = {
        "student": under("module.backbone.", student) | under("module.", head),
        "teacher": under("backbone.", tensors) | head,
        "dino_loss": {"center": torch.zeros(1, 4)},
        "epoch": 5,
    }
    imported = imported_from(tmp_path / "checkpoint.pth", content)
    assert_read(imported, tensors)
    assert imported.metadata.kind == "encoder"
    assert imported.report["dropped"] == list(head)
    taken, prefix, left = imported.report["notes"]
    assert "the weights under 'teacher' are taken, the file also has 'student'" in taken
    assert "the prefix 'backbone.' was taken off" in prefix
    assert left == f"2 tensors beside the model are left out: {', '.join(head)}"
    assert_read(imported_from(tmp_path / "checkpoint.pth", content, key="student"), student)


def test_the_teacher_of_a_pair_of_prefixes(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    student = dict(fill(tiny_encoder(SQUARE), seed=1).state_dict())
    content = {"state_dict": under("student_backbone.", student) | under("teacher_backbone.", tensors)}
    imported = imported_from(tmp_path / "last.ckpt", content)
    assert_read(imported, tensors)
    assert imported.report["notes"][0] == "the teacher is taken; the student stands under student_backbone."


@pytest.mark.parametrize(
    "prefix", ["model.", "backbone.", "encoder.", "module.", "net.vit.", "model._orig_mod.", "student.module."]
)
@pytest.mark.parametrize("kind", ["encoder", "mae", "classifier"])
def test_one_prefix_of_all(tmp_path: Path, prefix: str, kind: str) -> None:
    models = {"encoder": tiny_encoder(SQUARE), "mae": tiny_mae(SQUARE), "classifier": tiny_classifier("avg", SQUARE)}
    tensors = dict(models[kind].state_dict())
    imported = imported_from(tmp_path / "a.pth", {"state_dict": under(prefix, tensors)})
    assert_read(imported, tensors)
    assert imported.metadata.kind == kind
    said = [note for note in imported.report["notes"] if note.endswith(f"was taken off {len(tensors)} names")]
    assert len(said) == (0 if prefix == "module." else 1)


@pytest.mark.parametrize("wrapper", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
def test_wrapped_blocks(tmp_path: Path, tensors: dict[str, Tensor], wrapper: str) -> None:
    wrapped = {
        f"module.{wrapper}.{name.replace('blocks.1.', f'blocks.1.{wrapper}.')}": tensor
        for name, tensor in tensors.items()
    }
    assert_read(imported_from(tmp_path / "a.pth", {"model": wrapped}), tensors)


def test_an_averaged_model_of_torch(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(tiny_encoder(SQUARE))
    assert_read(imported_from(tmp_path / "a.pth", averaged.state_dict()), tensors)


def test_a_head_beside_the_encoder_is_not_left_out_unasked(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    content = under("backbone.", tensors) | {"fc.weight": torch.ones(7, 20), "fc.bias": torch.ones(7)}
    with pytest.raises(
        CheckFailed, match=r"under 'backbone\.' and 2 tensors that are no part of it: fc\.weight \(7, 20\), fc\.bias"
    ) as caught:
        imported_from(tmp_path / "a.pth", content)
    assert "--prefix backbone." in (caught.value.hint or "")
    for prefix in ("backbone", "backbone."):
        imported = imported_from(tmp_path / "a.pth", content, prefix=prefix)
        assert_read(imported, tensors)
        assert imported.report["dropped"] == ["fc.weight", "fc.bias"]


def test_losses_and_metrics_of_lightning_are_left_out_and_said(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    more = {"criterion.weight": torch.ones(5), "val_accuracy.tp": torch.ones(5)}
    imported = imported_from(tmp_path / "last.ckpt", {"state_dict": under("net.", tensors) | more})
    assert_read(imported, tensors)
    assert imported.report["dropped"] == list(more)


def test_two_encoders_need_a_choice(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    momentum = dict(fill(tiny_encoder(SQUARE), seed=1).state_dict())
    content = {"state_dict": under("module.base_encoder.", tensors) | under("module.momentum_encoder.", momentum) | {}}
    with pytest.raises(CheckFailed, match=r"2 ViTs, under base_encoder\. and momentum_encoder\.") as caught:
        imported_from(tmp_path / "a.pth", content)
    assert "--prefix" in (caught.value.hint or "")
    assert_read(imported_from(tmp_path / "a.pth", content, prefix="momentum_encoder"), momentum)


def test_several_state_dicts_need_a_choice(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    content = {"online": tensors, "target": tensors, "epoch": 3}
    with pytest.raises(CheckFailed, match=r"several state dicts: 'online' \(\d+ tensors\), 'target'") as caught:
        imported_from(tmp_path / "a.pth", content)
    assert "--key" in (caught.value.hint or "")
    assert_read(imported_from(tmp_path / "a.pth", content, key="target"), tensors)
    with pytest.raises(ConfigError, match="no state dict under --key ema") as wrong:
        imported_from(tmp_path / "a.pth", content, key="ema")
    assert "'online'" in (wrong.value.hint or "")
    with pytest.raises(ConfigError, match=r"begins with --prefix vit\.") as nothing:
        imported_from(tmp_path / "a.pth", content, key="target", prefix="vit")
    assert "cls_token, pos_embed, patch_embed, blocks, norm" in (nothing.value.hint or "")


def test_what_a_file_without_tensors_holds_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckFailed, match="holds no state dict of tensors") as caught:
        imported_from(tmp_path / "a.pth", {"epoch": 3, "loss": [1.0]})
    assert caught.value.hint == "its keys: epoch (int), loss (list)"


def test_a_wrapper_is_no_mae_lite(tmp_path: Path) -> None:
    """A width of 192 under `model.` is anybody's: 3 heads, as DeiT and timm have, and the report says so."""
    config = replace(SQUARE, embed_dim=192, depth=1, num_heads=3)
    tensors = dict(tiny_encoder(config).state_dict())
    torch.save({"state_dict": under("model.", tensors)}, tmp_path / "last.ckpt")
    imported = import_weights(tmp_path / "last.ckpt", ImportOptions())
    assert_read(imported, tensors)
    assert (imported.metadata.encoder["num_heads"], imported.report["layout"]) == (3, "original or timm")
    assert "the heads are not in the file: 3, as is usual for a width of 192 (--num-heads)" in imported.report["notes"]


def test_notes_are_said_where_a_file_is_read_directly(
    tmp_path: Path, tensors: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(under("backbone.", tensors), tmp_path / "vit.safetensors")
    load_model(tmp_path / "vit.safetensors")
    assert "the prefix 'backbone.' was taken off" in capsys.readouterr().err
