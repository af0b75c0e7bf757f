"""timm's models as teachers: timm's own outputs are the reference."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data import resolve_data_config

from mae_deploy.checkpoint import NON_COMMERCIAL
from mae_deploy.distill.config import TeacherConfig
from mae_deploy.distill.teachers.base import check_view
from mae_deploy.distill.teachers.timm_teacher import TimmTeacher
from mae_deploy.errors import CheckFailed, ConfigError
from mae_deploy.models.config import EncoderConfig
from mae_deploy.models.masking import Masking
from mae_deploy.models.taps import Tap
from mae_deploy.models.vit import gather_tokens
from mae_deploy.weights.frozen import normalised
from mae_deploy.weights.timm_network import timm_licence
from tests.distill.teachers.tiny_teachers import batch_of, masking_of, ready

STUDENT = EncoderConfig(name="student", image_size=(32, 48), patch_size=16, embed_dim=8, depth=1, num_heads=2)
"""2x3 patches, as large as the teachers'."""

WANTED = (Tap("tokens", 2), Tap("qkv", 3), Tap("latent"), Tap("cls"), Tap("pooled"), Tap("logits"))


@cache
def reference(architecture: str, num_classes: int = 7) -> Any:
    torch.manual_seed(0)
    model = timm.create_model(architecture, num_classes=num_classes).eval()
    for parameter in model.parameters():  # no LayerScale, bias or register that is nothing
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def at_students_grid(architecture: str) -> Any:
    model = copy.deepcopy(reference(architecture))
    model.set_input_size(img_size=STUDENT.image_size)
    return model


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return tmp_path / "weights.safetensors"


def teacher_of(architecture: str, weights: Path, num_classes: int = 7, **settings: Any) -> TimmTeacher:
    save_file(
        {name: tensor.contiguous() for name, tensor in reference(architecture, num_classes).state_dict().items()},
        weights,
    )
    return TimmTeacher(
        architecture, weights, TeacherConfig(teacher_precision="fp32", teacher_weights=weights, **settings)
    )


@pytest.mark.parametrize("architecture", ["test_vit", "test_vit2", "test_vit3", "test_vit4"])
def test_answers_are_timms_own(architecture: str, weights: Path) -> None:
    """With a class token; with a register and mean pooling; with attention pooling; with RMSNorm."""
    model, batch = at_students_grid(architecture), batch_of(STUDENT)
    teacher = teacher_of(architecture, weights)
    assert (teacher.depth, teacher.width, teacher.num_classes, teacher.kind) == (
        len(model.blocks),
        model.embed_dim,
        7,
        "classifier",
    )
    found = ready(teacher, WANTED, student=STUDENT)(batch, None, whole=False)
    qkv: list[torch.Tensor] = []
    model.blocks[2].attn.qkv.register_forward_hook(lambda *arguments: qkv.append(arguments[2]))
    with torch.no_grad():
        tokens = model.forward_intermediates(
            batch.images, indices=[1], return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
        )
        features = model.forward_features(batch.images)
        logits = model(batch.images)
        pooled = model.forward_head(features, pre_logits=True)
    ((patches, prefix),) = tokens

    def rows(prefix: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        return torch.cat(
            [prefix[:, :1] if architecture == "test_vit" else patches.mean(dim=1, keepdim=True), patches], dim=1
        )

    latent = rows(features[:, :1], features[:, 1:])
    heads = model.blocks[2].attn.num_heads
    expected = {
        Tap("tokens", 2): normalised(rows(prefix, patches)),
        Tap("qkv", 3): rows(qkv[0][:, :1], qkv[0][:, 1:]).reshape(3, 7, 3, heads, -1).permute(0, 2, 3, 1, 4),
        Tap("latent"): latent,
        Tap("cls"): latent[:, 0],
        Tap("pooled"): pooled,
        Tap("logits"): logits,
    }
    assert set(found) == set(expected)
    for tap, value in expected.items():
        torch.testing.assert_close(found[tap], value, rtol=1e-5, atol=1e-5)  # float32 sums


def test_the_visible_patches_alone(weights: Path) -> None:
    """timm's blocks on the rows of these patches."""
    model, batch, masking = at_students_grid("test_vit2"), batch_of(STUDENT), masking_of(STUDENT, 0.5)
    teacher = ready(teacher_of("test_vit2", weights), {Tap("tokens", 2)}, student=STUDENT)
    with torch.no_grad():
        tokens = model._pos_embed(model.patch_embed(batch.images))
        tokens = torch.cat([tokens[:, :1], gather_tokens(tokens[:, 1:], masking.ids_keep)], dim=1)
        tokens = model.blocks[1](model.blocks[0](model.norm_pre(tokens)))[:, 1:]
    expected = normalised(torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1))
    torch.testing.assert_close(teacher(batch, masking, whole=False)[Tap("tokens", 2)], expected, rtol=1e-5, atol=1e-5)
    whole = teacher(batch, masking, whole=True)[Tap("tokens", 2)]
    assert torch.equal(
        whole[:, 1:], gather_tokens(teacher(batch, None, whole=False)[Tap("tokens", 2)][:, 1:], masking.ids_keep)
    )
    assert not torch.allclose(whole[:, 1:], expected[:, 1:], atol=1e-3)


def test_rotary_positions_follow_the_patches(weights: Path) -> None:
    """Of all patches in another order, a network without order gives the same rows in that order."""
    save_file(timm.create_model("eva02_tiny_patch14_224", num_classes=0, depth=2).state_dict(), weights)
    student = EncoderConfig(name="student", image_size=(28, 42), patch_size=14, embed_dim=8, depth=1, num_heads=2)
    teacher = _shallow_eva(weights)
    ready(teacher, {Tap("tokens", 2)}, student=student)
    orders = torch.stack([torch.randperm(6, generator=torch.Generator().manual_seed(row)) for row in range(3)])
    shuffled = Masking(orders, orders.argsort(dim=1), torch.zeros(3, 6))
    batch = batch_of(student)
    # Attention in another order of sums.
    torch.testing.assert_close(
        teacher(batch, shuffled, whole=False)[Tap("tokens", 2)],
        teacher(batch, shuffled, whole=True)[Tap("tokens", 2)],
        rtol=0,
        atol=1e-4,
    )


def _shallow_eva(weights: Path) -> TimmTeacher:
    """Two of its twelve blocks."""
    original = timm.create_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, "create_model", lambda name, **options: original(name, depth=2, **options))
        return TimmTeacher("eva02_tiny_patch14_224", weights, TeacherConfig(teacher_precision="fp32"))


def test_exactly_the_blocks_up_to_the_tap_are_left(weights: Path) -> None:
    teacher = ready(teacher_of("test_vit", weights), {Tap("tokens", 1), Tap("qkv", 3)}, student=STUDENT)
    assert len(teacher.model.blocks) == 3
    assert not any(name.startswith(("norm", "head", "fc_norm")) for name in teacher.model.state_dict())
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    found = teacher(batch_of(STUDENT), None, whole=False)
    assert found[Tap("qkv", 3)].shape == (3, 3, 2, 7, 32)


def test_its_own_statistics_size_and_names(weights: Path) -> None:
    (weights.parent / "config.json").write_text('{"label_names": ["a", "b", "c", "d", "e", "f", "g"]}')
    teacher = teacher_of("test_vit", weights)
    wanted = resolve_data_config({}, model=timm.create_model("test_vit"))
    assert (teacher.preprocess.mean, teacher.preprocess.std, teacher.preprocess.image_size) == (
        wanted["mean"],
        wanted["std"],
        (160, 160),
    )
    assert teacher.class_names == tuple("abcdefg")
    assert teacher.licence == "unspecified"  # no tag says whose weights these are
    assert teacher.record["timm"] == "test_vit"
    ready(teacher, {Tap("logits")}, student=STUDENT)
    assert teacher(batch_of(STUDENT), None, whole=False)[Tap("logits")].shape == (3, 7)
    # Logits alone are those of its own size.
    assert teacher.reason_against_subset == "it sees 10x10 patches, the student 2x3"


def test_a_tag_says_what_its_weights_may_be_used_for() -> None:
    """As an SPDX name, so that students and bundles of a non-commercial teacher are marked."""
    model: Any = timm.create_model("test_vit")
    assert timm_licence(model, "test_vit") is None
    model.pretrained_cfg = {**model.pretrained_cfg, "license": "cc-by-nc-4.0"}
    assert timm_licence(model, "test_vit.tag") == NON_COMMERCIAL


def test_without_a_head_there_are_no_logits(weights: Path) -> None:
    teacher = teacher_of("test_vit", weights, num_classes=0)
    assert (teacher.num_classes, teacher.kind) == (None, "encoder")
    with pytest.raises(ConfigError, match="gives no logits") as error:
        ready(teacher, {Tap("logits")}, student=STUDENT)
    assert "has no head" in str(error.value.hint)
    found = ready(teacher, {Tap("pooled"), Tap("latent")}, student=STUDENT)(batch_of(STUDENT), None, whole=False)
    assert torch.equal(found[Tap("pooled")], found[Tap("latent")][:, 1:].mean(dim=1))


def test_maps_of_its_own_size_are_interpolated(weights: Path) -> None:
    teacher = ready(teacher_of("test_vit", weights, teacher_grid="interpolate"), {Tap("tokens", 1)}, student=STUDENT)
    assert teacher(batch_of(STUDENT), None, whole=False)[Tap("tokens", 1)].shape == (3, 7, 64)
    with pytest.raises(ConfigError, match="sees 10x10 patches"):
        check_view(teacher, masked=True, whole=False)


def test_other_networks_teach_pooled_and_logits(weights: Path) -> None:
    teacher = teacher_of("test_resnet", weights)
    assert teacher.depth == 0
    found = ready(teacher, {Tap("pooled"), Tap("logits")}, student=STUDENT)(batch_of(STUDENT), None, whole=False)
    assert found[Tap("pooled")].shape == (3, teacher.width)
    with pytest.raises(ConfigError, match="takes no choice of patches"):
        check_view(teacher, masked=True, whole=False)
    with pytest.raises(ConfigError, match="gives no tokens, only pooled, logits"):
        ready(teacher_of("test_resnet", weights), {Tap("tokens", 1)}, student=STUDENT)


def test_weights_of_another_model(weights: Path) -> None:
    teacher_of("test_vit", weights)
    settings = TeacherConfig(teacher_weights=weights)
    with pytest.raises(CheckFailed):
        TimmTeacher("test_vit2", weights, settings)
    with pytest.raises(ConfigError, match="has no model 'test_vitt'"):
        TimmTeacher("test_vitt", weights, settings)
