"""Networks of ours as teachers: what they run, what they see, and in whose rows they answer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mae_deploy.distill.config import TeacherConfig
from mae_deploy.distill.teachers.base import check_view
from mae_deploy.errors import ConfigError
from mae_deploy.models.bands import GroupedPatchEmbed
from mae_deploy.models.config import DecoderConfig, EncoderConfig, ObjectiveConfig
from mae_deploy.models.mae import MaskedAutoencoder
from mae_deploy.models.taps import Tap, tapped
from mae_deploy.weights.frozen import normalised, resize_images
from tests.distill.teachers.tiny_teachers import DEEP, FP32, batch_of, masking_of, own_teacher, ready
from tests.models.tiny_models import DECODER, ENCODER, fill, random_tensor, tiny_classifier, tiny_encoder, tiny_mae

FINER = replace(ENCODER, name="finer", image_size=(12, 20), patch_size=4)
"""The tiny encoder's grid of patches twice as large."""

OTHER = replace(ENCODER, name="other", image_size=(8, 14))
"""4x7 patches."""

INTERPOLATED = TeacherConfig(teacher_precision="fp32", teacher_grid="interpolate")


def executed(model: nn.Module) -> list[str]:
    """Names of the modules that are called from now on."""
    names: list[str] = []
    for name, module in model.named_modules():
        if name and not isinstance(module, nn.Identity):
            module.register_forward_hook(lambda *_, name=name: names.append(name))
    return names


# --- what is run -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 2, 3])
def test_exactly_the_blocks_up_to_the_tap_are_run(block: int) -> None:
    teacher = ready(own_teacher(tiny_mae(DEEP)), {Tap("tokens", block)})
    names = executed(teacher.model)
    teacher(batch_of(), masking_of(), whole=False)
    blocks = [name for name in names if isinstance(teacher.model.get_submodule(name), Block)]
    assert blocks == [f"blocks.{index}" for index in range(block)]
    assert {name.split(".")[0] for name in names} == {"patch_embed", "blocks"}


def test_no_more_than_its_norm_and_qkv_of_a_block_for_relations() -> None:
    teacher = ready(own_teacher(tiny_encoder(DEEP)), {Tap("qkv", 2)})
    names = executed(teacher.model)
    teacher(batch_of(), None, whole=False)
    assert {name for name in names if name.startswith("blocks.1.")} == {"blocks.1.norm1", "blocks.1.attn.qkv"}


def test_there_are_no_gradients() -> None:
    teacher = ready(own_teacher(tiny_classifier("avg")), {Tap("logits"), Tap("tokens", 1)})
    batch = batch_of()
    batch.images.requires_grad_()
    assert not any(value.requires_grad for value in teacher(batch, None, whole=False).values())
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())


# --- what it answers -------------------------------------------------------------------------------------------------

EVERY = {Tap("tokens", 1), Tap("qkv", 2), Tap("latent"), Tap("cls"), Tap("pooled")}


def test_answers_are_the_networks_own_taps() -> None:
    model, batch, masking = tiny_classifier("cls", DEEP), batch_of(), masking_of()
    wanted = {*EVERY, Tap("logits")}
    found = ready(own_teacher(model), wanted)(batch, masking, whole=False)
    with torch.no_grad():
        expected = tapped(model, batch.images, wanted, masking)
        logits = model(batch.images, masking.ids_keep)
    assert set(found) == wanted
    for tap in wanted:
        assert torch.equal(found[tap], normalised(expected[tap]) if tap.kind == "tokens" else expected[tap])
    torch.testing.assert_close(found[Tap("logits")], logits)


def test_the_kept_rows_of_the_whole_image() -> None:
    model, batch, masking = tiny_encoder(DEEP), batch_of(), masking_of()
    teacher = ready(own_teacher(model), EVERY)
    all_rows, found = teacher(batch, None, whole=False), teacher(batch, masking, whole=True)
    picked = torch.cat([torch.zeros(3, 1, dtype=torch.int64), 1 + masking.ids_keep], dim=1)
    rows = torch.arange(3)[:, None]
    for tap in (Tap("tokens", 1), Tap("latent")):
        assert torch.equal(found[tap], all_rows[tap][rows, picked])
    qkv = Tap("qkv", 2)
    assert torch.equal(found[qkv].permute(0, 3, 1, 2, 4), all_rows[qkv].permute(0, 3, 1, 2, 4)[rows, picked])
    assert torch.equal(found[Tap("pooled")], all_rows[Tap("pooled")])
    visible = teacher(batch, masking, whole=False)
    assert not torch.allclose(visible[Tap("latent")], found[Tap("latent")], atol=1e-2)


def test_the_decoder_of_the_visible_patches_and_of_all() -> None:
    model, batch, masking = tiny_mae(DEEP), batch_of(), masking_of()
    teacher = ready(own_teacher(model), {Tap("decoder", 1), Tap("pixels")})
    found = teacher(batch, masking, whole=False)
    assert found[Tap("decoder", 1)].shape == (3, 15, 12)
    with torch.no_grad():
        torch.testing.assert_close(
            found[Tap("pixels")],
            model.forward_decoder(model.forward_latent(batch.images, masking), masking.ids_restore),
        )
        everything = model.forward_decoder(model.forward_encoder(batch.images), torch.arange(15).expand(3, 15))
    for whole in (teacher(batch, masking, whole=True), teacher(batch, None, whole=False)):
        torch.testing.assert_close(whole[Tap("pixels")], everything)
    assert (teacher.decoder_depth, teacher.decoder_width) == (1, 12)


def test_an_encoder_with_mask_tokens_answers_for_the_visible_patches() -> None:
    model = fill(MaskedAutoencoder(ENCODER, DECODER, objective=ObjectiveConfig(encoder_mask_tokens=True)))
    wanted = {Tap("tokens", 2), Tap("pixels")}
    batch, masking = batch_of(), masking_of()
    found = ready(own_teacher(model), wanted)(batch, masking, whole=False)
    assert found[Tap("tokens", 2)].shape == (3, 1 + masking.ids_keep.shape[1], 20)
    alone = ready(own_teacher(model), {Tap("tokens", 2)})(
        batch, masking, whole=False
    )  # a plain encoder, which sees the visible ones alone
    assert alone[Tap("tokens", 2)].shape == found[Tap("tokens", 2)].shape


# --- size and statistics ---------------------------------------------------------------------------------------------


def test_another_patch_size_is_met_by_resizing() -> None:
    model, batch, masking = tiny_encoder(DEEP), batch_of(FINER), masking_of(FINER)
    teacher = ready(own_teacher(model), {Tap("tokens", 3)}, student=FINER)
    small = replace(batch, images=resize_images(batch.images, (6, 10)))
    assert teacher.reason_against_subset is None
    assert torch.equal(
        teacher(batch, masking, whole=False)[Tap("tokens", 3)],
        ready(own_teacher(model), {Tap("tokens", 3)})(small, masking, whole=False)[Tap("tokens", 3)],
    )


def test_another_grid_shows_the_image_at_another_size(capsys: pytest.CaptureFixture[str]) -> None:
    teacher = ready(own_teacher(tiny_encoder(DEEP)), {Tap("tokens", 3)}, student=OTHER)
    said = "teacher: sees images of 8x14 as 4x7 patches, the grid of the student; it was made for 6x10 ("
    assert f"\n{said}" in capsys.readouterr().err
    assert teacher.model.config.image_size == (8, 14)
    assert teacher(batch_of(OTHER), masking_of(OTHER), whole=False)[Tap("tokens", 3)].shape == (3, 1 + 8, 20)


def test_or_its_maps_are_interpolated(capsys: pytest.CaptureFixture[str]) -> None:
    teacher = ready(
        own_teacher(tiny_encoder(DEEP), INTERPOLATED), {Tap("tokens", 3), Tap("latent"), Tap("qkv", 1)}, student=OTHER
    )
    assert "teacher: has 3x5 patches, the student 4x7: what is of patches is interpolated" in capsys.readouterr().err
    assert teacher.model.config.image_size == ENCODER.image_size
    found = teacher(batch_of(OTHER), None, whole=False)
    assert {tap: tuple(value.shape) for tap, value in found.items()} == {
        Tap("tokens", 3): (3, 29, 20),
        Tap("latent"): (3, 29, 20),
        Tap("qkv", 1): (3, 3, 5, 29, 4),
    }
    picked = teacher(batch_of(OTHER), masking_of(OTHER), whole=True)[Tap("latent")]
    assert torch.equal(picked[:, 1:], found[Tap("latent")][:, 1:][torch.arange(3)[:, None], masking_of(OTHER).ids_keep])
    check_view(teacher, masked=True, whole=True)
    with pytest.raises(ConfigError, match="sees 3x5 patches, the student 4x7"):
        check_view(teacher, masked=True, whole=False)


def test_pixels_are_not_interpolated() -> None:
    with pytest.raises(ConfigError, match="pixels of another grid"):
        ready(own_teacher(tiny_mae(), INTERPOLATED), {Tap("pixels")}, student=OTHER)


def test_logits_alone_are_those_of_its_own_size(capsys: pytest.CaptureFixture[str]) -> None:
    teacher = ready(own_teacher(tiny_classifier("avg")), {Tap("logits"), Tap("pooled")}, student=OTHER)
    assert capsys.readouterr().err == ""
    assert teacher.model.config.image_size == ENCODER.image_size
    assert teacher.reason_against_subset is not None
    assert teacher(batch_of(OTHER), None, whole=False)[Tap("logits")].shape == (3, 11)


def test_it_is_shown_images_as_it_was_trained_on() -> None:
    """The same pixels, normalised in two ways, get the same answer."""
    model, wanted = tiny_encoder(), {Tap("latent")}
    own = own_teacher(model).preprocess
    other = replace(own, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.1))
    pixels = random_tensor(3, 3, 6, 10).sigmoid()

    def answer(spec: object) -> Tensor:
        assert isinstance(spec, type(own))
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (spec.mean, spec.std))
        batch = replace(batch_of(), images=(pixels - mean) / std)
        return ready(own_teacher(model), wanted, spec=spec)(batch, None, whole=False)[Tap("latent")]

    torch.testing.assert_close(answer(other), answer(own), rtol=0, atol=1e-4)  # float32, through two more roundings


# --- what it cannot give ---------------------------------------------------------------------------------------------


def test_taps_that_are_not_there() -> None:
    for model, tap, message in (
        (tiny_encoder(), Tap("logits"), "gives no logits, only tokens, qkv, latent, cls, pooled"),
        (tiny_encoder(), Tap("decoder", 1), "gives no decoder"),
        (tiny_mae(), Tap("decoder", 2), "decoder has no block 2"),
        (tiny_encoder(), Tap("tokens", 3), "encoder has no block 3"),
        (tiny_encoder(), Tap("qkv", 0), "encoder has no block 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            ready(own_teacher(model), {tap})


def test_other_channels_are_refused() -> None:
    teacher = own_teacher(tiny_encoder(replace(ENCODER, in_chans=4)))
    with pytest.raises(ConfigError, match="reads 4 channels, the student 3"):
        ready(teacher, {Tap("latent")}, spec=own_teacher(tiny_encoder()).preprocess)


def test_groups_of_bands_teach_logits_and_not_tokens() -> None:
    bands = EncoderConfig(
        name="bands",
        image_size=(6, 10),
        patch_size=2,
        in_chans=3,
        band_groups=((0, 1), (2,)),
        embed_dim=20,
        depth=1,
        num_heads=5,
    )
    with pytest.raises(ConfigError, match="groups of bands"):
        ready(own_teacher(tiny_classifier("avg", bands)), {Tap("tokens", 1)})
    teacher = ready(own_teacher(tiny_classifier("avg", bands)), {Tap("logits")})
    assert isinstance(teacher.model.patch_embed, GroupedPatchEmbed)
    assert teacher(batch_of(), None, whole=False)[Tap("logits")].shape == (3, 11)
    with pytest.raises(ConfigError, match="groups of bands"):
        check_view(teacher, masked=True, whole=False)


# --- key, precision, compilation -------------------------------------------------------------------------------------


def test_the_key_follows_whatever_changes_the_answers() -> None:
    def key(
        settings: TeacherConfig = FP32,
        wanted: tuple[Tap, ...] = (Tap("tokens", 1),),
        student: EncoderConfig = ENCODER,
        sha: str = "ab",
        std: tuple[float, float, float] | None = None,
    ) -> str:
        teacher = own_teacher(tiny_encoder(), settings)
        teacher.record["sha256"] = sha
        teacher.preprocess = replace(teacher.preprocess, std=std or teacher.preprocess.std)
        return ready(teacher, wanted, student=student).key

    changed = [
        key(sha="cd"),
        key(std=(0.5, 0.5, 0.5)),
        key(replace(FP32, teacher_precision="bf16")),
        key(wanted=(Tap("tokens", 2),)),
        key(wanted=(Tap("tokens", 1), Tap("tokens", 2))),
        key(student=OTHER),
        key(INTERPOLATED, student=OTHER),
    ]
    assert len({key(), *changed}) == 1 + len(changed)
    assert key(wanted=(Tap("tokens", 2), Tap("tokens", 1))) == key(wanted=(Tap("tokens", 1), Tap("tokens", 2)))


def test_bf16_is_close_and_its_answers_are_float32() -> None:
    torch.manual_seed(0)
    model = MaskedAutoencoder(
        replace(ENCODER, name="wide", embed_dim=40, depth=3), DecoderConfig(decoder_depth=1, decoder_embed_dim=16)
    )
    wanted = {Tap("tokens", 3), Tap("decoder", 1), Tap("qkv", 2)}
    batch, masking = batch_of(), masking_of()
    exact, rounded = (
        ready(own_teacher(model, TeacherConfig(teacher_precision=precision)), wanted)(batch, masking, whole=False)
        for precision in ("fp32", "bf16")
    )
    for tap in wanted:
        assert rounded[tap].dtype == torch.float32
        assert not torch.equal(rounded[tap], exact[tap])
        error = (rounded[tap] - exact[tap]).norm() / exact[tap].norm()
        assert error < 0.02, tap  # bf16 rounds to 0.4 %; a handful of layers add up


def test_fp32_stays_fp32_where_the_run_is_not() -> None:
    teacher, batch = ready(own_teacher(tiny_encoder()), {Tap("latent")}), batch_of()
    plain = teacher(batch, None, whole=False)[Tap("latent")]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(teacher(batch, None, whole=False)[Tap("latent")], plain)


def test_compilation_is_asked_for_the_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[object] = []

    def compile_(function: object) -> object:
        compiled.append(function)
        return function

    monkeypatch.setattr(torch, "compile", compile_)
    teacher = ready(own_teacher(tiny_encoder(), replace(FP32, teacher_compile=True)), {Tap("latent")})
    assert compiled == [teacher.forward]
    teacher(batch_of(), masking_of(), whole=False)
