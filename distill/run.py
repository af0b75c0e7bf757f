"""Distillation runs: features on unlabelled images, then logits of a fine-tuned teacher."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import Tensor, nn

from mae_deploy.checkpoint import OWN_LICENCE, Metadata, inherited_licence
from mae_deploy.config import from_dict, to_dict
from mae_deploy.data.dataset import ImageDataset
from mae_deploy.data.find import labelled_images, unlabelled_images
from mae_deploy.data.opening import train_dataset
from mae_deploy.data.sources import ImageSource, Joined
from mae_deploy.data.transforms import eval_transform, train_transform
from mae_deploy.distill.config import DistillConfig
from mae_deploy.distill.losses import FeatureDistiller, label_loss, logits_loss
from mae_deploy.distill.teacher import LogitsTeacher, resolve_block
from mae_deploy.errors import ConfigError
from mae_deploy.models.config import EncoderConfig, num_keep
from mae_deploy.models.load import Loaded, read_weights, start_from
from mae_deploy.models.mae import MaskedAutoencoder
from mae_deploy.models.masking import random_masking
from mae_deploy.models.teacher import FeatureTeacher
from mae_deploy.models.vit import Classifier
from mae_deploy.preprocess import Preprocess
from mae_deploy.seeding import derive_seed, seed_everything
from mae_deploy.training.evaluate import Evaluator
from mae_deploy.training.loop import Job, fit, make_accelerator
from mae_deploy.training.optim import decay_groups, layer_decay_groups
from mae_deploy.training.run_folder import RunFolder
from mae_deploy.training.step import StepBatch

M = TypeVar("M", MaskedAutoencoder, Classifier)

_WARMUP = 15.0
"""Epochs (TinyMIM's 300-epoch recipe)."""


def run(config: DistillConfig) -> dict[str, Any]:
    """Distil a student; returns the loop's summary.

    Raises:
        ConfigError: teacher, student, objective and data do not go together.
    """
    teacher = read_weights(config.teacher)
    stored = teacher.encoder_config
    shape = {"name": config.student, "image_size": config.image_size or stored.image_size, "in_chans": stored.in_chans}
    student = from_dict(EncoderConfig, shape | ({"patch_size": config.patch_size} if config.patch_size else {}))
    objective = config.objective
    if objective == "auto":
        objective = "logits" if teacher.metadata.kind == "classifier" else "features"
    spec = config.images.preprocess(student.image_size, student.in_chans, from_dict(Preprocess, teacher.metadata.preprocess))
    init = read_weights(config.init) if config.init is not None else None
    return (_features if objective == "features" else _logits)(config, teacher, student, spec, init)


def _features(config: DistillConfig, teacher: Loaded, encoder: EncoderConfig, spec: Preprocess, init: Loaded | None) -> dict[str, Any]:
    settings = config.features
    if num_keep(encoder.num_patches, settings.mask_ratio) == 0:
        raise ConfigError(f"--mask-ratio {settings.mask_ratio} of {encoder.num_patches} patches leaves nothing to see")
    images = unlabelled_images(config.data, config.images.columns)
    data = images.fingerprint()
    features = FeatureTeacher(teacher, encoder.grid_size, resolve_block(settings.teacher_block, teacher.encoder_config.blocks, "--teacher-block"))
    seed_everything(derive_seed(config.seed, "weights"))
    student = _started(MaskedAutoencoder(encoder, config.decoder), init)
    model = FeatureDistiller(
        student,
        block=resolve_block(settings.student_block, encoder.blocks, "--student-block"),
        teacher_dim=features.config.width,
        feature_weight=settings.feature_weight,
        pixel_weight=settings.pixel_weight,
    )
    accelerator = make_accelerator(config.device, config.loop.precision, config.out, config.loop.tracker)
    folder = RunFolder.open(config.out, config, data, resume=config.resume, write=accelerator.is_main_process)
    features.to(accelerator.device)

    def loss(model: nn.Module, batch: StepBatch) -> dict[str, Tensor]:
        masking = random_masking(batch.rand(encoder.num_patches), settings.mask_ratio)
        return model(batch.images, masking, features(batch.images, masking.ids_keep))  # type: ignore[no-any-return]

    job = Job(
        title="distil features",
        model=model,
        saved=student,
        groups=decay_groups(model, config.optim.weight_decay),
        dataset=_dataset(config, images, spec),
        spec=spec,
        loss=loss,
        metadata=lambda: Metadata(
            kind="mae",
            encoder=to_dict(encoder),
            decoder=to_dict(config.decoder),
            preprocess=to_dict(spec),
            licence=_licence(teacher, init),
            provenance=_provenance(config, data, teacher, init, "features"),
        ),
        paper_warmup=_WARMUP,
    )
    return fit(job, folder, accelerator, config)


def _logits(config: DistillConfig, teacher: Loaded, encoder: EncoderConfig, spec: Preprocess, init: Loaded | None) -> dict[str, Any]:
    settings = config.logits
    expert = LogitsTeacher(teacher)
    train = labelled_images(config.data, "train", teacher.metadata.class_names, config.images.columns)
    val = labelled_images(config.data, "val", train.class_names, config.images.columns)
    if train.class_names is None or len(train.class_names) != teacher.metadata.num_classes:
        raise ConfigError(f"{config.data} has {len(train.class_names or ())} classes, the teacher {teacher.metadata.num_classes}")
    extra = unlabelled_images(settings.unlabelled) if settings.unlabelled is not None else None
    data = {"train": train.fingerprint(), "val": val.fingerprint(), "unlabelled": extra.fingerprint() if extra else None}
    seed_everything(derive_seed(config.seed, "weights"))
    student = _started(Classifier(encoder, num_classes=len(train.class_names), pool=settings.pool, drop_path=settings.drop_path), init)
    student.pos_embed.requires_grad_(True)
    accelerator = make_accelerator(config.device, config.loop.precision, config.out, config.loop.tracker)
    folder = RunFolder.open(config.out, config, data, resume=config.resume, write=accelerator.is_main_process)
    expert.to(accelerator.device)

    def loss(model: nn.Module, batch: StepBatch) -> dict[str, Tensor]:
        logits = model(batch.images)
        teacher_loss, own_loss = logits_loss(logits, expert(batch.images), settings.temperature), label_loss(logits, batch.labels)
        return {"loss": settings.logits_weight * teacher_loss + settings.label_weight * own_loss, "logits_loss": teacher_loss, "label_loss": own_loss}

    both: ImageSource = train if extra is None else Joined(train, extra)
    job = Job(
        title="distil logits",
        model=student,
        saved=student,
        groups=layer_decay_groups(student, config.optim.weight_decay, settings.layer_decay),
        dataset=_dataset(config, both, spec),
        spec=spec,
        loss=loss,
        metadata=lambda: Metadata(
            kind="classifier",
            encoder=to_dict(encoder),
            pool=settings.pool,
            num_classes=student.head.out_features,
            class_names=train.class_names,
            preprocess=to_dict(spec),
            licence=_licence(teacher, init),
            provenance=_provenance(config, data, teacher, init, "logits"),
        ),
        paper_warmup=_WARMUP,
        evaluate=Evaluator(val, eval_transform(spec), spec, batch_size=config.optim.batch_size, num_workers=config.images.num_workers),
    )
    return fit(job, folder, accelerator, config)


def _dataset(config: DistillConfig, images: ImageSource, spec: Preprocess) -> ImageDataset:
    transform = train_transform(spec, config.augment)
    return train_dataset(images, transform, config.images, seed=config.seed)


def _started(model: M, init: Loaded | None) -> M:
    return model if init is None else start_from(model, init)


def _licence(teacher: Loaded, init: Loaded | None) -> str:
    return inherited_licence(teacher.metadata.licence, init.metadata.licence if init is not None else OWN_LICENCE)


def _provenance(config: DistillConfig, data: dict[str, Any], teacher: Loaded, init: Loaded | None, objective: str) -> dict[str, Any]:
    return {
        "stage": "distill",
        "objective": objective,
        "config": to_dict(config),
        "data": data,
        "teacher": teacher.record,
        "parent": init.record if init is not None else None,
    }
