"""Fine-tuning a pretrained encoder with a linear head, or the same network from scratch (paper, appendix A.1)."""

from __future__ import annotations

from typing import Any

import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn
from torch.nn import functional as F

from mae_deploy.checkpoint import OWN_LICENCE, Metadata
from mae_deploy.config import from_dict, to_dict
from mae_deploy.data.sources.splits import labelled_splits
from mae_deploy.data.training_set import train_dataset
from mae_deploy.data.transforms import eval_transform, train_transform
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.models.config import EncoderConfig, encoder_of_init
from mae_deploy.models.vit import Classifier
from mae_deploy.pretrain.config import FinetuneConfig, MixConfig
from mae_deploy.seeding import derive_seed, seed_everything
from mae_deploy.training.kept_patches import KeptPatches
from mae_deploy.training.loop import TrainingJob, accelerator_of, run_job
from mae_deploy.training.optim.groups import layer_decay_groups
from mae_deploy.training.step import StepBatch
from mae_deploy.training.validation import Evaluator
from mae_deploy.weights.load import LoadedWeights, read_weights, start_from

FINETUNE_WARMUP = 5.0
"""Epochs (paper, table 9)."""


def run_finetune(config: FinetuneConfig) -> dict[str, Any]:
    """Fine-tune and validate; returns the loop's summary."""
    loaded = read_weights(config.init) if config.init is not None else None
    encoder = _encoder_config(config, loaded)
    base = from_dict(Preprocess, loaded.metadata.preprocess) if loaded is not None else None
    spec = config.images.preprocess(encoder.image_size, encoder.in_chans, base)
    train, val = labelled_splits(config.data, config.validation, seed=config.seed, columns=config.images.columns)
    assert train.class_names is not None
    fingerprint = {"train": train.fingerprint(), "val": val.fingerprint()}
    transform = train_transform(spec, config.augment, auto_augment=config.mix.auto_augment)
    dataset = train_dataset(train, transform, config.images, seed=config.seed)
    seed_everything(derive_seed(config.seed, "weights"))
    model = Classifier(encoder, num_classes=len(train.class_names), pool=config.pool, drop_path=config.mix.drop_path)
    pretrained = loaded if not config.from_scratch else None
    if pretrained is not None:
        start_from(model, pretrained)
    if model.pos_embed is not None:
        model.pos_embed.requires_grad_(True)  # as the original: fixed in pretraining, trained here
    if encoder.band_groups is not None:
        model.channel_embed.requires_grad_(True)  # as SatMAE
    kept = KeptPatches(encoder.num_tokens, config.keep_ratio) if config.keep_ratio is not None else None
    accelerator = accelerator_of(config)

    job = TrainingJob(
        title="from scratch" if pretrained is None else "finetune",
        model=model,
        saved=model,
        groups=layer_decay_groups(model, config.optim.weight_decay, config.layer_decay),
        dataset=dataset,
        spec=spec,
        loss=ClassificationLoss(config.mix, len(train.class_names), kept),
        metadata=lambda: Metadata(
            kind="classifier",
            encoder=to_dict(encoder),
            pool=config.pool,
            num_classes=model.head.out_features,
            class_names=train.class_names,
            preprocess=to_dict(spec),
            positions=pretrained.metadata.positions if pretrained is not None else "bicubic",
            licence=pretrained.metadata.licence if pretrained is not None else OWN_LICENCE,
            provenance={
                "stage": "finetune",
                "config": to_dict(config),
                "data": fingerprint,
                "parent": pretrained.record if pretrained is not None else None,
            },
        ),
        paper_warmup=FINETUNE_WARMUP,
        evaluate=Evaluator(
            val,
            eval_transform(spec),
            spec,
            batch_size=config.optim.batch_size,
            num_workers=config.images.num_workers,
            kept=kept,
        ),
        num_validation=len(val),
    )
    return run_job(job, accelerator, config, fingerprint)


class ClassificationLoss:
    """Cross-entropy with label smoothing, random erasing, mixup and CutMix, all from timm.

    Args:
        kept: which patches the network sees; None: all.
    """

    def __init__(self, mix: MixConfig, num_classes: int, kept: KeptPatches | None = None) -> None:
        self.smoothing = mix.label_smoothing
        self.erase = RandomErasing(mix.reprob, mode="pixel", max_count=1, device="cpu") if mix.reprob > 0 else None
        mixes = mix.mixup > 0 or mix.cutmix > 0
        self.mix = (
            Mixup(
                mixup_alpha=mix.mixup,
                cutmix_alpha=mix.cutmix,
                label_smoothing=mix.label_smoothing,
                num_classes=num_classes,
            )
            if mixes
            else None
        )
        self.kept = kept

    def __call__(self, model: nn.Module, batch: StepBatch) -> dict[str, Tensor]:
        """The loss of one batch: `(B, C, H, W), (B,)` to a scalar."""
        images, labels = batch.images, batch.labels
        masking = self.kept(batch) if self.kept is not None else None
        seen = () if masking is None else (masking.ids_keep,)
        if self.erase is not None:
            self.erase.device = images.device
            images = self.erase(images)
        if self.mix is None:
            return {"loss": F.cross_entropy(model(images, *seen), labels, label_smoothing=self.smoothing)}
        return {"loss": self._mixed(model, images, labels, *seen)}

    def _mixed(self, model: nn.Module, images: Tensor, labels: Tensor, *seen: Tensor) -> Tensor:
        assert self.mix is not None
        if len(images) == 1:
            return F.cross_entropy(model(images, *seen), labels, label_smoothing=self.smoothing)
        if len(images) % 2:
            # timm mixes an even batch only: the odd image is mixed with the first.
            images, labels = torch.cat([images, images[:1]]), torch.cat([labels, labels[:1]])
            seen = tuple(torch.cat([ids_keep, ids_keep[:1]]) for ids_keep in seen)
        mixed, targets = self.mix(images, labels)
        return F.cross_entropy(model(mixed, *seen), targets)


def _encoder_config(config: FinetuneConfig, loaded: LoadedWeights | None) -> EncoderConfig:
    asked = {
        "patch_size": config.patch_size,
        "in_chans": config.in_chans,
        "band_groups": config.band_groups,
        "image_size": config.image_size,
    }
    if loaded is None:
        given = {name: value for name, value in asked.items() if value is not None}
        return from_dict(EncoderConfig, {"name": config.model, **given})
    hint = "leave --init out and use --from-scratch"
    return encoder_of_init(loaded.encoder_config, {**asked, "name": config.model}, hint=hint)
