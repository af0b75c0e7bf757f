"""A student learns from its teacher, which stays what it was; the licence and the record of both travel on."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from mae_deploy.checkpoint import NON_COMMERCIAL, OWN_LICENCE, open_checkpoint, save_checkpoint
from mae_deploy.cli import main
from mae_deploy.config import to_dict
from mae_deploy.data.config import DataConfig
from mae_deploy.distill import run as distill_run
from mae_deploy.distill.config import (
    DecoderFeatureConfig,
    DistillConfig,
    EdgeConfig,
    FeatureObjectiveConfig,
    LogitsConfig,
    PooledConfig,
    RelationConfig,
    TeacherConfig,
)
from mae_deploy.distill.run import run_distill
from mae_deploy.distill.teachers.base import Teacher
from mae_deploy.distill.teachers.open import open_teacher
from mae_deploy.errors import ConfigError
from mae_deploy.models.mae import MaskedAutoencoder
from mae_deploy.models.taps import Tap, tapped
from mae_deploy.models.vit import Classifier
from mae_deploy.training.state.run_folder import read_metrics
from mae_deploy.training.step import StepBatch
from mae_deploy.weights.load import load_model
from tests.data.image_folders import write_noise
from tests.models.tiny_models import random_tensor
from tests.training.tiny_runs import DECODER, STUDENT, optim


def distilling(data: Path, teacher: Path, out: Path, **more: Any) -> DistillConfig:
    """A student of 3x2 patches of 4x4 pixels, 64 wide, 4 blocks; the teacher's patches are 5x5."""
    common: dict[str, Any] = {
        "optim": optim(),
        "images": DataConfig(num_workers=0),
        "decoder": DECODER,
        "features": FeatureObjectiveConfig(mask_ratio=0.5),
        "teaching": TeacherConfig(teacher_precision="fp32"),  # on any CPU
        "device": "cpu",
        **STUDENT,
    }
    return DistillConfig(data=data, teacher=teacher, out=out, **{**common, **more})


def remembered(monkeypatch: pytest.MonkeyPatch) -> list[Teacher]:
    """The teachers of the runs to come."""
    teachers: list[Teacher] = []

    def remember(path: Path, settings: TeacherConfig) -> Teacher:
        teachers.append(open_teacher(path, settings))
        return teachers[-1]

    monkeypatch.setattr(distill_run, "open_teacher", remember)
    return teachers


def weights(run_folder: Path) -> dict[str, Tensor]:
    return load_file(run_folder / "checkpoints" / "last" / "model.safetensors")


def relicensed(run_folder: Path, target: Path, licence: str) -> Path:
    checkpoint = open_checkpoint(run_folder)
    save_checkpoint(target, checkpoint.tensors(), replace(checkpoint.metadata, licence=licence))
    return target


# --- features --------------------------------------------------------------------------------------------------------


def test_features_of_a_pretrained_teacher(
    images: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teachers = remembered(monkeypatch)
    before = weights(teacher)
    summary = run_distill(distilling(images, teacher, tmp_path / "run", optim=optim(epochs=10, lr=5e-3)))
    lines = read_metrics(tmp_path / "run")
    names = (
        "step epoch loss feature_loss pixel_loss grad_norm lr skipped images_per_second data_wait teacher_seconds"
        " student_seconds"
    )
    assert {" ".join(line) for line in lines} == {names}
    assert lines[0]["loss"] == pytest.approx(lines[0]["feature_loss"] + lines[0]["pixel_loss"], rel=1e-6)  # float32
    assert summary["last_loss"] < 0.9 * summary["first_loss"]
    assert lines[-1]["feature_loss"] < 0.8 * lines[0]["feature_loss"]

    # The teacher: two blocks by default (three quarters of two), and after the run the answers that its checkpoint
    # gives, at the size of the student's grid.
    (used,) = teachers
    batch = StepBatch(random_tensor(2, 3, 15, 10), torch.zeros(2, dtype=torch.int64))
    network, _ = load_model(teacher)
    tokens = tapped(network, batch.images, [Tap("tokens", 2)])[Tap("tokens", 2)]
    assert torch.equal(used(batch, None, whole=True)[Tap("tokens", 2)], F.layer_norm(tokens, tokens.shape[-1:]))
    assert [name for name, tensor in weights(teacher).items() if not torch.equal(tensor, before[name])] == []

    # The student is an autoencoder of its own, without the projector.
    metadata = open_checkpoint(tmp_path / "run").metadata
    assert (metadata.kind, metadata.encoder["name"], metadata.encoder["image_size"]) == (
        "mae",
        "vit_nano_patch4",
        [12, 8],
    )
    assert metadata.decoder == to_dict(DECODER)
    assert metadata.provenance["stage"] == "distill"
    assert (metadata.provenance["objective"], metadata.provenance["parent"]) == ("features", None)
    assert metadata.provenance["teacher"]["stage"] == "pretrain"
    assert not any("projector" in name for name in weights(tmp_path / "run"))
    model, _ = load_model(tmp_path / "run")
    assert isinstance(model, MaskedAutoencoder)


def test_without_pixels_the_decoder_stays_as_it_started(images: Path, teacher: Path, tmp_path: Path) -> None:
    features = FeatureObjectiveConfig(mask_ratio=0.5, pixel_weight=0.0, student_block=3)
    for name, settings in (("start", optim(epochs=1, lr=0.0)), ("run", optim())):
        run_distill(distilling(images, teacher, tmp_path / name, features=features, optim=settings))
    start, found = weights(tmp_path / "start"), weights(tmp_path / "run")
    changed = {name.split(".")[0] for name in start if not torch.equal(start[name], found[name])}
    assert changed == {"cls_token", "patch_embed", "blocks"}
    assert [name for name in start if name.startswith("blocks.3.") and not torch.equal(start[name], found[name])] == []


def test_a_fine_tuned_teacher_gives_features_where_asked(images: Path, expert: Path, tmp_path: Path) -> None:
    run_distill(distilling(images, expert, tmp_path / "run", objective="features"))
    assert open_checkpoint(tmp_path / "run").metadata.kind == "mae"


def test_the_student_starts_from_init(images: Path, teacher: Path, tmp_path: Path) -> None:
    run_distill(distilling(images, teacher, tmp_path / "first"))
    run_distill(
        distilling(images, teacher, tmp_path / "second", init=tmp_path / "first", optim=optim(epochs=1, lr=0.0), seed=5)
    )
    first, second = weights(tmp_path / "first"), weights(tmp_path / "second")
    same = {name for name in first if torch.equal(first[name], second[name])}
    encoder = {
        name for name in first if name.split(".")[0] in ("cls_token", "pos_embed", "patch_embed", "blocks", "norm")
    }
    assert encoder <= same
    assert "decoder_embed.weight" not in same
    assert open_checkpoint(tmp_path / "second").metadata.provenance["parent"]["stage"] == "distill"


OBJECTIVES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "pairs": (
        {
            "features": FeatureObjectiveConfig(
                mask_ratio=0.5, feature_blocks=("2:1", "4:2"), feature_loss="cosine", projector="mlp"
            )
        },
        {"feature", "pixel"},
    ),
    "tinymim": (
        {
            "features": FeatureObjectiveConfig(mask_ratio=0, feature_weight=0),
            "relation": RelationConfig(relation_weight=1),
        },
        {"relation"},
    ),
    "attention": ({"relation": RelationConfig(attention_weight=10)}, {"feature", "attention", "pixel"}),
    "g2sd": (
        {
            "features": FeatureObjectiveConfig(mask_ratio=0.5, feature_weight=0, pixel_weight=0),
            "decoder_features": DecoderFeatureConfig(decoder_feature_weight=1),
        },
        {"decoder_feature"},
    ),
    "vectors": (
        {"features": FeatureObjectiveConfig(mask_ratio=0), "pooled": PooledConfig(cls_weight=1, pooled_weight=0.5)},
        {"feature", "cls", "pooled"},
    ),
    "whole teacher": (
        {"teaching": TeacherConfig(teacher_precision="fp32", teacher_view="whole")},
        {"feature", "pixel"},
    ),
    "elastic": ({"keep_ratio": (0.3, 0.7)}, {"feature", "pixel"}),
    "no teacher": ({"features": FeatureObjectiveConfig(mask_ratio=0.5, feature_weight=0)}, {"pixel"}),
    "quantised": ({"edge": EdgeConfig(quantize="static", outlier_weight=0.1)}, {"feature", "pixel", "outlier"}),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_without_labels(images: Path, teacher: Path, tmp_path: Path, name: str) -> None:
    settings, parts = OBJECTIVES[name]
    summary = run_distill(distilling(images, teacher, tmp_path / "run", **settings))
    line = read_metrics(tmp_path / "run")[0]
    assert {key.removesuffix("_loss") for key in line if key.endswith("_loss")} == parts
    assert math.isfinite(summary["last_loss"])
    assert isinstance(load_model(tmp_path / "run")[0], MaskedAutoencoder)


def test_generic_then_specific(images: Path, classes: Path, teacher: Path, expert: Path, tmp_path: Path) -> None:
    """G2SD's two stages; the second starts from the first's encoder, and takes relations, few patches and INT8
    along.
    """
    generic, _ = OBJECTIVES["g2sd"]
    run_distill(distilling(images, teacher, tmp_path / "generic", **generic, optim=optim(epochs=1)))
    logits = LogitsConfig(logits_loss="hard", logits_weight=0.5)
    more = {
        "logits": logits,
        "relation": RelationConfig(relation_weight=0.1),
        "keep_ratio": (0.5, 1.0),
        "edge": EdgeConfig(quantize="dynamic"),
    }
    run_distill(
        distilling(
            classes, expert, tmp_path / "specific", init=tmp_path / "generic", optim=optim(epochs=1, lr=0.0), **more
        )
    )
    line = read_metrics(tmp_path / "specific")[0]
    assert line["loss"] == pytest.approx(
        0.1 * line["relation_loss"] + 0.5 * line["logits_loss"] + 0.5 * line["label_loss"], rel=1e-6
    )  # float32
    # Validated with all six patches and with three, rounded and not.
    assert {"top1", "top1_of_3", "top1_fp32"} < set(read_metrics(tmp_path / "specific", "eval.jsonl")[-1])
    generic_weights, specific = weights(tmp_path / "generic"), weights(tmp_path / "specific")
    assert torch.equal(specific["blocks.3.attn.qkv.weight"], generic_weights["blocks.3.attn.qkv.weight"])


def test_a_teacher_without_a_head_in_a_labelled_run(classes: Path, teacher: Path, tmp_path: Path) -> None:
    settings = {"objective": "logits", "logits": LogitsConfig(logits_weight=0), "pooled": PooledConfig(pooled_weight=1)}
    run_distill(distilling(classes, teacher, tmp_path / "run", **settings))
    line = read_metrics(tmp_path / "run")[0]
    assert line["loss"] == pytest.approx(line["pooled_loss"] + 0.5 * line["label_loss"], rel=1e-6)  # float32
    assert open_checkpoint(tmp_path / "run").metadata.class_names == ("dark", "light")


def test_a_schedule_follows_the_share_of_the_run(images: Path, teacher: Path, tmp_path: Path) -> None:
    features = FeatureObjectiveConfig(mask_ratio=0.5, pixel_schedule=((0, 1), (0.5, 0)))
    run_distill(distilling(images, teacher, tmp_path / "run", features=features))
    # Four steps: the weight of pixels is 1, 1/2, 0, 0.
    lines = read_metrics(tmp_path / "run")
    for line, weight in zip(lines, (1, 0.5, 0, 0), strict=True):
        assert line["loss"] == pytest.approx(line["feature_loss"] + weight * line["pixel_loss"], rel=1e-6)  # float32


# --- logits ----------------------------------------------------------------------------------------------------------


def test_logits_of_a_fine_tuned_teacher(
    classes: Path, expert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = remembered(monkeypatch)
    # Its last checkpoint: the best is the first that tells the classes apart, and not sure of it.
    last = expert / "checkpoints" / "last"
    summary = run_distill(distilling(classes, last, tmp_path / "run", optim=optim(epochs=8, lr=5e-3)))
    assert summary["best_top1"] == 100.0
    lines = read_metrics(tmp_path / "run")
    assert lines[0]["loss"] == pytest.approx(
        lines[0]["logits_loss"] + 0.5 * lines[0]["label_loss"], rel=1e-6
    )  # float32
    assert lines[-1]["logits_loss"] < 0.5 * lines[0]["logits_loss"]
    batch = StepBatch(random_tensor(2, 3, 15, 10), torch.zeros(2, dtype=torch.int64))
    network, _ = load_model(last)
    assert torch.equal(experts[0](batch, None, whole=True)[Tap("logits")], network(batch.images))

    metadata = open_checkpoint(tmp_path / "run").metadata
    assert (metadata.kind, metadata.pool, metadata.class_names, metadata.encoder["name"]) == (
        "classifier",
        "avg",
        ("dark", "light"),
        "vit_nano_patch4",
    )
    assert metadata.provenance["objective"] == "logits"
    assert metadata.provenance["teacher"]["parent"]["stage"] == "pretrain"
    model, _ = load_model(tmp_path / "run")
    assert isinstance(model, Classifier)


def test_logits_from_images_without_labels_too(classes: Path, expert: Path, tmp_path: Path) -> None:
    write_noise(tmp_path / "more", 9)
    logits = LogitsConfig(unlabelled=tmp_path / "more", label_weight=0.0, temperature=2.0, pool="cls", drop_path=0.1)
    summary = run_distill(distilling(classes, expert, tmp_path / "run", logits=logits))
    # Twelve labelled and nine others, in batches of five.
    assert summary["steps"] == 2 * 4
    assert all(line["loss"] == line["logits_loss"] for line in read_metrics(tmp_path / "run"))
    metadata = open_checkpoint(tmp_path / "run").metadata
    assert metadata.provenance["data"]["unlabelled"]["images"] == 9
    assert metadata.pool == "cls"


def test_the_classes_are_the_teachers(classes: Path, expert: Path, tmp_path: Path) -> None:
    """Only light images to train on: they keep the teacher's number for light."""
    (classes / "train" / "dark").rename(tmp_path / "away")
    run_distill(distilling(classes, expert, tmp_path / "run"))
    assert open_checkpoint(tmp_path / "run").metadata.class_names == ("dark", "light")


# --- licence ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("licence", "init_licence"),
    [(NON_COMMERCIAL, OWN_LICENCE), (OWN_LICENCE, NON_COMMERCIAL), (OWN_LICENCE, OWN_LICENCE)],
)
def test_the_student_inherits_the_licences_of_teacher_and_init(
    images: Path, teacher: Path, tmp_path: Path, licence: str, init_licence: str
) -> None:
    source = relicensed(teacher, tmp_path / "licensed", licence)
    assert open_checkpoint(source).metadata.licence == licence
    quick = optim(epochs=1)
    run_distill(distilling(images, teacher, tmp_path / "first", optim=quick))
    init = relicensed(tmp_path / "first", tmp_path / "init", init_licence)
    run_distill(distilling(images, source, tmp_path / "run", init=init, optim=quick))
    expected = OWN_LICENCE if licence == init_licence == OWN_LICENCE else NON_COMMERCIAL
    assert open_checkpoint(tmp_path / "run").metadata.licence == expected


def test_a_student_by_logits_inherits_it_too(classes: Path, expert: Path, tmp_path: Path) -> None:
    run_distill(
        distilling(
            classes, relicensed(expert, tmp_path / "licensed", NON_COMMERCIAL), tmp_path / "run", optim=optim(epochs=1)
        )
    )
    assert open_checkpoint(tmp_path / "run").metadata.licence == NON_COMMERCIAL


# --- refusals --------------------------------------------------------------------------------------------------------


def test_logits_need_a_classifier(
    classes: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "distill",
        str(classes),
        "--teacher",
        str(teacher),
        "--student",
        "vit_nano_patch4",
        "--out",
        str(tmp_path / "run"),
    ]
    assert main([*arguments, "--image-size", "12,8", "--objective", "logits"]) == 2
    assert capsys.readouterr().err.splitlines()[1:] == [  # the first says what data was found
        "error: logits need a fine-tuned teacher, this one is a mae",
        "hint: finetune it first, or use --objective features",
    ]
    assert not (tmp_path / "run").exists()


def test_more_images_without_labels_belong_to_runs_on_logits(images: Path, teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--unlabelled is for runs on logits"):
        run_distill(distilling(images, teacher, tmp_path / "run", logits=LogitsConfig(unlabelled=images)))


def test_classes_that_the_teacher_does_not_know(classes: Path, expert: Path, tmp_path: Path) -> None:
    write_noise(classes / "train" / "grey", 2)
    with pytest.raises(ConfigError, match="grey is not one of the 2 classes: dark, light") as caught:
        run_distill(distilling(classes, expert, tmp_path / "run"))
    assert "--objective features" in str(caught.value.hint)


def test_a_number_of_classes_that_is_not_the_teachers(classes: Path, expert: Path, tmp_path: Path) -> None:
    """A teacher from elsewhere may not say what its classes are called."""
    checkpoint = open_checkpoint(expert)
    save_checkpoint(tmp_path / "nameless", checkpoint.tensors(), replace(checkpoint.metadata, class_names=None))
    write_noise(classes / "train" / "grey", 2)
    with pytest.raises(ConfigError, match="has 3 classes, the teacher 2") as caught:
        run_distill(distilling(classes, tmp_path / "nameless", tmp_path / "run"))
    assert "--objective features" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (FeatureObjectiveConfig(mask_ratio=0.95), r"--mask-ratio 0\.95 of 6 patches leaves nothing to see"),
        (FeatureObjectiveConfig(mask_ratio=0.5, teacher_block=3), "--teacher-block 3 must be within 1 and 2"),
        (FeatureObjectiveConfig(mask_ratio=0.5, student_block=5), "--student-block 5 must be within 1 and 4"),
    ],
)
def test_features_that_cannot_be(
    images: Path, teacher: Path, tmp_path: Path, features: FeatureObjectiveConfig, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run_distill(distilling(images, teacher, tmp_path / "run", features=features))
    # Nothing is left that would have to be removed before the next try.
    assert not (tmp_path / "run").exists()


def test_a_start_that_is_another_network(images: Path, teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the checkpoint's encoder has patch_size 5, the model asked for has 4"):
        run_distill(distilling(images, teacher, tmp_path / "run", init=teacher))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("config", "values", "message"),
    [
        (FeatureObjectiveConfig, {"mask_ratio": 1.0}, "--mask-ratio must be at least 0 and below 1, got 1.0"),
        (FeatureObjectiveConfig, {"pixel_weight": -1.0}, "--pixel-weight must be at least 0, got -1.0"),
        (
            FeatureObjectiveConfig,
            {"feature_weight": math.inf},
            "--feature-weight must be at least 0 and finite, got inf",
        ),
        (FeatureObjectiveConfig, {"feature_schedule": ((0.0, 1.0), (1.0, math.inf))}, "is not a schedule"),
        (LogitsConfig, {"temperature": math.inf}, "--temperature must be above 0 and finite, got inf"),
        (LogitsConfig, {"temperature": 0.0}, "--temperature must be above 0, got 0.0"),
        (LogitsConfig, {"label_weight": -0.5}, "--label-weight must be at least 0, got -0.5"),
        (LogitsConfig, {"layer_decay": 0.0}, "--layer-decay must be above 0 and at most 1, got 0.0"),
        (LogitsConfig, {"drop_path": 1.0}, "--drop-path must be at least 0 and below 1, got 1.0"),
    ],
)
def test_impossible_settings(config: type[Any], values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**values)
