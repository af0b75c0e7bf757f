"""Distillation runs: on features of unlabelled images, and on logits of labelled and unlabelled ones."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from mae_deploy.checkpoint import OWN_LICENCE, Metadata, inherited_licence
from mae_deploy.config import to_dict
from mae_deploy.data.class_order import check_order
from mae_deploy.data.dataset import ImageDataset
from mae_deploy.data.sources.base import ImageSource, Joined
from mae_deploy.data.sources.open import unlabelled_images
from mae_deploy.data.sources.splits import announce, labelled_splits
from mae_deploy.data.training_set import train_dataset
from mae_deploy.data.transforms import eval_transform, train_transform
from mae_deploy.distill.build import Weight, build_objectives, objective_weights
from mae_deploy.distill.cache import CachedTeacher, open_cache
from mae_deploy.distill.config import DistillConfig, RunKind
from mae_deploy.distill.distiller import Distiller
from mae_deploy.distill.masks import Masks
from mae_deploy.distill.quantization import student_quantizer
from mae_deploy.distill.streams import Updates, check_stream
from mae_deploy.distill.student import read_start, start, student_encoder
from mae_deploy.distill.teachers.base import Teacher, check_view
from mae_deploy.distill.teachers.open import open_teacher
from mae_deploy.errors import ConfigError
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.models.config import EncoderConfig
from mae_deploy.models.mae import MaskedAutoencoder
from mae_deploy.models.vit import Classifier
from mae_deploy.progress import notice
from mae_deploy.seeding import derive_seed, seed_everything
from mae_deploy.training.loop import TrainingJob, accelerator_of, run_job
from mae_deploy.training.optim.groups import ParamGroup, decay_groups, layer_decay_groups
from mae_deploy.training.step import StepBatch
from mae_deploy.training.validation import Evaluator
from mae_deploy.weights.load import LoadedWeights

_WARMUP = 15.0
"""Epochs (TinyMIM's 300-epoch recipe)."""


_OTHER_CLASSES = (
    "logits are of the teacher's classes; --objective features needs none, and the student is fine-tuned on yours then"
)

Answers = Teacher | CachedTeacher
"""Who is asked in a step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Data:
    """What a run trains on, and what it is validated on."""

    train: ImageSource
    fingerprint: dict[str, Any]
    val: ImageSource | None = None
    class_names: tuple[str, ...] | None = None


def run_distill(config: DistillConfig) -> dict[str, Any]:
    """Distil a student; returns the loop's summary.

    Raises:
        ConfigError: teacher, student, objectives and data do not go together.
    """
    teacher = open_teacher(config.teacher, config.teaching)
    encoder = student_encoder(config, image_size=teacher.preprocess.image_size, in_chans=teacher.preprocess.channels)
    kind: RunKind = (
        config.objective if config.objective != "auto" else "logits" if teacher.kind == "classifier" else "features"
    )
    spec = config.images.preprocess(encoder.image_size, encoder.in_chans, teacher.preprocess)
    init = read_start(config)
    masks = Masks(config, kind, encoder)
    weights = objective_weights(config, kind, masked=masks.always)
    if kind == "features" and config.logits.unlabelled is not None:
        raise ConfigError(
            "--unlabelled is for runs on logits; a run on features needs no labels in DATA either",
            hint="put all images below DATA",
        )
    data = _unlabelled(config) if kind == "features" else _labelled(config, teacher)
    if config.streams.stream is not None:
        check_stream(weights, config.streams.stream, sharding=config.loop.sharding)
    model = _distiller(config, encoder, data, init, teacher, weights)
    whole = kind == "logits" or config.teaching.teacher_view == "whole"
    if model.teacher_taps:
        teacher.watch(model.teacher_taps, student=encoder, spec=spec)
        check_view(teacher, masked=masks.ever, whole=whole)
    accelerator = accelerator_of(config)
    dataset = train_dataset(
        data.train,
        train_transform(spec, config.augment),
        config.images,
        seed=config.seed,
        fixed_views=config.caching.fixed_views,
        earlier=config.streams.stream_frames,
    )
    updates = None if config.streams.stream is None else Updates(encoder, spec, config.streams.stream)
    answers = _answers(config, teacher, dataset, masks, accelerator, whole=whole) if model.teacher_taps else None
    job = TrainingJob(
        title=f"distil {kind}",
        model=model,
        saved=model.student,
        groups=(
            decay_groups(model, config.optim.weight_decay) if kind == "features" else _layer_decay_groups(model, config)
        ),
        dataset=dataset,
        spec=spec,
        loss=_Loss(model, answers, weights, masks, updates, whole=whole),
        metadata=lambda: _metadata(config, model, data, spec, kind, teacher, init),
        paper_warmup=_WARMUP,
        evaluate=None if data.val is None else _evaluation(config, data.val, spec, masks),
        num_validation=0 if data.val is None else len(data.val),
    )
    try:
        return run_job(job, accelerator, config, data.fingerprint)
    finally:
        if isinstance(answers, CachedTeacher):
            answers.close()


class _Loss:
    """The teacher's answers, then the weighted sum of the objectives."""

    def __init__(
        self,
        model: Distiller,
        teacher: Answers | None,
        weights: dict[str, Weight],
        masks: Masks,
        updates: Updates | None,
        *,
        whole: bool,
    ) -> None:
        self.taps = model.teacher_taps
        self.quantizer = model.quantizer
        self.teacher = teacher
        self.weights = weights
        self.masks = masks
        self.updates = updates
        self.whole = whole

    def __call__(self, model: nn.Module, batch: StepBatch) -> dict[str, Tensor]:
        batch, seen = (batch, None) if self.updates is None else self.updates(batch)
        masking, answers = self.masks(batch), {}
        if self.teacher is not None:
            with batch.timed("teacher"):
                answers = self.teacher(batch, masking, whole=self.whole)
        with nullcontext() if self.quantizer is None else self.quantizer.step(batch.step, batch.done):
            parts: dict[str, Tensor] = model(
                batch.images, batch.labels, masking, tuple(answers[tap] for tap in self.taps), seen
            )
        loss = sum(weight.at(batch.done) * parts[name] for name, weight in self.weights.items())
        assert isinstance(loss, Tensor)
        return {"loss": loss, **{f"{name}_loss": part for name, part in parts.items()}}


def _answers(
    config: DistillConfig,
    teacher: Teacher,
    dataset: ImageDataset,
    masks: Masks,
    accelerator: Accelerator,
    *,
    whole: bool,
) -> Answers:
    """The teacher on its device, behind its cache where there is one."""
    teacher.to(accelerator.device)
    if config.caching.teacher_cache is None:
        return teacher
    if config.loop.plan:
        if accelerator.is_main_process:
            notice("plan:", "measured with the teacher at work; a view whose answer is in --teacher-cache takes less")
        return teacher
    where: Any = {"device": accelerator.device, "main": accelerator.is_main_process}
    return open_cache(teacher, config.caching, dataset, augment=config.augment, masks=masks, whole=whole, **where)


def _unlabelled(config: DistillConfig) -> _Data:
    images = unlabelled_images(config.data, config.images.columns)
    announce(config.data, {"": images})
    return _Data(train=images, fingerprint=images.fingerprint())


def _labelled(config: DistillConfig, teacher: Teacher) -> _Data:
    names = tuple(teacher.class_names) if teacher.class_names is not None else None
    try:
        train, val = labelled_splits(
            config.data, config.validation, seed=config.seed, class_names=names, columns=config.images.columns
        )
    except ConfigError as error:
        raise ConfigError(str(error), hint=error.hint or _OTHER_CLASSES) from error
    if train.class_names is None or len(train.class_names) != (teacher.num_classes or len(train.class_names)):
        raise ConfigError(
            f"{config.data} has {len(train.class_names or ())} classes, the teacher {teacher.num_classes}",
            hint=_OTHER_CLASSES,
        )
    if names is None and teacher.num_classes:
        check_order(train, "the teacher")
    extra = unlabelled_images(config.logits.unlabelled) if config.logits.unlabelled is not None else None
    if extra is not None:
        announce(extra.name, {"unlabelled": extra})
    fingerprint = {
        "train": train.fingerprint(),
        "val": val.fingerprint(),
        "unlabelled": extra.fingerprint() if extra else None,
    }
    return _Data(
        train=train if extra is None else Joined(train, extra),
        fingerprint=fingerprint,
        val=val,
        class_names=train.class_names,
    )


def _distiller(
    config: DistillConfig,
    encoder: EncoderConfig,
    data: _Data,
    init: LoadedWeights | None,
    teacher: Teacher,
    weights: dict[str, Weight],
) -> Distiller:
    seed_everything(derive_seed(config.seed, "weights"))
    student: MaskedAutoencoder | Classifier
    if data.class_names is None:
        student = MaskedAutoencoder(encoder, config.decoder)
    else:
        student = Classifier(
            encoder, num_classes=len(data.class_names), pool=config.logits.pool, drop_path=config.logits.drop_path
        )
    start(student, config, init)
    if isinstance(student, Classifier) and student.pos_embed is not None:
        student.pos_embed.requires_grad_(True)
    quantizer = student_quantizer(student, config.edge, sharding=config.loop.sharding)
    return Distiller(student, build_objectives(weights, config, student, teacher, quantizer), quantizer)


def _layer_decay_groups(model: Distiller, config: DistillConfig) -> list[ParamGroup]:
    """Fine-tuning's groups for the student; what the objectives train beside it learns at the head's rate."""
    decay = config.optim.weight_decay
    of_student = layer_decay_groups(model.student, decay, config.logits.layer_decay)
    parts = {"student": of_student, "objectives": decay_groups(model.objectives, decay)}
    return [
        group | {"names": [f"{part}.{name}" for name in group["names"]]}
        for part, groups in parts.items()
        for group in groups
    ]


def _evaluation(
    config: DistillConfig, val: ImageSource, spec: Preprocess, masks: Masks
) -> Callable[..., dict[str, float]]:
    """Validation of the student within the model that is trained; one that is rounded counts as that, and is validated
    without rounding too.

    Until a student is rounded that will be, it has no `top1`: no checkpoint is the best that never was rounded.
    """
    batch_size, workers = config.optim.batch_size, config.images.num_workers
    evaluator = Evaluator(val, eval_transform(spec), spec, batch_size=batch_size, num_workers=workers, kept=masks.kept)

    def evaluate(accelerator: Accelerator, model: Any, *, at_most: int | None = None) -> dict[str, float]:
        found, quantizer = evaluator(accelerator, model.student, at_most=at_most), model.quantizer
        if quantizer is None or quantizer.kind == "none":
            return found
        if not quantizer.rounds:
            return {"top1_fp32" if name == "top1" else name: value for name, value in found.items()}
        with quantizer.plain():
            found["top1_fp32"] = evaluator(accelerator, model.student, at_most=at_most)["top1"]
        return found

    return evaluate


def _metadata(
    config: DistillConfig,
    model: Distiller,
    data: _Data,
    spec: Preprocess,
    kind: RunKind,
    teacher: Teacher,
    init: LoadedWeights | None,
) -> Metadata:
    student = model.student
    of_kind: dict[str, Any] = {"kind": "mae", "decoder": to_dict(config.decoder)}
    if isinstance(student, Classifier):
        of_kind = {
            "kind": "classifier",
            "pool": student.pool,
            "num_classes": student.head.out_features,
            "class_names": data.class_names,
        }
    return Metadata(
        encoder=to_dict(student.config),
        preprocess=to_dict(spec),
        positions=init.metadata.positions if init is not None else "bicubic",
        licence=inherited_licence(teacher.licence, init.metadata.licence if init is not None else OWN_LICENCE),
        provenance={
            "stage": "distill",
            "objective": kind,
            "config": to_dict(config),
            "data": data.fingerprint,
            "teacher": teacher.record,
            "parent": init.record if init is not None else None,
        },
        **of_kind,
    )
