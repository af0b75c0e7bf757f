"""What is trained: today's losses of features and logits, one pass of the student for all objectives, and nothing that
waits for a gradient.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mae_deploy.data.sources.base import UNLABELLED
from mae_deploy.distill.distiller import Distiller
from mae_deploy.distill.objectives.attention import AttentionMaps
from mae_deploy.distill.objectives.base import Objective
from mae_deploy.distill.objectives.decoder_features import DecoderFeatures
from mae_deploy.distill.objectives.features import Features
from mae_deploy.distill.objectives.logits import Labels, SoftLogits
from mae_deploy.distill.objectives.pixels import Pixels
from mae_deploy.distill.objectives.pooled import Pooled
from mae_deploy.distill.objectives.relations import Relations
from mae_deploy.models.masking import Masking, random_masking
from mae_deploy.models.taps import Tap
from tests.models.tiny_models import CLASSES, DECODER, ENCODER, random_images, random_tensor, tiny_classifier, tiny_mae

N, D, HEADS, K = ENCODER.num_patches, ENCODER.width, ENCODER.heads, 7
WIDTH, TEACHER_HEADS = 12, 3
LABELS = torch.tensor([4, UNLABELLED, 10])


def masking() -> Masking:
    return random_masking(torch.rand(3, N, generator=torch.Generator().manual_seed(3)), 0.5)


def answers(model: Distiller, tokens: int = 1 + K) -> tuple[Tensor, ...]:
    """A teacher's taps of any values, 12 wide with 3 heads."""
    shapes: dict[str, tuple[int, ...]] = {
        "tokens": (3, tokens, WIDTH),
        "qkv": (3, 3, TEACHER_HEADS, tokens, WIDTH // TEACHER_HEADS),
        "decoder": (3, N, WIDTH),
        "cls": (3, WIDTH),
        "pooled": (3, WIDTH),
        "logits": (3, CLASSES),
    }
    return tuple(random_tensor(*shapes[tap.kind], seed=10 + index) for index, tap in enumerate(model.teacher_taps))


def features(block: int = 1) -> Features:
    return Features(((block, 3),), D, WIDTH)


def autoencoder(**objectives: Objective) -> Distiller:
    student = tiny_mae().train()
    return Distiller(student, {**objectives, "pixel": Pixels(student.forward_loss)})


def test_features_and_pixels_are_what_they_were() -> None:
    """Blocks one by one, and the autoencoder's own loss, are the reference."""
    model, images, view = autoencoder(feature=features()), random_images(), masking()
    student: Any = model.student
    found = model(images, LABELS, view, answers(model))
    tokens = student.blocks[0](student.embed(images, view.ids_keep))
    project: Any = model.get_submodule("objectives.feature.projectors.0")
    assert list(found) == ["feature", "pixel"]
    assert torch.equal(found["feature"], F.smooth_l1_loss(project(tokens), answers(model)[0], beta=2.0))
    assert torch.equal(found["pixel"], student(images, view).loss)


def test_logits_and_labels_are_what_they_were() -> None:
    model, images = Distiller(tiny_classifier("avg"), {"logits": SoftLogits(2.0), "label": Labels()}), random_images()
    (teacher,) = answers(model)
    found, logits = model(images, LABELS, None, (teacher,)), model.student(images)
    kl = F.kl_div(
        F.log_softmax(logits / 2, dim=1), F.log_softmax(teacher / 2, dim=1), reduction="batchmean", log_target=True
    )
    assert torch.equal(found["logits"], kl * 4)
    # The mean over two labelled images, in another order of sums.
    torch.testing.assert_close(found["label"], F.cross_entropy(logits[[0, 2]], LABELS[[0, 2]]), rtol=1e-6, atol=0)


def test_one_pass_of_the_student_serves_all() -> None:
    model = autoencoder(
        feature=features(2),
        relation=Relations(((2, 4),), D, WIDTH, TEACHER_HEADS),
        attention=AttentionMaps(((2, 4),), HEADS, TEACHER_HEADS),
        decoder_feature=DecoderFeatures(1, 2, DECODER.decoder_embed_dim, WIDTH),
        cls=Pooled("cls", D, WIDTH),
        pooled=Pooled("pooled", D, WIDTH),
    )
    calls: list[str] = []
    for name in ("blocks.0", "blocks.1", "decoder_blocks.0"):
        model.student.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    found = model(random_images(), LABELS, masking(), answers(model))
    assert calls == ["blocks.0", "blocks.1", "decoder_blocks.0"]
    assert list(found) == ["feature", "relation", "attention", "decoder_feature", "cls", "pooled", "pixel"]
    assert model.teacher_taps == (
        Tap("tokens", 3),
        Tap("qkv", 4),
        Tap("decoder", 2),
        Tap("cls"),
        Tap("pooled"),
    )  # qkv of block 4 once
    assert all(part.shape == () and part.isfinite() and part > 0 for part in found.values())


@pytest.mark.parametrize(
    "objectives",
    [
        {"feature": features(1)},
        {"relation": Relations(((2, 4),), D, WIDTH, TEACHER_HEADS)},
        {"decoder_feature": DecoderFeatures(1, 2, DECODER.decoder_embed_dim, WIDTH)},
        {"pooled": Pooled("pooled", D, WIDTH), "feature": Features(((1, 1), (2, 3)), D, WIDTH)},
    ],
    ids=lambda objectives: "-".join(objectives),
)
def test_only_what_is_reached_is_trained(objectives: dict[str, Objective]) -> None:
    """A parameter that waits for a gradient that never comes stalls distributed training."""
    model = Distiller(tiny_mae().train(), objectives)
    torch.stack(list(model(random_images(), LABELS, masking(), answers(model)).values())).sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trained


@pytest.mark.slow
def test_a_compiled_distiller_gives_the_same() -> None:
    model, view = autoencoder(feature=features(), relation=Relations(((2, 4),), D, WIDTH, TEACHER_HEADS)), masking()
    given = (random_images(), LABELS, view, answers(model))
    plain, compiled = model(*given), torch.compile(model, backend="eager", fullgraph=True)(*given)
    assert [name for name in plain if not torch.equal(plain[name], compiled[name])] == []
